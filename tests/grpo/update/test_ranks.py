"""What a run says about rank, scale and learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.config import GRPOConfig, LoraConfig, OptimConfig, load_config
from rankup.grpo.update.ranks import describe, equivalent_rate, rate_factor, step_factor

CONFIGS = Path(__file__).resolve().parents[3] / "configs"

# Scales at rank 128, and the step relative to that of alpha 32 at the same learning rate.
AT_RANK_128 = [
    ({"alpha": 32}, 0.25, 1.0),
    ({"alpha": 128}, 1.0, 4.0),
    ({"alpha": 256}, 2.0, 8.0),
    ({"alpha": 32, "use_rslora": True}, 2.83, 11.3),
    ({"alpha": 128, "use_rslora": True}, 11.3, 45.3),
]


@pytest.mark.parametrize(("lora", "scale", "factor"), AT_RANK_128)
def test_steps_at_rank_128(lora: dict[str, Any], scale: float, factor: float) -> None:
    section = LoraConfig(rank=128, **lora)
    assert section.scaling == pytest.approx(scale, rel=2e-3)
    assert step_factor(section, OptimConfig(learning_rate=1e-4)) == pytest.approx(factor, rel=2e-3)
    assert equivalent_rate(section, OptimConfig(learning_rate=1e-4)) == pytest.approx(1e-4 / factor, rel=2e-3)
    assert step_factor(section, OptimConfig(learning_rate=1e-4, rescale_learning_rate=True)) == pytest.approx(1.0)


@settings(deadline=None)
@given(rank=st.integers(1, 128), rate=st.floats(1e-6, 1e-2), ratio=st.floats(0.1, 16))
def test_at_a_fixed_alpha_the_step_does_not_depend_on_the_rank(rank: int, rate: float, ratio: float) -> None:
    optim = OptimConfig(learning_rate=rate, lora_plus_ratio=ratio)
    assert step_factor(LoraConfig(rank=rank, alpha=32), optim) == pytest.approx(ratio * rate / 1e-4)


@settings(deadline=None)
@given(rank=st.integers(1, 128), alpha=st.floats(1, 512), rslora=st.booleans())
def test_the_equivalent_rate_makes_the_same_step(rank: int, alpha: float, rslora: bool) -> None:
    lora = LoraConfig(rank=rank, alpha=alpha, use_rslora=rslora)
    rate = equivalent_rate(lora, OptimConfig(learning_rate=2e-4))
    assert step_factor(lora, OptimConfig(learning_rate=rate)) == pytest.approx(2.0)
    factor = rate_factor(
        "b", scaling=lora.scaling, rank=rank, optim=OptimConfig(learning_rate=2e-4, rescale_learning_rate=True)
    )
    assert factor * 2e-4 == pytest.approx(rate)


# ---------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_the_configurations_that_come_along_are_near_the_reference(name: str) -> None:
    assert len(describe(load_config(CONFIGS / name))) == 1


def test_the_quick_start() -> None:
    (line,) = describe(load_config(CONFIGS / "quickstart.yaml"))
    assert line == (
        "adapter: rank 64, scale 0.5 (alpha/rank, alpha 32), learning rate 0.0002: 2 times the reference step "
        "(alpha 32, 1e-4)"
    )


def test_a_large_step_is_reported_with_a_remedy() -> None:
    line, warning = describe(GRPOConfig(rank=128, alpha=128, use_rslora=True, learning_rate=1e-4))
    assert line.startswith("adapter: rank 128, scale 11.3 (alpha/sqrt(rank), alpha 128), learning rate 0.0001: 45.3 times")
    assert "far above" in warning and "45.3 times the reference" in warning
    assert "optim.learning_rate=2.2e-06" in warning and "optim.rescale_learning_rate=true" in warning


def test_a_high_rate_at_alpha_32_is_not_a_matter_of_scale() -> None:
    _, warning = describe(GRPOConfig(alpha=32, learning_rate=1e-3))
    assert "far above" in warning and "optim.learning_rate=0.0001" in warning and "rescale" not in warning


def test_a_tiny_step_is_reported_too() -> None:
    _, warning = describe(GRPOConfig(alpha=1, learning_rate=1e-6))
    assert "far below" in warning and "rescale_learning_rate" in warning
    assert "optim.learning_rate=0.0032 gives the reference step" in warning
    assert "3.2e-05 the step that 1e-06 has at alpha 32" in warning


@pytest.mark.parametrize("rate", [5e-6, 1e-5, 1e-4, 2e-4, 4e-4])
def test_rates_that_rl_runs_use_are_not_warned_of(rate: float) -> None:
    assert len(describe(GRPOConfig(learning_rate=rate))) == 1


@pytest.mark.parametrize("lora", [lora for lora, _, _ in AT_RANK_128])
def test_a_rescaled_rate_is_near(lora: dict[str, Any]) -> None:
    assert len(describe(GRPOConfig(rank=128, rescale_learning_rate=True, **lora))) == 1


def test_lora_plus_counts() -> None:
    assert "far above" in describe(GRPOConfig(lora_plus_ratio=16))[1]


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 8}}])
def test_patterns_are_pointed_out(pattern: dict[str, Any]) -> None:
    (line,) = describe(GRPOConfig(**pattern))
    assert line.endswith("; layers in rank_pattern or alpha_pattern have their own")
