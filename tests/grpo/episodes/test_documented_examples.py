"""The examples of docs/episodes.md work, and its tables name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pages import ROOT, code_blocks

from rankup.grpo.data.hermes import HEADING, HOW_TO_CALL
from rankup.grpo.data.prompts import Prompt
from rankup.grpo.episodes.calls import Caller
from rankup.grpo.episodes.environments import Environments
from rankup.grpo.episodes.rollout_func import UserRollouts
from rankup.grpo.episodes.tools import make_tool
from rankup.grpo.experience.episode_metrics import ERRORS, episode_metrics
from rankup.grpo.run.completions import write_completions
from rankup.rollout.config import RolloutConfig

PAGE = (ROOT / "docs" / "episodes.md").read_text()


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """What the Python examples define, without those that need a server or another package."""
    names: dict[str, Any] = {"__name__": "examples"}
    for language, code in code_blocks(PAGE):
        if language == "python" and "environment_factory =" not in code:
            exec(code, names)
    return names


def test_the_tools_are_ones_that_the_model_can_call(examples: dict[str, Any]) -> None:
    assert make_tool(examples["add"]).problem({"a": 1, "b": 2}) is None
    assert make_tool(examples["read_page"]).problem({"page": 3}) is None
    assert examples["read"](page=3) == {"title": "GRPO", "fields": {"page": 3}}


def test_the_game_is_won_by_halving_the_range(examples: dict[str, Any]) -> None:
    caller = Caller(timeout=5)
    environments = Environments(examples["Guess"], caller)
    assert environments.responds and environments.reward_names == ("Guess",)
    for seed in range(16):
        world = environments.acquire(None)
        game: Any = world.instance
        assert isinstance(caller.call(world.reset, world.reset_arguments({"prompt": []}, seed)).result().value, str)
        low, high = 1, 16
        while not world.is_done():
            guess = (low + high) // 2
            low, high = (guess + 1, high) if game.respond(str(guess)) == "higher" else (low, guess - 1)
        assert game.get_reward() == 1.0
        assert game.respond("twelve") == "Write a number."
        environments.release(world, reuse=True)


def test_the_reward_functions_score_episodes(examples: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    given, answer = {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}
    completions = [[asked, given, answer], [answer], [asked, given, asked, given]]
    assert examples["calls_once"](completions=completions) == [1.0, 0.0, 0.0]
    worlds = [SimpleNamespace(is_found=True, tries=2), SimpleNamespace(is_found=False, tries=5)]
    assert examples["found_quickly"](completions=completions[:2], environments=worlds) == [0.8, -0.5]


def test_the_sampling_loop_returns_what_a_run_takes(examples: dict[str, Any]) -> None:
    one = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "logprobs": [-0.5, -0.1], "text": "two words"}
    trainer = SimpleNamespace(generate_rollout_completions=lambda prompts: [one for _ in prompts])
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: "two words", eos_token_id=4)
    rollouts = UserRollouts(lambda prompts: examples["rollout"](prompts, trainer), tokenizer, vocab_size=10, max_length=100)
    engine: Any = SimpleNamespace(policy_version=0)
    (group,) = rollouts.play(engine, [Prompt("?", (1, 2), {})], RolloutConfig(num_generations=2))
    assert [completion.logprobs for completion in group.completions] == [(-0.5, -0.1)] * 2
    assert group.columns == {"num_words": [2, 2]}


def test_the_sampled_tokens_of_a_completions_file(examples: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    table = {"prompt": ["?"], "completion_ids": [[5, 6, 7, 8, 9]], "sampled_spans": [[[0, 2], [4, 5]]]}
    write_completions(path, 1, table)
    assert examples["sampled_tokens"](path) == [[[5, 6], [9]]]


def test_the_block_of_tools_is_the_one_that_is_written() -> None:
    (block,) = [code for language, code in code_blocks(PAGE) if language == "text"]
    assert block.startswith(f"{HEADING}\n<tools>\n") and block.endswith(f"</tools>\n\n{HOW_TO_CALL}\n")


def test_the_options_and_metrics_exist() -> None:
    options = set(re.findall(r"`rollout\.(\w+)[`:]", PAGE))
    assert len(options) >= 8 and options <= set(RolloutConfig.model_fields)
    named = set(re.findall(r"`((?:tools|episodes)/\w+)`", PAGE))
    source = (ROOT / "grpo" / "experience" / "episode_metrics.py").read_text()
    assert set(ERRORS) <= named == set(re.findall(r'"((?:tools|episodes)/\w+)":', source))
    assert episode_metrics([]) == {}
