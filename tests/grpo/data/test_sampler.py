from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rankup.grpo.data.prompts import Prompt
from rankup.grpo.data.sampler import PromptSampler


def numbered(count):
    return [Prompt(content=str(i), token_ids=(i,), columns={"i": i}) for i in range(count)]


def indices(batch):
    return [row.columns["i"] for row in batch]


@given(
    size=st.integers(1, 40), per_step=st.integers(1, 60), seed=st.integers(0, 2**32), shuffle=st.booleans(),
    epochs=st.integers(1, 4),
)  # fmt: skip
def test_every_epoch_contains_each_row_once(size, per_step, seed, shuffle, epochs):
    sampler = PromptSampler(numbered(size), prompts_per_step=per_step, seed=seed, shuffle=shuffle)
    steps = -(-epochs * size // per_step)
    batches = [indices(sampler.batch(step)) for step in range(steps)]
    assert {len(batch) for batch in batches} == {per_step}
    walked = [i for batch in batches for i in batch]
    for epoch in range(epochs):
        part = walked[epoch * size : (epoch + 1) * size]
        assert sorted(part) == list(range(size))
        assert shuffle or part == list(range(size))
    assert max(Counter(walked).values()) - min(Counter(walked).values()) <= 1


@given(size=st.integers(1, 40), per_step=st.integers(1, 60), seed=st.integers(0, 2**32), step=st.integers(0, 10**6))
def test_a_batch_depends_on_seed_and_step_only(size, per_step, seed, step):
    rows = numbered(size)
    used = PromptSampler(rows, prompts_per_step=per_step, seed=seed)
    for other in (step + 1, 0, max(step - 1, 0)):
        used.batch(other)
    fresh = PromptSampler(rows, prompts_per_step=per_step, seed=seed)
    assert indices(used.batch(step)) == indices(fresh.batch(step))


def test_seeds_and_epochs_have_different_orders():
    rows = numbered(30)
    orders = [
        tuple(indices(PromptSampler(rows, prompts_per_step=30, seed=seed).batch(epoch)))
        for seed in range(5)
        for epoch in range(5)
    ]
    assert len(set(orders)) == 25


def test_the_order_is_the_same_on_every_machine():
    sampler = PromptSampler(numbered(10), prompts_per_step=10, seed=42)
    assert indices(sampler.batch(0))[:6] == [5, 6, 0, 7, 3, 2]
