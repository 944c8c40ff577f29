"""Runs of a mixture of experts on vLLM: router flips in the metrics, and what replaying the sampler's choice does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_random_model
from tiny_runs import ROWS, many_low_ids, steps_of, tiny_config

from rankup import GRPOTrainer
from rankup.grpo.update.resolve import engine_settings
from rankup.grpo.update.session import sampling_engine

pytestmark = pytest.mark.engine

MODEL = {
    **{"num_hidden_layers": 4, "head_dim": 32, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
    "norm_topk_prob": True,
}
"""More experts than `families.py` has, so that more of them score alike."""
OPTIONS = {"engine": "vllm", "max_completion_length": 32, "num_generations": 8, "prompts_per_step": 6, "targets": "attention"}
GAP = "sampling/sampling_logp_difference/mean"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("moe") / "model", "Qwen3MoeConfig", MODEL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replay_closes_the_gap_that_flips_open(engine_shelf, tmp_path: Path, model: Path, dtype: str) -> None:
    def steps(use: str, **changes: Any) -> list[dict[str, Any]]:
        config = tiny_config(tmp_path / use, dtype=dtype, routed_experts=use, **OPTIONS, **changes)
        trainer = GRPOTrainer(model=str(model), reward_funcs=many_low_ids, args=config, train_dataset=ROWS)
        trainer.train(engine=engine_shelf.get(engine_settings(config, str(model))))
        return steps_of(tmp_path / use)

    compared, replayed = steps("compare"), steps("replay")
    auto = steps("auto", max_steps=1)
    first, first_replayed = compared[0], replayed[0]
    # Both start with the same policy and seeds, so the first step has the same completions.
    assert first["reward"] == first_replayed["reward"] and first[GAP] == auto[0][GAP]
    assert auto[0]["sampling/router_flips"] == first["sampling/router_flips"]
    shares = [row["sampling/router_flips"] for row in (*compared, *replayed)]
    assert all(share < 0.01 if dtype == "float32" else 0.001 < share < 0.2 for share in shares)
    assert first_replayed[GAP] <= first[GAP]
    if dtype == "bfloat16":
        assert first_replayed[GAP] < 0.9 * first[GAP]


def test_nothing_is_asked_for_if_it_is_ignored(tmp_path: Path, model: Path) -> None:
    config = tiny_config(tmp_path / "run", routed_experts="ignore", **OPTIONS)
    assert not engine_settings(config, str(model)).returns_experts


def test_completions_of_a_function_are_not_replayed(tmp_path: Path, model: Path) -> None:
    """It failed at the first update, behind a rollout."""
    config = tiny_config(tmp_path, model=str(model), routed_experts="replay", **OPTIONS)
    with pytest.raises(ValueError, match=r"replay: completions of a rollout_func come without the experts"):
        GRPOTrainer(reward_funcs=many_low_ids, args=config, train_dataset=ROWS, rollout_func=lambda prompts, trainer: {})


def test_sampling_alone_needs_no_experts(tmp_path: Path, model: Path) -> None:
    """`rankup chat` of such a run, with the torch engine."""
    trained = tiny_config(tmp_path, model=str(model), routed_experts="replay", **OPTIONS)
    config = trained.model_copy(update={"rollout": trained.rollout.model_copy(update={"engine": "torch"})})
    with sampling_engine(config, str(model)) as engine:
        assert engine.slots
