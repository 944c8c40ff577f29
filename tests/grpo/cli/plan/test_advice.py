"""The tables of practice by name, and what follows from them: ranks within their range, and reasons where RL differs."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from rankup.grpo.cli.plan.advice import PRACTICE, PRESETS, advise, lower_ranks
from rankup.grpo.config import GRPOConfig

# task: lowest and highest rank, dropout, targets
TABLE = {
    "simple": (4, 16, 0.05, "attention"),
    "chat": (16, 32, 0.05, "all-linear"),
    "domain": (32, 32, 0.1, "all-linear"),
    "code": (64, 64, 0.1, "all-linear"),
    "reasoning": (32, 64, 0.0, "all-linear"),
    "math": (64, 128, 0.0, "all-linear"),
    "rl": (64, 128, 0.0, "all-linear"),
}


def test_the_table_is_practices():
    assert {name: (row.low, row.high, row.dropout, row.targets) for name, row in PRACTICE.items()} == TABLE
    assert (PRACTICE["simple"].usual, PRACTICE["chat"].usual) == (8, 16)


def test_the_presets_are_practices():
    assert {name: (preset.rank, preset.alpha, preset.targets) for name, preset in PRESETS.items()} == {
        "memory-efficient": (8, 16.0, "attention"),
        "high-quality": (64, 128.0, "all-linear"),
        "rl": (64, 32.0, "all-linear"),
    }


@pytest.mark.parametrize("task", PRACTICE)
def test_rows_move_the_rank_within_its_range(task: str):
    low, high, *_ = TABLE[task]
    assert advise(task, rows=999)["rank"].value == low
    assert advise(task, rows=10_001)["rank"].value == high
    assert low <= advise(task)["rank"].value <= high
    assert advise(task, rows=1_000)["rank"] == advise(task, rows=10_000)["rank"] == advise(task)["rank"]


@pytest.mark.parametrize("task", PRACTICE)
@pytest.mark.parametrize("rows", [None, 500, 50_000])
def test_every_recommendation_has_a_reason_and_makes_a_configuration(task: str, rows: int | None):
    advice = advise(task, rows=rows)
    assert [name for name, choice in advice.items() if len(choice.reason) < 10] == []
    assert [name for name, choice in advice.items() if "\n" in choice.reason] == []
    lora = {name: advice[name].value for name in ("rank", "alpha", "use_rslora", "targets")}
    config = GRPOConfig(lora=lora, learning_rate=advice["learning_rate"].value)
    assert config.lora.rank == advice["rank"].value
    assert config.lora.dropout == 0


@pytest.mark.parametrize("rank", [8, 64, 128])
def test_rl_differs_from_practice_and_says_so(rank: int):
    advice = advise("rl", rank=rank)
    assert (advice["alpha"].value, advice["use_rslora"].value, advice["dropout"].value) == (32.0, False, 0.0)
    assert "not practice's r or 2r" in advice["alpha"].reason and str(2 * rank) in advice["alpha"].reason
    assert "45 times" in advice["use_rslora"].reason
    assert "no longer be the same policy" in advice["dropout"].reason


def test_other_tasks_take_practices_alpha_and_scale():
    assert (advise("chat")["alpha"].value, advise("chat")["use_rslora"].value) == (32.0, False)
    assert (advise("code")["alpha"].value, advise("code")["use_rslora"].value) == (128.0, True)
    assert "rankup trains with 0 only" in advise("code")["dropout"].reason


@pytest.mark.parametrize("task", PRACTICE)
def test_the_learning_rate_keeps_the_step_of_the_reference(task: str):
    advice = advise(task)
    rank = advice["rank"].value
    scale = advice["alpha"].value / (math.sqrt(rank) if advice["use_rslora"].value else rank)
    assert scale * rank * advice["learning_rate"].value == pytest.approx(32 * 1e-4, rel=0.03)


def test_a_preset_decides_and_options_are_stronger():
    advice = advise("chat", preset="memory-efficient")
    assert (advice["rank"].value, advice["alpha"].value, advice["targets"].value) == (8, 16.0, "attention")
    assert not advise("math", preset="high-quality")["use_rslora"].value
    advice = advise("chat", preset="high-quality", rank=4, targets=["q_proj"])
    assert (advice["rank"].value, advice["targets"].value) == (4, ["q_proj"])
    assert "below the usual 16 to 32 for chat" in advice["rank"].reason


def test_tight_memory_goes_down_the_range_then_to_sixteen():
    assert lower_ranks("math", 128) == [64, 16]
    assert lower_ranks("simple", 16) == [8, 4]
    assert "memory is tight" in advise("math", rows=50_000, tight_rank=64)["rank"].reason


def test_nothing_here_imports_torch():
    code = (
        "import sys, rankup.grpo.cli.plan.plan, rankup.grpo.cli.plan.advice; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "set()"), result.stderr
