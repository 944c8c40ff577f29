"""Packs hold every target once, with what it is predicted from, within the token budget, in both layouts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_groups import make_group, random_groups, void, with_given

from rankup.grpo.data.groups import Group
from rankup.grpo.model.packing import Pack, by_completion, pack, pad
from rankup.kernels.shared_prompt_attention import SharedPromptLayout

PAD_TOKEN_ID = 0

SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 12), min_size=1, max_size=5)), min_size=0, max_size=5
)

GROUPS = st.builds(
    lambda shapes, are_episodes, seed: with_given(random_groups(shapes, seed=seed), seed=seed)
    if are_episodes
    else random_groups(shapes, seed=seed),
    SHAPES,
    st.booleans(),
    st.integers(0, 20),
)

Target = tuple[tuple[int, ...], int, float, float]  # what it follows, the token, advantage, sampler's log-probability


def expected_targets(groups: list[Group], origins: Iterable[tuple[int, int]]) -> list[Target]:
    """The targets of these completions, from the groups alone."""
    targets = []
    for place, number in origins:
        weighted = groups[place]
        completion, advantage = weighted.completions[number], weighted.advantages[number]
        logprobs = iter(completion.logprobs)
        for i, token in enumerate(completion.token_ids):
            if not any(start <= i < end for start, end in completion.given):
                targets.append((weighted.prompt.token_ids + completion.token_ids[:i], token, advantage, next(logprobs)))
        assert not list(logprobs)
    return targets


def layout_of(one: Pack) -> SharedPromptLayout:
    assert one.layout is not None
    return one.layout


def mask_of(one: Pack) -> torch.Tensor:
    assert one.attention_mask is not None
    return one.attention_mask


def shared_contexts(one: Pack) -> dict[int, tuple[int, ...]]:
    """Of every place of the pack, the tokens that attention lets it see, by the layout and in the order of positions."""
    ids = one.input_ids[0].tolist()
    contexts = {}
    for group in layout_of(one).groups:
        prompt = ids[group.prompt]
        contexts |= {group.prompt.start + i: tuple(prompt[: i + 1]) for i in range(len(prompt))}
        for part in group.completions:
            contexts |= {place: (*prompt, *ids[part.start : place + 1]) for place in range(part.start, part.stop)}
    assert one.position_ids is not None
    positions = one.position_ids[0].tolist()
    assert {place: len(context) - 1 for place, context in contexts.items()} == dict(enumerate(positions))
    return contexts


def padded_contexts(one: Pack) -> dict[int, tuple[int, ...]]:
    """The same for the plain layout."""
    ids, mask = one.input_ids, mask_of(one)
    width = ids.shape[1]
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values), "padding stands on the right"
    assert (ids[mask == 0] == PAD_TOKEN_ID).all()
    return {
        row * width + column: tuple(ids[row, : column + 1].tolist())
        for row, column in mask.nonzero().tolist()
    }


def found_targets(one: Pack, contexts: dict[int, tuple[int, ...]]) -> list[Target]:
    columns = one.sources.rows_N, one.targets_N, one.advantages_N, one.sampler_logprobs_N
    return [
        (contexts[source], token, advantage, logprob)
        for source, token, advantage, logprob in zip(*(c.tolist() for c in columns), strict=True)
    ]


def in_fp32(targets: list[Target]) -> list[Target]:
    return [(c, t, *torch.tensor([a, lp], dtype=torch.float32).tolist()) for c, t, a, lp in targets]  # type: ignore[misc]


def check_sequences(packs: list[Pack], groups: list[Group]) -> None:
    """Completions are numbered within their pack; each that is not empty is in one pack, once."""
    for one in packs:
        assert torch.equal(one.sequence_N.bincount(), one.lengths_S)
        assert torch.equal(one.sequence_N, one.sequence_N.sort().values)
        lengths = [len(groups[place].completions[number].logprobs) for place, number in one.origins]
        assert one.lengths_S.tolist() == lengths
    wanted = [(i, j) for i, w in enumerate(groups) for j, c in enumerate(w.completions) if c.logprobs]
    assert sorted(origin for one in packs for origin in one.origins) == wanted


@settings(deadline=None)
@given(groups=GROUPS, budget=st.integers(1, 60))
def test_shared_layout(groups: list[Group], budget: int) -> None:
    packs = pack(groups, tokens_per_pack=budget)
    check_sequences(packs, groups)
    for one in packs:
        assert found_targets(one, shared_contexts(one)) == in_fp32(expected_targets(groups, one.origins))
        layout = layout_of(one)
        assert one.num_input_tokens == layout.length == one.input_ids.numel()
        assert one.num_input_tokens <= budget or len(one.lengths_S) == 1
        assert one.num_padding_tokens == 0


@settings(deadline=None)
@given(groups=GROUPS, budget=st.integers(1, 60))
def test_plain_layout(groups: list[Group], budget: int) -> None:
    packs = pad(groups, tokens_per_pack=budget, pad_token_id=PAD_TOKEN_ID)
    check_sequences(packs, groups)
    for one in packs:
        assert found_targets(one, padded_contexts(one)) == in_fp32(expected_targets(groups, one.origins))
        ids, mask = one.input_ids, mask_of(one)
        assert ids.numel() <= budget or len(one.lengths_S) == 1
        assert (one.num_input_tokens, one.num_padding_tokens) == (mask.sum(), (1 - mask).sum())
        assert mask.any(0).all(), "no column is padding alone"


@settings(deadline=None)
@given(groups=GROUPS)
def test_both_layouts_hold_the_same_targets(groups: list[Group]) -> None:
    shared = pack(groups, tokens_per_pack=10**6)
    plain = pad(groups, tokens_per_pack=10**6, pad_token_id=PAD_TOKEN_ID)
    assert len(shared) == len(plain) <= 1
    for name in ("targets_N", "advantages_N", "sampler_logprobs_N"):
        one, other = (by_completion(packs, [getattr(p, name) for p in packs]) for packs in (shared, plain))
        assert [t.tolist() for t in one] == [t.tolist() for t in other]


@settings(deadline=None)
@given(groups=GROUPS, budget=st.integers(1, 60))
def test_by_completion_restores_the_order(groups: list[Group], budget: int) -> None:
    expected = [[c.token_ids[i] for i in c.sampled] for group in groups for c in group.completions if c.logprobs]
    packs = pack(groups, tokens_per_pack=budget)
    assert [t.tolist() for t in by_completion(packs, [one.targets_N for one in packs])] == expected


@settings(deadline=None)
@given(groups=GROUPS, budget=st.integers(1, 60))
def test_little_is_wasted(groups: list[Group], budget: int) -> None:
    """Two packs that would fit into one are never left apart, and no row is packed with more rows than necessary."""
    sizes = [one.num_input_tokens for one in pack(groups, tokens_per_pack=budget)]
    assert all(a + b > budget for a, b in itertools.combinations(sizes, 2))
    padded = pad(groups, tokens_per_pack=budget, pad_token_id=PAD_TOKEN_ID)
    rows = [mask_of(one).sum(1) for one in padded]
    assert torch.equal(torch.cat(rows), torch.cat(rows).sort(descending=True).values) if rows else True


def test_sorting_by_length_saves_padding() -> None:
    groups = random_groups([(4, [30, 2, 30, 2]), (4, [2, 30, 2, 30])])
    packs = pad(groups, tokens_per_pack=4 * 33, pad_token_id=PAD_TOKEN_ID)
    assert sum(one.num_padding_tokens for one in packs) == 0 and len(packs) == 2


def prompts_and_rows(one: Pack) -> list[tuple[int, int]]:
    """(prompt length, completions) of every group of the pack."""
    groups = layout_of(one).groups
    return [(group.prompt.stop - group.prompt.start, len(group.completions)) for group in groups]


def test_a_prompt_stands_once_unless_its_group_exceeds_the_budget() -> None:
    groups = random_groups([(6, [4, 4, 4]), (2, [3])])  # 6 + 3 * 3 = 15 tokens and 2 + 2
    assert [prompts_and_rows(one) for one in pack(groups, tokens_per_pack=19)] == [[(6, 3), (2, 1)]]
    assert [prompts_and_rows(one) for one in pack(groups, tokens_per_pack=18)] == [[(6, 3)], [(2, 1)]]
    assert [prompts_and_rows(one) for one in pack(groups, tokens_per_pack=14)] == [[(6, 2)], [(6, 1), (2, 1)]]
    assert [prompts_and_rows(one) for one in pack(groups, tokens_per_pack=1)] == [[(6, 1)], [(6, 1)], [(6, 1)], [(2, 1)]]


def test_one_token_completions_are_predicted_from_the_prompt_alone() -> None:
    group = make_group([5, 6, 7], [[8], [9]])
    (one,) = pack([group], tokens_per_pack=100)
    assert one.input_ids.tolist() == [[5, 6, 7]]
    assert (one.sources.rows_N.tolist(), one.targets_N.tolist()) == ([2, 2], [8, 9])
    (one,) = pad([group], tokens_per_pack=100, pad_token_id=PAD_TOKEN_ID)
    assert one.input_ids.tolist() == [[5, 6, 7], [5, 6, 7]]
    assert (one.sources.rows_N.tolist(), one.targets_N.tolist()) == ([2, 5], [8, 9])


@pytest.mark.parametrize("groups", [[], [make_group([5, 6], [[], []])]])
def test_nothing_to_learn_from_is_no_pack(groups: list[Group]) -> None:
    assert pack(groups, tokens_per_pack=10) == []
    assert pad(groups, tokens_per_pack=10, pad_token_id=PAD_TOKEN_ID) == []


def episode(group: Group, given: tuple[tuple[int, int], ...]) -> Group:
    """The group with these ranges given in its only completion."""
    (completion,) = group.completions
    logprobs = (-1.0,) * (len(completion.token_ids) - sum(end - start for start, end in given))
    return dataclasses.replace(group, completions=(dataclasses.replace(completion, given=given, logprobs=logprobs),))


def test_given_tokens_are_inputs_and_the_row_ends_with_its_last_sampled_token() -> None:
    group = episode(make_group([5, 6], [[10, 11, 12, 13, 14, 15]]), ((0, 1), (2, 3), (4, 6)))
    (shared,) = pack([group], tokens_per_pack=100)
    (plain,) = pad([group], tokens_per_pack=100, pad_token_id=PAD_TOKEN_ID)
    for one in (shared, plain):
        assert one.input_ids.tolist() == [[5, 6, 10, 11, 12]], "13 is predicted from 12; 14 and 15 predict nothing"
        assert (one.sources.rows_N.tolist(), one.targets_N.tolist()) == ([2, 4], [11, 13])
        assert (one.sequence_N.tolist(), one.lengths_S.tolist()) == ([0, 0], [2])


def test_check_6_everything_is_trained_beyond_several_end_tokens_in_the_middle() -> None:
    end = 2
    group = episode(make_group([5], [[8, end, 10, 11, 9, end, 10, 7, end]]), ((2, 4), (6, 7)))
    for (one,) in (pack([group], tokens_per_pack=100), pad([group], tokens_per_pack=100, pad_token_id=end)):
        assert one.targets_N.tolist() == [8, end, 9, end, 7, end]
        assert one.input_ids.tolist() == [[5, 8, end, 10, 11, 9, end, 10, 7]]


def test_a_budget_counts_given_tokens() -> None:
    group = make_group([5, 6], [[9] * 11, [9] * 11])
    given = tuple(dataclasses.replace(c, given=((1, 10),), logprobs=(-1.0, -1.0)) for c in group.completions)
    episodes = dataclasses.replace(group, completions=given)
    assert [one.num_input_tokens for one in pack([episodes], tokens_per_pack=22)] == [22]
    assert [one.num_input_tokens for one in pack([episodes], tokens_per_pack=21)] == [12, 12]


def test_a_void_episode_and_one_without_sampled_tokens_are_left_out() -> None:
    group = make_group([5, 6], [[7, 8], [9, 10], [11, 12]], advantages=[1.0, 2.0, 3.0])
    first, second, third = group.completions
    nothing_sampled = dataclasses.replace(second, given=((0, 2),), logprobs=())
    group = dataclasses.replace(group, completions=(void(first), nothing_sampled, third))
    for (one,) in (pack([group], tokens_per_pack=100), pad([group], tokens_per_pack=100, pad_token_id=PAD_TOKEN_ID)):
        assert one.targets_N.tolist() == [11, 12] and one.origins == ((0, 2),)
        assert one.advantages_N.tolist() == [3.0, 3.0]
    only_void = dataclasses.replace(group, completions=(void(first), void(second), void(third)))
    assert pack([only_void], tokens_per_pack=100) == []


def test_dtypes_and_device() -> None:
    groups = random_groups([(3, [2, 4])])
    for one in [*pack(groups, tokens_per_pack=99), *pad(groups, tokens_per_pack=99, pad_token_id=PAD_TOKEN_ID)]:
        integers: list[Any] = [one.sources.rows_N, one.targets_N, one.sequence_N, one.lengths_S, one.input_ids]
        assert {t.dtype for t in integers} == {torch.int64}
        assert {t.dtype for t in (one.advantages_N, one.sampler_logprobs_N)} == {torch.float32}
    (one,) = pack(groups, tokens_per_pack=99, device="meta")
    assert {t.device.type for t in (one.sources.rows_N, one.advantages_N, one.lengths_S, one.input_ids)} == {"meta"}
