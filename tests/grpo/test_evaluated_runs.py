"""Runs of a tiny model with two reward functions, two evaluation sets and streams: what they say about each."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from resumed import FaultError
from tiny_runs import ROWS, metrics_of, steps_of, timeless, tiny_config

from rankup import GRPOTrainer
from rankup.grpo.run.evaluation_files import own_files, read_evaluation

FUNCTIONS = ("low_ids", "even_ids")
SETS = ("easy", "hard")
FAILS_AT: int | None = None
"""The step in which the first function fails."""


def low_ids(completion_ids: list, trainer_state: Any, **kwargs: Any) -> list[float]:
    """The share of token ids in the lower half of the vocabulary."""
    if trainer_state.global_step == FAILS_AT and len(completion_ids) > 1:
        raise FaultError
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


def even_ids(completion_ids: list, target: list, **kwargs: Any) -> list[float | None]:
    """The share of even token ids; it does not apply to odd targets."""
    shares = [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
    return [share if n % 2 == 0 else None for n, share in zip(target, shares, strict=True)]


def silent(completions: list, **kwargs: Any) -> list[None]:
    """It never applies."""
    return [None] * len(completions)


@pytest.fixture
def make(tiny_model_path, tmp_path: Path):
    """A trainer with two functions, an infinite training set, and two evaluation sets of three and two prompts."""

    def trainer(output_dir: str = "run", **changes: Any) -> GRPOTrainer:
        by_name = {"easy": ROWS[:3], "hard": datasets.IterableDataset.from_generator(lambda: iter(ROWS[3:5]))}
        return GRPOTrainer(
            model=str(tiny_model_path("llama")),
            reward_funcs=changes.pop("reward_funcs", [low_ids, even_ids]),
            eval_reward_funcs=changes.pop("eval_reward_funcs", None),
            args=tiny_config(tmp_path / output_dir, max_steps=4, eval_steps=2, save_steps=1, **changes),
            train_dataset=({"prompt": f"count to {n}", "target": n} for n in itertools.count()),
            eval_dataset=by_name,
        )

    return trainer


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_of(run) if "eval_reward" in row]


def test_a_run_reports_every_function_and_every_set(make, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = make()
    trainer.train()
    summary = trainer.summary
    rows = evaluations_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4]
    names = ["reward", "reward_low", "reward_high", *(f"rewards/{function}/mean" for function in FUNCTIONS)]
    means = [f"{prefix}{name}" for prefix in ("eval_", "eval_easy_", "eval_hard_") for name in names]
    others = ["eval_completions/mean_length", "eval_completions/clipped_ratio", "eval_runtime", "eval_samples_per_second"]
    for row in rows:
        assert set(row) == {"step", *means, *others}
        assert row["eval_reward"] == pytest.approx((3 * row["eval_easy_reward"] + 2 * row["eval_hard_reward"]) / 5)
        assert row["eval_samples_per_second"] == pytest.approx(5 / row["eval_runtime"])
        # Of the targets 0 to 4, three are even: two easy ones and a hard one.
        even = 2 * row["eval_easy_rewards/even_ids/mean"] + row["eval_hard_rewards/even_ids/mean"]
        assert row["eval_rewards/even_ids/mean"] == pytest.approx(even / 3)

    logged = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [{name: value for name, value in entry.items() if name != "epoch"} for entry in logged] == rows

    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    for when, row in (("before", rows[0]), ("after", rows[-1])):
        assert summary["evaluation"][when] == {
            "reward": row["eval_reward"],
            "rewards": {function: row[f"eval_rewards/{function}/mean"] for function in FUNCTIONS},
            "sets": {
                name: {
                    "reward": row[f"eval_{name}_reward"],
                    "rewards": {function: row[f"eval_{name}_rewards/{function}/mean"] for function in FUNCTIONS},
                }
                for name in SETS
            },
        }
    assert_lines_name_each(rows[1], capsys.readouterr().out)


def assert_lines_name_each(row: dict[str, Any], output: str) -> None:
    """The lines of the evaluation after two steps, and of the end."""
    interval = f" [{row['eval_reward_low']:.3f}, {row['eval_reward_high']:.3f}]"
    of_each = [
        f"{row[f'{prefix}reward']:.3f}{interval if prefix == 'eval_' else ''} "
        f"(low_ids {row[f'{prefix}rewards/low_ids/mean']:.3f}, even_ids {row[f'{prefix}rewards/even_ids/mean']:.3f})"
        for prefix in ("eval_", "eval_easy_", "eval_hard_")
    ]
    line = f"evaluation at step 2: reward {of_each[0]}; easy {of_each[1]}; hard {of_each[2]}"
    assert line in output.splitlines()
    (end,) = [line for line in output.splitlines() if line.startswith("done: 4 steps")]
    assert all(f"{name} " in end for name in (*FUNCTIONS, *SETS)) and end.count("→") == 5
    assert "reading at most 12 rows of the training data, which has no length" in output


def test_an_infinite_training_set_gives_every_prompt_once(make, tmp_path: Path):
    trainer = make()
    trainer.train()
    seen = [row for step in range(4) for row in trainer.setup.sampler.batch(step)]
    assert sorted(row.columns["target"] for row in seen) == list(range(12))
    assert len(steps_of(tmp_path / "run")) == 4 and trainer.state.epoch == 1.0


def test_a_resumed_run_has_the_evaluations_of_an_uninterrupted_one(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make("one")
    trainer.train()
    summary = trainer.summary
    monkeypatch.setitem(globals(), "FAILS_AT", 3)
    with pytest.raises(RuntimeError, match="low_ids"):
        make("two").train()
    monkeypatch.setitem(globals(), "FAILS_AT", None)
    trainer = make("two")
    trainer.train(resume_from_checkpoint=True)
    resumed = trainer.summary
    assert resumed["evaluation"] == summary["evaluation"] and resumed["evaluation"]["before"]["sets"]["easy"]["reward"] > 0
    assert timeless(tmp_path / "two") == timeless(tmp_path / "one")


def test_more_steps_need_more_rows_of_a_stream_so_a_resumed_run_refuses_them(make, tmp_path: Path):
    make().train()
    trainer = make()
    longer = trainer.args.model_copy(update={"optim": trainer.args.optim.model_copy(update={"max_steps": 6})})
    rows = ({"prompt": f"count to {n}", "target": n} for n in itertools.count())
    again = GRPOTrainer(args=longer, reward_funcs=[low_ids, even_ids], train_dataset=rows, eval_dataset={"easy": ROWS[:3]})
    with pytest.raises(ValueError, match=r"training data\.rows: 12 in the checkpoint, 18 now") as caught:
        again.train(resume_from_checkpoint=True)
    assert "evaluation data.hard.rows: 2 in the checkpoint, not set now" in str(caught.value)


def test_callbacks_see_the_metrics_of_an_evaluation(make):
    seen = []

    class OnEvaluate(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, *, metrics, **kwargs):
            seen.append(metrics)

    trainer = make()
    trainer.add_callback(OnEvaluate)
    trainer.train()
    assert len(seen) == 3 and seen[0]["eval_hard_rewards/even_ids/mean"] > 0 and seen[0]["epoch"] == 0


def test_no_reward_at_all_is_null_in_the_files(make, tmp_path: Path):
    trainer = make(reward_funcs=[silent])
    trainer.train()
    summary = trainer.summary
    for row in evaluations_of(tmp_path / "run"):
        assert row["eval_reward"] is row["eval_rewards/silent/mean"] is row["eval_easy_reward"] is None
        assert math.isfinite(row["eval_completions/mean_length"])
    assert summary["evaluation"]["after"]["rewards"] == {"silent": None}
    text = (tmp_path / "run" / "metrics.jsonl").read_text() + (tmp_path / "run" / "summary.json").read_text()
    assert "NaN" not in text


def test_a_set_has_its_own_functions(make, tmp_path: Path):
    """`even_ids` scores the set `hard` alone, `low_ids` everything else; both count in the mean over all prompts."""
    trainer = make(reward_funcs=[low_ids], eval_reward_funcs={"hard": [even_ids]}, eval_samples=2)
    trainer.train()
    for row in evaluations_of(tmp_path / "run"):
        names = {name for name in row if name.endswith("/mean")}
        of_sets = {"eval_easy_rewards/low_ids/mean", "eval_hard_rewards/even_ids/mean"}
        assert names == of_sets | {"eval_rewards/low_ids/mean", "eval_rewards/even_ids/mean"}
        assert row["eval_hard_reward"] == row["eval_rewards/even_ids/mean"]
        assert row["eval_easy_reward"] == row["eval_rewards/low_ids/mean"]
    last = read_evaluation(own_files(tmp_path / "run")[-1])
    scored = {(one.eval_set, name) for one in last.prompts for name, of in one.functions.items() if any(of)}
    assert scored == {("easy", "low_ids"), ("hard", "even_ids")}
    assert trainer.setup.fingerprint["reward functions of sets"] == {"hard": ["even_ids"]}
    with pytest.raises(ValueError, match=r"evaluation set 'middle': there is no such set \(there is easy, hard\)"):
        make(eval_reward_funcs={"middle": low_ids})
    with pytest.raises(ValueError, match="eval_reward_funcs: 'hard' has no functions"):
        make(eval_reward_funcs={"hard": []})


def test_a_trainer_without_training_data_evaluates_and_does_not_train(tiny_model_path, tmp_path: Path):
    model, config = str(tiny_model_path("llama")), tiny_config(tmp_path / "run")
    trainer = GRPOTrainer(model=model, reward_funcs=low_ids, args=config, eval_dataset=ROWS[:3])
    assert 0 < trainer.evaluate(output_file=tmp_path / "results.json")["eval_reward"] < 1
    assert len(read_evaluation(tmp_path / "results.json").prompts) == 3
    with pytest.raises(ValueError, match=r"no training data: set data\.train"):
        trainer.train()
    assert not (tmp_path / "run").exists()
    only_sets = GRPOTrainer(model=model, args=config, eval_dataset={"a": ROWS[:2]}, eval_reward_funcs={"a": low_ids})
    assert only_sets.evaluate()["eval_a_reward"] > 0
    with pytest.raises(ValueError, match="the evaluation set 'b' has no reward functions"):
        only_sets.evaluate({"b": ROWS[:2]})
