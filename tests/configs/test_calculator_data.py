import re

from rankup.configs.calculator import EXAMPLES, add, evaluation, train
from rankup.rewards.answers import last_integer


def terms(row: dict) -> tuple[int, int]:
    match = re.fullmatch(r"What is (\d+) \+ (\d+)\?", row["prompt"][-1]["content"])
    assert match is not None
    return int(match[1]), int(match[2])


def test_no_evaluation_sum_and_no_example_occurs_in_training_in_either_order() -> None:
    trained = {frozenset(terms(row)) for row in train()}
    held_out = {frozenset(terms(row)) for row in evaluation()}
    shown = {frozenset(pair) for pair in EXAMPLES}
    assert len(held_out) == 128 and len(trained) == len(train()) == 4096
    assert not trained & held_out and not shown & (trained | held_out)


def test_answers_are_right_and_the_reward_reads_the_last_message() -> None:
    for row in [*train()[:64], *evaluation()]:
        assert row["answer"] == str(add(*terms(row)))
        assert all(100 <= term <= 999 for term in terms(row))
    answers = [row["answer"] for row in evaluation()]
    dialogues = [
        [
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": f"It is {answer}."},
        ]
        for answer in answers
    ]
    assert last_integer(dialogues, answer=answers) == [1.0] * 128


def test_the_worked_dialogues_call_the_tool_and_use_its_result() -> None:
    messages = evaluation()[0]["prompt"]
    assert [message["role"] for message in messages] == [*["user", "assistant", "tool", "assistant"] * 2, "user"]
    for place in (0, 4):
        called = messages[place + 1]["tool_calls"][0]["function"]
        assert called["name"] == "add" and messages[place + 2]["content"] == str(add(**called["arguments"]))
        assert messages[place + 3]["content"].endswith(f"= {messages[place + 2]['content']}.")


def test_the_same_sums_can_be_asked_without_worked_dialogues() -> None:
    bare = evaluation(examples=False)
    assert [(terms(row), row["answer"]) for row in bare] == [(terms(row), row["answer"]) for row in evaluation()]
    assert all(len(row["prompt"]) == 1 for row in [*bare, *train(examples=False)])


def test_the_split_is_fixed() -> None:
    assert train() == train()
    # Results are compared across runs and releases: a change of the split must be noticed.
    assert [terms(row) for row in evaluation()[:4]] == [(221, 427), (614, 624), (762, 980), (205, 328)]
