import json

import cloudpickle
import pytest
from reasoning_gym.factory import create_dataset

from rankup.rewards.reasoning import reasoning_gym_score


def columns_of(task, size=4, **options):
    """Columns as `reasoning_gym:<task>` gives them."""
    entries = list(create_dataset(task, size=size, seed=7, **options))
    return {
        "prompts": [entry["question"] for entry in entries],
        "answer": [entry["answer"] for entry in entries],
        "metadata": [json.dumps(entry["metadata"], default=str) for entry in entries],
        "task": [task] * size,
    }


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "prime_factorization", "futoshiki", "rearc"])
def test_the_answers_of_the_task_score_fully(task):
    columns = columns_of(task)
    tagged = [f"<answer>1</answer> no: <answer>\n{answer}\n</answer> so it is" for answer in columns["answer"]]
    for reward in (reasoning_gym_score(), reasoning_gym_score(task)):
        assert reward(completions=columns["answer"], **columns) == [1.0] * 4
        assert reward(completions=tagged, **columns) == [1.0] * 4
        assert max(reward(completions=["<answer>-</answer>"] * 4, **columns)) <= 0.05  # pyright: ignore[reportArgumentType]


def test_another_right_answer_scores_fully():
    columns = columns_of("countdown")
    other = [f"(({answer}))" for answer in columns["answer"]]
    assert other != columns["answer"]
    assert reasoning_gym_score()(completions=other, **columns) == [1.0] * 4


def test_a_task_that_has_a_scorer_but_no_answers():
    columns = columns_of("graph_color")
    assert columns["answer"] == [None] * 4
    colorings = [json.dumps(json.loads(metadata)["possible_answer"]) for metadata in columns["metadata"]]
    assert reasoning_gym_score()(completions=colorings, **columns) == [1.0] * 4
    scores = reasoning_gym_score()(completions=["{}", "red", "", "[1]"], **columns)
    assert max(scores) < 0.05  # pyright: ignore[reportArgumentType]


def test_part_of_the_credit():
    columns = columns_of("prime_factorization", size=1, min_value=12, max_value=12)
    completions = {"2 × 2 × 3": 1.0, "4 × 3": 0.5, "2 × 3": 0.01, "none": 0.0}
    for completion, score in completions.items():
        assert reasoning_gym_score()(completions=[completion], **columns) == [score]


def test_rows_of_several_tasks_and_rows_of_none():
    first, second = columns_of("chain_sum", size=1), columns_of("spell_backward", size=1)
    columns = {name: [*first[name], *second[name], "x"] for name in first}
    columns["metadata"][2] = None
    completions = [[{"role": "assistant", "content": f"<answer>{answer}</answer>"}] for answer in columns["answer"]]
    columns["prompts"] = [[{"role": "user", "content": prompt}] for prompt in columns["prompts"]]
    assert reasoning_gym_score()(completions=completions, **columns) == [1.0, 1.0, None]


def test_a_scorer_that_fails_on_a_completion_is_logged():
    columns = columns_of("prime_factorization")
    logged = []
    completions = ["no number", columns["answer"][1], "2 × x", columns["answer"][3]]
    reward = reasoning_gym_score()
    scores = reward(completions=completions, **columns, log_metric=lambda name, value: logged.append((name, value)))
    assert scores == [0.0, 1.0, 0.0, 1.0]
    assert logged == [("reasoning_gym/scorer_failed", 0.5)]


def test_a_task_whose_scorer_needs_its_options():
    columns = columns_of("decimal_arithmetic", size=1, max_num_decimal_places=6)
    columns["answer"] = ["1.000001"]
    for places, score in ((6, 0.0), (3, 1.0)):
        reward = reasoning_gym_score("decimal_arithmetic", options={"max_num_decimal_places": places})
        assert reward(completions=["1.0001"], **columns) == [score]


def test_it_can_be_pickled_and_has_the_factorys_name():
    columns = columns_of("chain_sum")
    for reward in (reasoning_gym_score(), reasoning_gym_score("chain_sum")):
        copy = cloudpickle.loads(cloudpickle.dumps(reward))
        assert copy.__name__ == "reasoning_gym_score"
        assert copy(completions=columns["answer"], **columns) == [1.0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chain_sums"}, "no task 'chain_sums': did you mean chain_sum"),
        ({"task": "chain_sum", "options": {"min_term": 2}}, "reasoning_gym:chain_sum refuses its options: .*min_term"),
        ({"task": "chain_sum", "options": {"min_terms": 0}}, "reasoning_gym:chain_sum refuses its options"),
        ({"options": {"min_terms": 2}}, "options only together with a task"),
    ],
)
def test_invalid_arguments_of_the_factory(arguments, message):
    with pytest.raises(ValueError, match=message):
        reasoning_gym_score(**arguments)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "the metadata of row 1 is not JSON"),
        ("[1]", "the metadata of row 1 is a list"),
    ],
)
def test_invalid_metadata(metadata, message):
    columns = columns_of("countdown")
    columns["metadata"][1] = metadata
    with pytest.raises(ValueError, match=message):
        reasoning_gym_score()(completions=columns["answer"], **columns)


def test_a_scorer_that_fails_on_the_row_s_correct_answer():
    columns = columns_of("tower_of_hanoi")
    columns["metadata"][1] = "{}"
    with pytest.raises(ValueError, match=r"the scorer of row 1 \(tower_of_hanoi\) fails on the row's correct answer: KeyError"):
        reasoning_gym_score()(completions=columns["answer"], **columns)


def test_a_row_of_an_unknown_task():
    columns = columns_of("chain_sum")
    columns["task"][2] = "chain_sums"
    with pytest.raises(ValueError, match="no task 'chain_sums'"):
        reasoning_gym_score()(completions=columns["answer"], **columns)
