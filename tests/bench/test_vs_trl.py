"""The command line and the reward of `scripts/bench/vs_trl.py`. The comparison is run by hand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "bench"
Score = Callable[..., list[float]]


@pytest.fixture(scope="module")
def score() -> Score:
    """The reward function of the benchmark, whose module imports its neighbours, as in a script."""
    spec = importlib.util.spec_from_file_location("vs_trl", FOLDER / "vs_trl.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        spec.loader.exec_module(module)
    return module.score_by_hash


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_shows_examples():
    result = run("vs_trl.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "examples:" in result.stdout and "--repeats" in result.stdout and "--json" in result.stdout


def test_help_needs_no_heavy_package():
    code = "import sys, vs_trl; print(sorted({'torch', 'transformers', 'trl', 'vllm', 'rankup'} & set(sys.modules)))"
    result = run("-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--repeats", "many"], ["--tokens", "8"]])
def test_wrong_arguments_are_an_error_before_anything_starts(arguments: list[str]):
    result = run("vs_trl.py", *arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr.splitlines()[-1]


completions = st.lists(st.integers(0, 49_151), min_size=1, max_size=32)


@given(st.lists(completions, min_size=2, max_size=8, unique_by=tuple))
def test_reward_varies_within_any_group_of_distinct_completions(score: Score, group: Sequence[list[int]]):
    rewards = score(prompts=["p"] * len(group), completions=["c"] * len(group), completion_ids=group)
    assert len(set(rewards)) == len(group)
    assert all(0.0 <= reward < 1.0 for reward in rewards)


@given(completions)
def test_reward_depends_only_on_the_tokens(score: Score, ids: list[int]):
    once, again = score(completion_ids=[ids, list(ids)], trainer_state=object())
    assert once == again
    assert score(completion_ids=[tuple(ids)]) == [once]


def test_reward_distinguishes_tokens_with_the_same_digits(score: Score):
    assert len(set(score(completion_ids=[[1, 23], [12, 3], [123], [1, 2, 3]]))) == 4
