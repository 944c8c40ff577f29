"""Two whole trainers, each with its own vLLM, make the run of one: real processes in a gloo group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peer_trainers import train_in_a_group
from safetensors.torch import load_file
from tiny_runs import steps_of
from torch.multiprocessing.spawn import spawn

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OPTIONS: dict[str, Any] = {"max_steps": 5, "eval_steps": 2, "save_steps": 3, "prompts_per_step": 3, "scale_rewards": "batch"}


@pytest.fixture(scope="module")
def runs(engine_shelf, tiny_model_path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one` and `two`, of so many workers; and `again`, of two, made longer from its checkpoint after three steps."""
    engine_shelf.close()  # these processes start engines of their own
    folder, model = tmp_path_factory.mktemp("peers"), str(tiny_model_path("llama"))

    def train(name: str, size: int, *, resume: bool = False, **changes: Any) -> None:
        rendezvous = f"file://{folder / f'{name}.{resume}'}"
        arguments = (size, rendezvous, model, str(folder / name), OPTIONS | changes, resume)
        spawn(train_in_a_group, arguments, nprocs=size)

    train("one", 1)
    train("two", 2)
    train("again", 2, max_steps=3)
    train("again", 2, resume=True)
    return folder


def adapter_of(run: Path) -> dict:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_two_workers_come_to_the_adapter_of_one(runs: Path):
    one, two = adapter_of(runs / "one"), adapter_of(runs / "two")
    difference = sum(((one[name] - two[name]) ** 2).sum().item() for name in one) ** 0.5
    assert difference / sum((one[name] ** 2).sum().item() for name in one) ** 0.5 < 1e-5


def test_their_metrics_are_those_of_the_whole_batch(runs: Path):
    names = ("loss", "reward", "reward_std", "grad_norm", "entropy", "completions/mean_length", "num_tokens", "targets")
    for one, two in zip(steps_of(runs / "one"), steps_of(runs / "two"), strict=True):
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4, abs=1e-6)
        assert two["workers/0/tokens_per_second"] > 0 and two["workers/1/tokens_per_second"] > 0
    evaluations = [json.loads((runs / name / "summary.json").read_text())["evaluation"] for name in ("one", "two")]
    assert evaluations[0]["after"]["reward"] == pytest.approx(evaluations[1]["after"]["reward"])


def test_a_shared_run_goes_on_where_it_was(runs: Path):
    two, again = adapter_of(runs / "two"), adapter_of(runs / "again")
    assert all(two[name].equal(again[name]) for name in two)
