import re

from rankup.configs.quickstart import evaluation, train
from rankup.rewards.answers import last_integer


def terms(row):
    (message,) = row["prompt"]
    match = re.fullmatch(r"What is (\d+) \+ (\d+)\?", message["content"])
    assert message["role"] == "user"
    assert match is not None
    return int(match[1]), int(match[2])


def test_no_evaluation_sum_occurs_in_training_in_either_order():
    trained = {terms(row) for row in train()}
    held_out = [terms(row) for row in evaluation()]
    assert not any((a, b) in trained or (b, a) in trained for a, b in held_out)


def test_all_sums_are_used():
    trained = [terms(row) for row in train()]
    held_out = [terms(row) for row in evaluation()]
    assert len(held_out) == 128
    assert len({frozenset(pair) for pair in held_out}) == 128
    either_order = {order for a, b in held_out for order in ((a, b), (b, a))}
    assert len(trained) == len(set(trained)) == 2500 - len(either_order)
    assert set(trained) | either_order == {(a, b) for a in range(1, 51) for b in range(1, 51)}


def test_answers_are_right_and_the_reward_reads_them():
    for row in [*train(), *evaluation()]:
        assert row["answer"] == str(sum(terms(row)))
    answers = [row["answer"] for row in evaluation()]
    assert last_integer([f"The answer is {answer}." for answer in answers], answer=answers) == [1.0] * 128


def test_the_split_is_fixed():
    assert train() == train()
    # Results are compared across runs and releases: a change of the split must be noticed.
    assert [terms(row) for row in evaluation()[:4]] == [(38, 35), (4, 26), (27, 30), (33, 8)]
