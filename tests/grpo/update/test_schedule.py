"""The schedules: those of transformers after the warm-up, and the parameters that each of them takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from rankup.grpo.config import GRPOConfig, OptimConfig
from rankup.grpo.config.optim import SCHEDULES
from rankup.grpo.update.schedule import learning_rate

CASES: list[tuple[str, dict[str, Any]]] = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-5, "num_cycles": 1.0}),
    ("polynomial", {}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 50}),
    ("warmup_stable_decay", {"num_decay_steps": 6}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "1-sqrt", "min_lr_ratio": 0.2}),
]


def rates_of_transformers(kind: str, kwargs: dict[str, Any], *, warmup: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    scheduler = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=kwargs
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_every_schedule_is_compared():
    assert {kind for kind, _ in CASES} == set(SCHEDULES)


@pytest.mark.parametrize(("kind", "kwargs"), CASES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_a_schedule_is_that_of_transformers_after_the_warmup(kind: Any, kwargs: dict[str, Any], warmup: int):
    optim = OptimConfig(
        learning_rate=1e-4, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, max_steps=20, warmup_steps=warmup
    )
    ours = [learning_rate(optim, step) for step in range(20)]
    assert ours[:warmup] == pytest.approx([1e-4 * (step + 1) / 4 for step in range(warmup)])
    assert ours[warmup:] == pytest.approx(rates_of_transformers(kind, kwargs, warmup=warmup, steps=20)[warmup:])


@pytest.mark.parametrize(("ratio", "max_steps", "steps"), [(0.1, 100, 10), (0.1, 101, 11), (0.9, 1, 0), (0.0, 5, 0)])
def test_a_warmup_ratio_is_a_share_of_the_run_rounded_up(ratio: float, max_steps: int, steps: int):
    assert OptimConfig(warmup_ratio=ratio, max_steps=max_steps).num_warmup_steps == steps


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr_scheduler_kwargs": {"num_cycles": 1}}, "optim.lr_scheduler_kwargs: constant has no parameters (got num_cycles)"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"power": 1}},
            "optim.lr_scheduler_kwargs: cosine has num_cycles (got power)",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "many"}},
            "optim.lr_scheduler_kwargs: num_cycles must be a number of at least 0 (got 'many')",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "optim.lr_scheduler_kwargs: cosine_with_min_lr needs one of min_lr and min_lr_rate",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay_type": "cubic"}},
            "optim.lr_scheduler_kwargs: decay_type must be linear, cosine, 1-sqrt (got 'cubic')",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "optim.lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "optim.warmup_ratio: optim.warmup_steps is set too: keep one of them"),
    ],
)
def test_parameters_that_a_schedule_does_not_have_are_errors(options: dict[str, Any], error: str):
    with pytest.raises(ValueError) as caught:
        GRPOConfig(**options)
    assert str(caught.value) == error
