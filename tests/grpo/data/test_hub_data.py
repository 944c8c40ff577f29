"""Data sets of JSON on the Hub: the values are those of the files, online and offline."""

from pathlib import Path

import datasets
import datasets.config
import huggingface_hub
import pytest
from datasets.utils import _dataset_viewer
from hub_data import HubData

from rankup.grpo.data.sources import load_rows

ROW = {"prompt": "When?", "answer": "2024-01-01"}
FILES = {"train.jsonl": b'{"prompt": "When?", "answer": "2024-01-01"}\n', "test.jsonl": b'{"prompt": "?", "answer": "007"}\n'}
GUESSED = {"features": {name: {"dtype": kind, "_type": "Value"} for name, kind in (("prompt", "string"), ("answer", "date32"))}}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, and a viewer that has guessed a type for the dates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_dataset_viewer, "get_exported_dataset_infos", lambda **options: {"default": GUESSED})


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_values_are_those_of_the_file_whatever_the_viewer_has_guessed_and_offline_too(monkeypatch: pytest.MonkeyPatch):
    with HubData(FILES) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        assert load_rows("me/sums", split="train") == [ROW]
    offline(monkeypatch)
    assert load_rows("me/sums", split="train") == [ROW]
    assert load_rows("me/sums", split="test") == [{"prompt": "?", "answer": "007"}]
    with pytest.raises(ValueError, match=r"me/sums has no split 'dev' \(splits: train, test\)"):
        load_rows("me/sums", split="dev")


def test_types_that_datasets_has_guessed_are_refused_offline(monkeypatch: pytest.MonkeyPatch):
    with HubData({"train.jsonl": FILES["train.jsonl"]}) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        datasets.load_dataset("me/sums")
    offline(monkeypatch)
    with pytest.raises(ValueError, match="cannot reach the Hub for data set 'me/sums', and the local cache lacks its files"):
        load_rows("me/sums", split="train")


def test_types_that_the_authors_declare_stay_and_offline_too(monkeypatch: pytest.MonkeyPatch):
    types = b"  - {name: prompt, dtype: string}\n  - {name: answer, dtype: 'timestamp[s]'}\n"
    card = b"---\ndataset_info:\n  features:\n" + types + b"---\n"
    row = {"prompt": "When?", "answer": "2024-01-01T00:00:00"}
    with HubData({"train.jsonl": FILES["train.jsonl"], "README.md": card}) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        assert load_rows("me/sums", split="train") == [row]
    offline(monkeypatch)
    assert load_rows("me/sums", split="train") == [row]
