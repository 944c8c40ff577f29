"""TRL's batch: the same values and the same refusals as TRL, and updates on the same completions as TRL's loop."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.grpo_config import GRPOConfig as TrlConfig

from rankup.grpo.config import GRPOConfig
from rankup.grpo.config.trl.batch import Batch, batch_of, effective_step

PARTS = "an update here is made on complete generations"


def of_trl(monkeypatch: pytest.MonkeyPatch, workers: int, **options: Any) -> TrlConfig | None:
    """TRL's configuration; None if it refuses the values."""
    monkeypatch.setattr(TrlConfig, "world_size", workers)
    try:
        return TrlConfig(output_dir="unused", use_cpu=True, bf16=False, **options)
    except ValueError:
        return None


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("num_generations", [2, 3, 8])
def test_the_batch_is_that_of_trl_or_refused_as_by_trl(monkeypatch: pytest.MonkeyPatch, workers: int, num_generations: int):
    accepted = 0
    for per_device, accumulation, per_generation, generation in product(
        (None, 1, 4), (None, 1, 3, 4), (None, 2, 3), (None, 8, 12)
    ):
        options: dict[str, Any] = {
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": accumulation,
            "steps_per_generation": per_generation,
            "generation_batch_size": generation,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if not options:
            continue
        options["num_generations"] = num_generations
        expected = of_trl(monkeypatch, workers, **options)
        if expected is None:
            with pytest.raises(ValueError, match=r"^(generation_batch_size|num_generations): "):
                GRPOConfig(workers=workers, **options)
            continue
        passes, accumulation = expected.steps_per_generation, expected.gradient_accumulation_steps
        assert passes and expected.generation_batch_size
        if accumulation % passes:
            with pytest.raises(ValueError, match=f"^steps_per_generation: .*{PARTS}"):
                GRPOConfig(workers=workers, **options)
            continue
        completions = expected.per_device_train_batch_size * workers * accumulation
        if completions < workers * num_generations:
            continue  # a worker without a prompt is an error of its own
        config = GRPOConfig(workers=workers, **options)
        accepted += 1
        assert config.optim.prompts_per_step * config.rollout.num_generations == completions
        assert completions % expected.generation_batch_size == 0
        assert config.algorithm.num_iterations == 1
    assert accepted >= 2


def updates_of_trl(*, passes: int, iterations: int, accumulation: int) -> list[list[tuple[int, int, int]]]:
    """Each optimizer step of TRL's loop as its passes: the generation, its part, and how many updates preceded its sampling."""
    updates, current, sampled_after = [], [], 0
    for index in range(4 * accumulation * passes * iterations):
        generation, within = divmod(index, passes * iterations)
        if within == 0:
            sampled_after = len(updates)
        current.append((generation, within % passes, sampled_after))
        if len(current) == accumulation:
            updates.append(current)
            current = []
    return updates


@settings(deadline=None, max_examples=200)
@given(passes=st.integers(1, 6), iterations=st.integers(1, 4), accumulation=st.integers(1, 12))
def test_an_accepted_batch_makes_the_updates_of_trls_loop(passes: int, iterations: int, accumulation: int):
    generations, prompts = 2, 3
    try:
        batch = batch_of(
            per_device=generations * prompts,
            accumulation=accumulation,
            per_generation=passes,
            generation=None,
            generations=generations,
            iterations=iterations,
            workers=1,
        )
    except ValueError as error:
        assert PARTS in str(error)
        batch = None
    updates = updates_of_trl(passes=passes, iterations=iterations, accumulation=accumulation)
    if batch is None:
        assert not are_steps(updates, passes)
        return
    assert are_steps(updates, passes)
    generations_of_a_step = batch.prompts_per_step // (prompts * passes)
    for number, update in enumerate(updates):
        step = number // batch.num_iterations
        expected = range(step * generations_of_a_step, (step + 1) * generations_of_a_step)
        assert {generation for generation, _, _ in update} == set(expected)


def are_steps(updates: list[list[tuple[int, int, int]]], passes: int) -> bool:
    """Whether every update passes equally often over all parts of its generations, which were sampled from one policy."""
    for update in updates:
        parts = [(generation, part) for generation, part, _ in update]
        complete = {(generation, part) for generation, _ in parts for part in range(passes)}
        is_even = len({parts.count(one) for one in complete}) == 1
        if not is_even or len({sampled_after for _, _, sampled_after in update}) > 1:
            return False
    return True


@pytest.mark.parametrize(
    ("options", "prompts", "iterations"),
    [
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 4, 1),
        ({"gradient_accumulation_steps": 4}, 4, 1),
        ({"generation_batch_size": 32, "gradient_accumulation_steps": 4}, 4, 1),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 4}, 4, 1),
        ({"gradient_accumulation_steps": 4, "num_iterations": 2}, 4, 2),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_iterations": 2}, 2, 1),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_iterations": 4}, 2, 2),
        ({"per_device_train_batch_size": 8, "workers": 2}, 2, 1),
    ],
)
def test_prompts_and_iterations_of_a_batch(options: dict[str, Any], prompts: int, iterations: int):
    config = GRPOConfig(**options)
    assert (config.optim.prompts_per_step, config.algorithm.num_iterations) == (prompts, iterations)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: must be an integer of at least 1 (got 0)"),
        ({"per_device_train_batch_size": "many"}, "per_device_train_batch_size: must be a number (got 'many')"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps: must be an integer of at least 1 (got 1.5)"),
        (
            {"per_device_train_batch_size": 4},
            "num_generations: must divide the completions of a generation, which are 4 a pass x 1 passes = 4 (got 8): "
            "change per_device_train_batch_size or gradient_accumulation_steps",
        ),
        (
            {"generation_batch_size": 12},
            "generation_batch_size: must be divisible by per_device_train_batch_size times cluster.workers, which is 8 "
            "(got 12)",
        ),
        (
            {"generation_batch_size": 16, "steps_per_generation": 2},
            "generation_batch_size: steps_per_generation is set too, and each follows from the other: keep one",
        ),
        (
            {"per_device_train_batch_size": 8, "prompts_per_step": 4},
            "per_device_train_batch_size: sets optim.prompts_per_step, which is set too; keep one of them",
        ),
        (
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
            "steps_per_generation: a generation has 4 passes, and the policy would be updated after every 2 "
            "(gradient_accumulation_steps): an update here is made on complete generations. Set gradient_accumulation_steps=4 "
            "for one update on each, and num_iterations for several",
        ),
    ],
)
def test_the_error_for_a_batch_names_the_field_and_the_fix(options: dict[str, Any], error: str):
    with pytest.raises(ValueError) as caught:
        GRPOConfig(**options)
    assert str(caught.value) == error


@given(updates=st.integers(1, 1000), iterations=st.integers(1, 8))
def test_steps_make_at_least_so_many_updates(updates: int, iterations: int):
    steps = Batch(prompts_per_step=1, num_iterations=iterations).steps(updates)
    assert updates <= steps * iterations < updates + iterations


def test_the_effective_step_is_one_line():
    assert effective_step(prompts=4, generations=8, iterations=1, max_steps=120) == (
        "a step: 4 prompts x 8 completions = 32, 1 optimizer step on them; 120 steps in all"
    )
    assert effective_step(prompts=1, generations=2, iterations=3, max_steps=10) == (
        "a step: 1 prompts x 2 completions = 2, 3 optimizer steps on them; 10 steps in all (30 optimizer steps)"
    )
