"""Tags at the end of a prompt: built-in rewards of the form count them as part of the completion, TRL's contract stays."""

import json

import pytest
from pages import ROOT, code_blocks
from reasoning_gym.factory import create_dataset

from rankup.rewards.config import RewardsConfig
from rankup.rewards.contract import Inputs
from rankup.rewards.formats import matches, tags, think_format
from rankup.rewards.reasoning import reasoning_gym_score
from rankup.rewards.runner import Scorer

PAGE = ROOT / "docs" / "rewards.md"
COMPLETIONS = ["so</think>42", "<think>so</think>42", "42", [{"role": "assistant", "content": "so\n</think>\n42"}]]


def opened(reward, completions, prefix="<think>\n", **columns):
    return reward(completions=completions, completion_prefixes=[prefix] * len(completions), **columns)


def test_an_open_thought_counts_in_every_reward_of_the_form():
    assert opened(think_format, COMPLETIONS) == [1.0, 0.0, 0.0, 1.0]
    assert think_format(completions=COMPLETIONS) == opened(think_format, COMPLETIONS, "") == [0.0, 1.0, 0.0, 0.0]
    assert opened(tags(["think", "answer"]), ["a</think><answer>b</answer>", "a</think>b"]) == [1.0, 0.0]
    assert opened(tags(["think"], partial_credit=True), ["a</think>"]) == [1.0]
    assert opened(matches("<think>.*</think>.*"), COMPLETIONS[:3]) == [1.0, 1.0, 0.0]
    assert opened(tags(["think", "answer"]), ["b</answer>"], "<think>a</think>\n<answer>") == [1.0]


def test_a_tag_that_a_reward_does_not_know_is_left_out():
    assert opened(think_format, ["<think>a</think>b"], "<plan>\n") == [1.0]
    assert opened(tags(["answer"]), ["<answer>b</answer>"], "<plan>") == [1.0]
    assert opened(matches("a.*"), ["abc"], "<think>") == [1.0]
    without = matches(r"(?:(?!</?think>).)*</think>(?!.*</?think>).*\S.*")
    assert opened(without, COMPLETIONS[:2]) == [1.0, 0.0], "a pattern for the completion alone"


def test_an_answer_that_the_prompt_has_begun_is_read():
    entries = list(create_dataset("chain_sum", size=2, seed=7))
    columns = {
        "prompts": [entry["question"] for entry in entries],
        "answer": [entry["answer"] for entry in entries],
        "metadata": [json.dumps(entry["metadata"]) for entry in entries],
        "task": ["chain_sum"] * 2,
    }
    completions = [f"{answer}</answer> so it is" for answer in columns["answer"]]
    for reward in (reasoning_gym_score(), reasoning_gym_score("chain_sum")):
        assert opened(reward, completions, "<answer>", **columns) == [1.0, 1.0]
        assert max(reward(completions=completions, **columns)) < 1.0


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_prefixes_reach_the_functions_that_name_them_and_only_those(isolation):
    def sees(completions, completion_prefixes):
        return [float(len(prefix)) for prefix in completion_prefixes]

    def of_trl(completions, **kwargs):
        return [float("completion_prefixes" in kwargs)] * len(completions)

    config = RewardsConfig(isolation=isolation, num_workers=1, rows_per_call=1)
    inputs = Inputs(
        prompts=["p"] * 2, completions=["a</think>b"] * 2, completion_ids=[[1]] * 2, completion_prefixes=["<think>", ""]
    )
    scorer = Scorer(config, functions=[sees, of_trl, "think_format"])
    try:
        assert scorer.score(inputs).by_function == {"sees": [7.0, 0.0], "of_trl": [0.0, 0.0], "think_format": [1.0, 0.0]}
    finally:
        scorer.close()


def test_the_page_s_function_sees_the_open_thought():
    python = [block for language, block in code_blocks(PAGE.read_text()) if language == "python"]
    (code,) = [block for block in python if "completion_prefixes" in block]
    names = {}
    exec(code, names)
    texts = ["so</think>42", "word " * 60 + "</think>42"]
    inputs = Inputs(prompts=["p"] * 2, completions=texts, completion_ids=[[1]] * 2, completion_prefixes=["<think>"] * 2)
    assert Scorer(RewardsConfig(), functions=names["thinks_briefly"]).score(inputs).total == [1.0, 0.0]


def test_a_call_without_prefixes_has_empty_ones():
    def sees(completion_prefixes):
        return [1.0 if prefix == "" else 0.0 for prefix in completion_prefixes]

    inputs = Inputs(prompts=["p"] * 2, completions=["a"] * 2, completion_ids=[[1]] * 2)
    assert Scorer(RewardsConfig(), functions=sees).score(inputs).total == [1.0, 1.0]


def test_a_column_of_that_name_is_refused():
    with pytest.raises(ValueError, match="data column 'completion_prefixes' has the name of a reward function's argument"):
        Inputs(prompts=["p"], completions=["a"], completion_ids=[[1]], columns={"completion_prefixes": ["x"]})
