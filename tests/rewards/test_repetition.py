import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.rewards.repetition import repetition_penalty


@pytest.mark.parametrize(
    ("completion", "options", "score"),
    [
        ("a b c d e f", {}, 0.0),
        ("a b c a b c", {}, -0.25),  # abc bca cab abc
        ("a b c A B C", {}, -0.25),
        ("a a a a a", {}, -2 / 3),
        ("a a a a a", {"max_penalty": -3.0}, -2.0),
        ("a a a a a", {"max_penalty": 0.0}, 0.0),
        ("a\n\nb  a\tb", {"ngram": 2}, -1 / 3),
        ("a b a c", {"ngram": 1}, -0.25),
        ("a b", {}, 0.0),
        ("a a a", {}, 0.0),
        ("", {}, 0.0),
        ([{"role": "assistant", "content": "a a a a"}], {}, -0.5),
        ([{"role": "assistant", "content": None}], {}, 0.0),
    ],
)
def test_repetition_penalty(completion, options, score):
    reward = cloudpickle.loads(cloudpickle.dumps(repetition_penalty(**options)))
    assert reward.__name__ == "repetition_penalty"
    assert reward(completions=[completion, "x"], prompts=["p", "p"]) == pytest.approx([score, 0.0])


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_more_of_the_same_is_never_better(words, ngram):
    once, twice = (" ".join(words * times) for times in (1, 2))
    score_once, score_twice = repetition_penalty(ngram)(completions=[once, twice])
    assert score_once is not None and score_twice is not None
    assert 0 >= score_once > -1
    assert score_twice <= score_once


@pytest.mark.parametrize(
    "options", [{"ngram": 0}, {"max_penalty": 0.1}, {"max_penalty": float("nan")}, {"max_penalty": -float("inf")}]
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="must be"):
        repetition_penalty(**options)
