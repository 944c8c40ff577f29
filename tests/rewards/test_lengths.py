import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.rewards.lengths import soft_overlong, target_length


def ids(*lengths):
    return [[7] * length for length in lengths]


@pytest.mark.parametrize(
    ("options", "lengths", "scores"),
    [
        ({"tokens": 100}, [100, 99, 50, 25, 0, 150, 200, 300], [1, 0.99, 0.5, 0.25, 0, 0.5, 0, 0]),
        ({"tokens": 100, "tolerance": 20}, [80, 100, 120, 40, 0, 160, 200, 201], [1, 1, 1, 0.5, 0, 0.5, 0, 0]),
        ({"tokens": 10, "tolerance": 2, "falloff": 4}, [8, 12, 13, 14, 16, 7, 4, 0], [1, 1, 0.75, 0.5, 0, 0.75, 0, 0]),
        ({"tokens": 5, "tolerance": 9, "falloff": 1}, [0, 14, 15], [1, 1, 0]),
    ],
)
def test_target_length(options, lengths, scores):
    reward = cloudpickle.loads(cloudpickle.dumps(target_length(**options)))
    assert reward.__name__ == "target_length"
    assert reward(completion_ids=ids(*lengths), completions=["x"] * len(lengths)) == pytest.approx(scores)


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"tokens": 5, "tolerance": -1}, {"tokens": 5, "tolerance": 5}, {"tokens": 5, "falloff": 0}]
)
def test_lengths_that_do_not_fit_together(options):
    with pytest.raises(ValueError, match="falloff must be at least 1, tolerance at least 0"):
        target_length(**options)


@pytest.mark.parametrize(
    ("length", "score"), [(0, 0), (16_384, 0), (16_385, -1 / 4096), (17_408, -0.25), (18_432, -0.5), (20_480, -1), (20_481, -1)]
)
def test_soft_overlong_is_that_of_the_dapo_paper(length, score):
    for reward in (soft_overlong(20_480), soft_overlong(20_480, cache_tokens=4_096)):
        assert reward(completion_ids=ids(length)) == pytest.approx([score])


@given(st.integers(1, 60), st.data())
def test_soft_overlong_follows_the_equation(limit, data):
    cache = data.draw(st.integers(1, limit))
    reward = soft_overlong(limit, cache_tokens=cache)
    for length, score in enumerate(reward(completion_ids=ids(*range(limit + 5)))):
        if length <= limit - cache:
            assert score == 0
        elif length <= limit:
            assert score == pytest.approx((limit - cache - length) / cache)
        else:
            assert score == -1


def test_soft_overlong_can_be_pickled_and_needs_a_cache_that_fits():
    reward = cloudpickle.loads(cloudpickle.dumps(soft_overlong(3)))  # a fifth of 3 is less than a token
    assert reward.__name__ == "soft_overlong"
    assert reward(completion_ids=ids(2, 3), completions=["a", "b"]) == [0.0, -1.0]
    for limit, cache in ((10, 0), (10, 11), (0, None)):
        with pytest.raises(ValueError, match="cache_tokens"):
            soft_overlong(limit, cache_tokens=cache)
