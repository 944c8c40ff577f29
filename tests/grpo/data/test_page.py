"""The examples of docs/data.md have the values that the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pages import ROOT, code_blocks

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.sources import load_rows

BLOCKS = code_blocks((ROOT / "docs" / "data.md").read_text())


def block(language: str, containing: str) -> str:
    (found,) = [text for name, text in BLOCKS if name == language and containing in text]
    return found


def test_the_rows_of_json(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(block("json", '"When?"'))
    assert repr(load_rows(str(tmp_path / "rows.jsonl"), split="train")) == repr(
        [
            {"prompt": "When?", "answer": "2024-01-01"},
            {"prompt": "How much?", "answer": "12.50"},
            {"prompt": "How many?", "answer": 7, "unit": None},
        ]
    )


def test_the_types_of_columns_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("answers.csv").write_text(block("csv", "007"))
    data = GRPOConfig(**yaml.safe_load(block("yaml", "column_types"))).data
    assert data.train is not None
    rows = load_rows(data.train, split=data.train_split, column_types=data.column_types)
    assert repr(rows) == repr([{"prompt": "1 + 6 =", "answer": 7, "tests": ["7", 7], "note": None}])
