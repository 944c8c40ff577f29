"""Prompts in a complete run: what is dropped is told and recorded, and the chat template that was used stays with the run."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from tiny_runs import ROWS

from rankup.grpo.cli.main import main

THINKING = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
TALKS = [{"prompt": [{"role": "user", "content": row["prompt"]}], "target": row["target"]} for row in ROWS]


def test_bad_rows_are_dropped_in_training_and_evaluation_and_counted(make_trainer, tmp_path: Path, capsys):
    image = [{"role": "user", "content": [{"type": "image"}]}]
    rows = [{"prompt": "", "target": 0}, *ROWS, {"prompt": image, "target": 0}]
    with make_trainer(rows=rows, on_bad_row="drop") as trainer:
        trainer.train()
        assert len(trainer.generate(["a", "b"])) == 2
        with pytest.raises(ValueError, match="the prompt of row 1 is empty"):
            trainer.generate(["a", ""])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    training, evaluation = summary["data"]["training"], summary["data"]["evaluation"]
    assert (training["prompts"], training["bad_rows"], training["too_long"]) == (12, 2, 0)
    assert training["errors"][0] == "the prompt of row 0 is empty: remove the row"
    assert (evaluation["prompts"], evaluation["bad_rows"]) == (3, 1), "the trainer evaluates on the first four rows"
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 of 14 rows of the training data were dropped (data.on_bad_row): the prompt of row 0 is empty" in shown
    assert "1 of 4 rows of the evaluation data were dropped" in shown
    assert "12 of 14 training prompts are plain text, which skips the model's chat template" in shown


def test_a_bad_row_stops_the_run_before_it_starts(make_trainer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"the prompt of row 12 is neither .*data\.on_bad_row=drop"):
        make_trainer(rows=[*ROWS, {"prompt": 5, "target": 0}]).train()
    assert not (tmp_path / "run").exists()


def test_the_run_keeps_its_chat_template_and_rewards_see_the_open_thought(make_trainer, tmp_path: Path, capsys):
    (tmp_path / "thinking.jinja").write_text(THINKING)
    seen = []

    def sees(completions, completion_prefixes, **kwargs):
        seen.extend(completion_prefixes)
        return [float(len(completion[-1]["content"]) % 3) for completion in completions]

    with make_trainer(
        reward=[sees, "think_format"], rows=TALKS, chat_template=str(tmp_path / "thinking.jinja"), completions_steps=1
    ) as trainer:
        trainer.train()
        assert trainer.processing_class.chat_template == THINKING
        trainer.save_model(str(tmp_path / "saved"))
    assert set(seen) == {"<think>\n"}
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["chat_template"] == THINKING
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == THINKING
    table = pyarrow.parquet.read_table(run / "completions" / "step_000001.parquet").to_pylist()
    assert {row["completion_prefix"] for row in table} == {"<think>\n"}
    shown = " ".join(capsys.readouterr().out.split())
    assert "12 of 12 training prompts have begun the completion with a tag such as <think>" in shown

    (tmp_path / "prefix.py").write_text("def length(completion_prefixes):\n    return list(map(len, completion_prefixes))\n")
    assert main(["reward", f"{tmp_path}/prefix.py:length", "--data", str(run), "--json"]) == 0
    assert {row["reward"] for row in json.loads(capsys.readouterr().out)["rows"]} == {8.0}
