"""Runs whose environment owns the data: `reset` returns the prompts of rows without one, or of a run without training data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_runs import steps_of, tiny_config

from rankup import GRPOTrainer
from rankup.grpo.cli.main import main
from rankup.grpo.common.errors import TrainingStoppedError
from rankup.grpo.run.completions import read_completions

Make = Callable[..., GRPOTrainer]


class Asks:
    """Returns a task as its prompt; `got` collects what `reset` was called with."""

    got: ClassVar[list[dict[str, Any]]] = []

    def reset(self, seed: int, **row: Any) -> Any:
        Asks.got.append(row)
        return self._task(random.Random(seed).randint(0, 999))

    def _task(self, number: int) -> Any:
        return f"count to {number}"

    def get_reward(self) -> float:
        return random.random()


class AsksInMessages(Asks):
    def _task(self, number: int) -> Any:
        return [{"role": "user", "content": f"count to {number}"}]


class AsksWithItsOwnSystemPrompt(Asks):
    def _task(self, number: int) -> Any:
        return [{"role": "system", "content": "Mine."}, {"role": "user", "content": f"count to {number}"}]


class Silent:
    """Says nothing that is a prompt."""

    says: Any = None

    def reset(self, seed: int, **row: Any) -> Any:
        return self.says

    def get_reward(self) -> float:
        return 1.0


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    Asks.got = []


@pytest.fixture
def make(tiny_model_path, tmp_path: Path) -> Make:
    """A trainer of a tiny model; names of `GRPOTrainer` are its arguments, all others flat options."""

    def made(environment_factory: Any, **options: Any) -> GRPOTrainer:
        data = {name: options.pop(name) for name in ("train_dataset", "eval_dataset", "reward_funcs") if name in options}
        config = tiny_config(tmp_path / "run", **{"completions_steps": 1, **options})
        return GRPOTrainer(model=str(tiny_model_path("llama")), args=config, environment_factory=environment_factory, **data)

    return made


def prompts_of(run: Path) -> list[Any]:
    """The recorded prompts, one of each group."""
    files = sorted((run / "completions").iterdir())
    return [json.loads(row["prompt"]) for file in files for row in read_completions(file)[::4]]


def test_a_run_without_data_is_prompted_by_reset_and_every_group_has_a_task_of_its_own(make: Make, tmp_path: Path) -> None:
    trainer = make(Asks)
    assert len(trainer.setup.inputs.train_prompts.rows) == 3, "as many rows as a step has prompts"
    assert trainer.train().global_step == 2
    prompts = prompts_of(tmp_path / "run")
    assert len({prompt[-1]["content"] for prompt in prompts}) == len(prompts) == 6
    assert all([message["role"] for message in prompt] == ["user"] for prompt in prompts)
    assert all(prompt[0]["content"].startswith("count to ") for prompt in prompts)
    assert Asks.got == [{}] * 24, "no column reaches reset"
    assert steps_of(tmp_path / "run")[0]["episodes/failed"] == 0.0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (Asks, [("system", "Be brief."), ("user", "count to")]),
        (AsksInMessages, [("system", "Be brief."), ("user", "count to")]),
        (AsksWithItsOwnSystemPrompt, [("system", "Mine."), ("user", "count to")]),
    ],
)
def test_what_reset_says_takes_the_place_of_the_empty_turn(
    make: Make, tmp_path: Path, environment: type, expected: list[tuple[str, str]]
) -> None:
    make(environment, max_steps=1, system_prompt="Be brief.").train()
    for prompt in prompts_of(tmp_path / "run"):
        assert [(one["role"], one["content"][: len(text)]) for one, (_, text) in zip(prompt, expected, strict=True)] == expected


def test_rows_without_a_prompt_are_prompted_by_reset_and_the_others_keep_theirs(make: Make, tmp_path: Path) -> None:
    rows = [{"level": 0}, {"level": 1, "prompt": None}, {"level": 2, "prompt": [{"role": "user", "content": "Now "}]}]
    seen: list[str] = []

    def watches(prompts: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(prompt[-1]["content"] for prompt in prompts)
        return [random.random() for _ in prompts]

    make(Asks, train_dataset=rows, eval_dataset=rows[:1], reward_funcs=watches, max_steps=1).train()
    of_level = {row["level"]: row for row in Asks.got}
    assert of_level[0] == {"level": 0} and of_level[1] == {"level": 1}, "the empty turn is not what reset gets"
    assert of_level[2]["prompt"] == [{"role": "user", "content": "Now "}]
    assert {text.partition("count to ")[0] for text in seen} == {"", "Now "}


def test_several_environments_route_rows_that_have_nothing_else(make: Make, tmp_path: Path) -> None:
    rows = [{"environment": "a"}, {"environment": "b"}, {"environment": "a"}]
    make({"a": Asks, "b": AsksInMessages}, train_dataset=rows, max_steps=1).train()
    assert Asks.got == [{}] * 12
    assert all(prompt[-1]["content"].startswith("count to ") for prompt in prompts_of(tmp_path / "run"))


@pytest.mark.parametrize("says", [None, "", []])
def test_a_run_stops_if_nobody_returns_a_prompt(make: Make, says: Any) -> None:
    class Nothing(Silent):
        pass

    Nothing.says = says
    with pytest.raises(TrainingStoppedError, match=r"(?s)12 of 12 .* void.*there is no prompt.*Nothing says nothing"):
        make(Nothing).train()


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (Asks, {"max_steps": None, "num_train_epochs": 2}, r"optim\.max_steps must be set: .*epochs=2"),
        ({"a": Asks}, {}, "no training data, of which a column 'environment' names one"),
        (None, {"reward_funcs": lambda completions, **kwargs: [0.0] * len(completions)}, "no training data: set data.train"),
        (Asks, {"train_dataset": [{"question": "2 + 3?"}], "prompt_column": "ask"}, "no column 'ask' for the prompt"),
        (Asks, {"train_dataset": [{"prompt": 5}]}, "the prompt of row 0 is neither a text nor a conversation"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(
    make: Make, environment: Any, options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(environment, **options)


def test_a_run_file_needs_no_data_either(tiny_model_path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "world.py").write_text(
        "class Asks:\n    def reset(self, seed, **row):\n        return f'count to {seed % 1000}'\n\n"
        "    def get_reward(self):\n        return 1.0\n"
    )
    text = (
        f"model: {tiny_model_path('llama')}\nlora: {{rank: 8}}\n"
        "rollout: {engine: torch, environment: world.py:Asks, num_generations: 4, max_completion_length: 8}\n"
        "optim: {max_steps: 1, prompts_per_step: 2}\nlogging: {completions_steps: 1}\n"
    )
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "several.yaml").write_text(text.replace("world.py:Asks", "{one: 'world.py:Asks'}"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "several.yaml"]) == 1
    assert "no training data, of which a column 'environment'" in capsys.readouterr().err
    assert main(["train", "run.yaml"]) == 0
    assert all(prompt[0]["content"].startswith("count to ") for prompt in prompts_of(tmp_path / "runs" / "run"))
