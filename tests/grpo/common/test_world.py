"""Several workers give the update of one: real processes in a gloo group, tiny policies without an engine."""

from __future__ import annotations

from multiprocessing import forkserver, get_context
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes
from world_learners import learn, learn_in_a_group

from rankup.grpo.common.world import SINGLE_PROCESS, World

VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "a penalty": {"loss_type": "grpo", "beta": 0.1},
    "two updates of sequences": {"loss_type": "gspo", "num_iterations": 2},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    "no truncated ones": {"mask_truncated_completions": True, "loss_type": "dr_grpo"},
    "groups without variance count": {"filter_zero_variance": False},
    "8-bit state": {"optimizer": "adamw_8bit"},
    "memory runs out on one": {"fitting_tokens": 24, "num_iterations": 2, "beta": 0.1, "top_entropy_quantile": 0.5},
}
LOCAL_MEANS = {"loss_type": "bnpo"}
"""An objective that depends on how the groups are divided among the workers."""
FLOAT16 = {"dtype": "float16", "initial_loss_scale": 2.0**24}
"""A scale with which gradients overflow."""


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_all_of_it_once_and_even(count: int, size: int):
    shares = [range(count)[World(rank, size).shard(count)] for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_worker_exchanges_nothing():
    tensor = torch.ones(3)
    SINGLE_PROCESS.all_reduce_([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert SINGLE_PROCESS.is_main
    assert SINGLE_PROCESS.gather([1, 2]) == [1, 2]
    assert SINGLE_PROCESS.all_gather([1, 2]) == [[1, 2]]


@pytest.fixture(scope="module")
def outcomes(tiny_model_path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one worker comes to, and each of three."""
    model, out = str(tiny_model_path("llama")), tmp_path_factory.mktemp("world")
    variants = VARIANTS | {"local means": LOCAL_MEANS, "float16": FLOAT16}
    arguments = (3, f"file://{out / 'rendezvous'}", model, variants, str(out))
    # One process imports what they need, and becomes all three: the imports take longer than everything else.
    get_context("forkserver").set_forkserver_preload(["rankup.grpo.update.learner"])
    start_processes(learn_in_a_group, arguments, nprocs=3, start_method="forkserver")
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # otherwise it stays until the end of all tests
    return [learn(model, VARIANTS, SINGLE_PROCESS), *(torch.load(out / f"{rank}.pt") for rank in range(3))]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_three_workers_equal_one(outcomes: list[dict[str, Any]], name: str):
    (masters, metrics), *workers = [outcome[name] for outcome in outcomes]
    first_masters, first_metrics = workers[0]
    for other_masters, other_metrics in workers[1:]:
        assert torch.equal(first_masters, other_masters), "the adapters of all workers are bit-exact copies"
        assert first_metrics == other_metrics
    assert ((first_masters - masters).norm() / masters.norm()).item() < 1e-5
    for alone, shared in zip(metrics, first_metrics, strict=True):
        # Packs are local to a worker.
        names = [metric for metric in alone if metric == "packing/completion_tokens" or not metric.startswith("packing/")]
        assert {metric: shared[metric] for metric in names} == pytest.approx(
            {metric: alone[metric] for metric in names}, rel=1e-4, abs=1e-6
        )


@pytest.mark.slow
def test_all_workers_halve_the_loss_scale_together(outcomes: list[dict[str, Any]], tiny_model_path):
    alone, _ = learn(str(tiny_model_path("llama")), {"fp32": {}}, SINGLE_PROCESS)["fp32"]
    (masters, metrics), *others = [outcome["float16"] for outcome in outcomes[1:]]
    assert metrics[0]["loss_scale/overflows"] > 0 and metrics[0]["updates"] == 1.0
    for other_masters, other_metrics in others:
        assert torch.equal(masters, other_masters) and metrics == other_metrics
    assert ((alone - masters).norm() / masters.norm()).item() < 0.05


@pytest.mark.slow
def test_the_loss_of_bnpo_is_the_mean_over_workers_of_their_local_means(outcomes: list[dict[str, Any]], tiny_model_path):
    """As in TRL, where DDP averages the gradients of losses that each device divides by its own tokens."""
    model = str(tiny_model_path("llama"))
    local = [learn(model, {"bnpo": LOCAL_MEANS}, SINGLE_PROCESS, shard_of=World(rank, 3))["bnpo"] for rank in range(3)]
    expected = sum(metrics[0]["loss"] for _, metrics in local) / 3
    _, (first, *_) = outcomes[1]["local means"]
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    _, (token_mean, *_) = outcomes[1]["dapo"]
    assert first["loss"] != pytest.approx(token_mean["loss"], rel=1e-2), "it is not the mean over all tokens"
