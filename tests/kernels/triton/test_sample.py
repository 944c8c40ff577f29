"""Sampling of tokens by a kernel: frequencies, log-probabilities, independence of the batch, rows that are not finite."""

from __future__ import annotations

import itertools

import pytest
import torch
from ahead_of_time import SHARED_MEMORY, compile_for

from rankup.kernels.triton.sample import BLOCK, launch_arguments, sample_in_place, sample_kernel

interpreted = pytest.mark.interpreted
INF = float("inf")


def sampled(logits: torch.Tensor, *, seeds: list[int] | None = None, position: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities; the seeds are 0, 1, ... by default."""
    logprobs = logits.clone()
    keys = torch.arange(len(logits)) if seeds is None else torch.tensor(seeds)
    return sample_in_place(logprobs, keys, torch.full_like(keys, position)), logprobs


@interpreted
@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 300])
def test_the_logits_become_their_log_probabilities(vocabulary: int) -> None:
    logits = 4 * torch.randn(3, vocabulary)
    tokens, logprobs = sampled(logits)
    torch.testing.assert_close(logprobs, logits.double().log_softmax(-1).float(), rtol=1e-6, atol=1e-5)
    assert ((tokens >= 0) & (tokens < vocabulary)).all()


@interpreted
def test_frequencies_are_the_probabilities() -> None:
    """Chi-square per degree of freedom, of 3,000 draws from 40 tokens: its standard deviation is 0.23."""
    draws, vocabulary = 3000, 40
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    tokens, _ = sampled(logits.expand(draws, -1))
    expected = logits.double().softmax(-1) * draws
    chi_square = ((tokens.bincount(minlength=vocabulary) - expected) ** 2 / expected).sum() / (vocabulary - 1)
    assert 0.4 < chi_square < 1.8


@interpreted
def test_positions_give_independent_draws_too() -> None:
    logits, draws = torch.zeros(1, 2), 400
    heads = [int(sampled(logits, seeds=[7], position=position)[0]) for position in range(draws)]
    assert abs(sum(heads) - draws / 2) < 4 * (draws / 4) ** 0.5
    changes = sum(a != b for a, b in itertools.pairwise(heads))
    assert abs(changes - draws / 2) < 4 * (draws / 4) ** 0.5


@interpreted
def test_every_block_is_drawn_from() -> None:
    """Equal logits over three blocks, the last of 1,000 tokens."""
    vocabulary, draws = 2 * BLOCK + 1000, 600
    tokens, _ = sampled(torch.zeros(draws, vocabulary))
    counts = (tokens // BLOCK).bincount(minlength=3).double()
    expected = draws * torch.tensor([BLOCK, BLOCK, 1000]).double() / vocabulary
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()


@interpreted
def test_a_token_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(6, 500)
    tokens, logprobs = sampled(logits, seeds=[3, 2**62 + 1, -5, 7, 8, 9], position=11)
    for rows in ([4], [1, 0], [5, 2, 3]):
        seeds = [[3, 2**62 + 1, -5, 7, 8, 9][row] for row in rows]
        alone, logprobs_alone = sampled(logits[rows], seeds=seeds, position=11)
        assert torch.equal(alone, tokens[rows]) and torch.equal(logprobs_alone, logprobs[rows])


@interpreted
@pytest.mark.parametrize("allowed", [[0], [BLOCK + 9], [BLOCK - 1, BLOCK], [7, 300, 2 * BLOCK]])
def test_an_excluded_token_is_never_sampled(allowed: list[int]) -> None:
    logits = torch.full((60, 2 * BLOCK + 1), -INF)
    logits[:, allowed] = 3.0
    tokens, logprobs = sampled(logits)
    assert set(tokens.tolist()) == set(allowed)
    assert logprobs[:, allowed].exp().sum(-1).allclose(torch.ones(60))
    assert logprobs.isneginf().sum(-1).eq(2 * BLOCK + 1 - len(allowed)).all()


@interpreted
@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("vocabulary", [10, BLOCK + 10])
def test_a_row_that_is_not_finite_becomes_nan_and_leaves_the_others_alone(value: float, vocabulary: int) -> None:
    logits = torch.zeros(2, vocabulary)
    logits[1, vocabulary - 3] = value
    tokens, logprobs = sampled(logits)
    assert logprobs[1].isnan().all() and tokens[1] == 0
    assert logprobs[0].isfinite().all() and tokens[0] == sampled(logits[:1])[0]


@interpreted
def test_a_row_of_minus_infinity_becomes_nan() -> None:
    tokens, logprobs = sampled(torch.full((1, 30), -INF))
    assert logprobs.isnan().all() and tokens.tolist() == [0]


@interpreted
def test_rows_of_a_wider_tensor() -> None:
    wide = torch.randn(4, 70)
    before = wide.clone()
    tokens = sample_in_place(wide[:, 5:60], torch.arange(4), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(tokens, sampled(before[:, 5:60])[0])
    assert torch.equal(wide[:, :5], before[:, :5]) and torch.equal(wide[:, 60:], before[:, 60:])


@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_every_build_fits_and_spills_nothing(capability: int) -> None:
    logits = torch.empty(64, 151_936, dtype=torch.float32, device="meta")
    seeds = torch.empty(64, dtype=torch.int64, device="meta")
    found = compile_for(capability, sample_kernel, **launch_arguments(logits, seeds, seeds, torch.empty_like(seeds)))
    assert found.fits and (found.stack, found.local) == (0, 0)
    assert not found.count("atom") and not found.count("red")
