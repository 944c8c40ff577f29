"""Log-probabilities and their gradient from hidden states, against full logits and torch's log_softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rankup.kernels.logprob import TokenLoss, chunk_rows, linear_logprob_loss, linear_logprobs

ONE_CHUNK_IS_16_ROWS = 1  # byte: the least that a chunk holds is 16 rows


def make_inputs(
    tokens: int, *, hidden: int = 6, vocabulary: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (requiring grad), head and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype)
    return hidden_ND, weight_VD, torch.randint(0, vocabulary, (tokens,), generator=generator)


def from_full_logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: log-probability of each target and entropy of each row, with gradient."""
    log_softmax_NV = (hidden_ND @ weight_VD.t() / temperature).log_softmax(-1)
    entropy_N = -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
    return log_softmax_NV.gather(1, targets_N[:, None])[:, 0], entropy_N


def minus_logprob(logprobs_n: torch.Tensor, _entropy_n: torch.Tensor, _chunk: slice) -> torch.Tensor:
    return -logprobs_n


def curved_loss(tokens: int) -> TokenLoss:
    """Another function for every token, none of them linear."""
    weights_N = torch.linspace(-1, 2, tokens, dtype=torch.float64)

    def loss(logprobs_n: torch.Tensor, _entropy_n: torch.Tensor, chunk: slice) -> torch.Tensor:
        return weights_N[chunk].to(logprobs_n.dtype) * (logprobs_n.exp() + logprobs_n**2)

    return loss


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.sampled_from([0, 1, 15, 16, 17, 32, 50]),
    vocabulary=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    chunk_bytes=st.sampled_from([ONE_CHUNK_IS_16_ROWS, 4000, 2**20]),
)
def test_any_shape_equals_full_logits(tokens: int, vocabulary: int, temperature: float, chunk_bytes: int) -> None:
    hidden_ND, weight_VD, targets_N = make_inputs(tokens, vocabulary=vocabulary)
    options = {"temperature": temperature, "chunk_bytes": chunk_bytes}
    logprobs_N, entropy_N = linear_logprobs(hidden_ND, weight_VD, targets_N, **options)
    expected = from_full_logits(hidden_ND, weight_VD, targets_N, temperature)
    torch.testing.assert_close((logprobs_N, entropy_N), expected)
    assert not logprobs_N.requires_grad and not entropy_N.requires_grad

    token_loss = curved_loss(tokens)
    loss, *measured = linear_logprob_loss(hidden_ND, weight_VD, targets_N, token_loss, **options)
    torch.testing.assert_close(tuple(measured), (logprobs_N, entropy_N))
    assert not measured[0].requires_grad and not measured[1].requires_grad
    expected_loss = token_loss(*expected, slice(0, tokens)).sum()
    torch.testing.assert_close(loss, expected_loss)
    (gradient,) = torch.autograd.grad(loss, hidden_ND)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected_loss, hidden_ND))


def test_gradcheck() -> None:
    hidden_ND, weight_VD, targets_N = make_inputs(20, hidden=3, vocabulary=7)
    token_loss = curved_loss(20)

    def function(hidden_ND: torch.Tensor) -> torch.Tensor:
        results = linear_logprob_loss(
            hidden_ND, weight_VD, targets_N, token_loss, temperature=0.8, chunk_bytes=ONE_CHUNK_IS_16_ROWS
        )
        return 3.0 * results[0]  # the incoming gradient counts

    assert torch.autograd.gradcheck(function, (hidden_ND,))


def test_the_loss_sees_its_chunk_with_logprobs_and_entropies() -> None:
    hidden_ND, weight_VD, targets_N = make_inputs(40)
    expected = from_full_logits(hidden_ND.detach(), weight_VD, targets_N)
    seen = []

    def loss(logprobs_n: torch.Tensor, entropy_n: torch.Tensor, chunk: slice) -> torch.Tensor:
        seen.append((chunk.start, chunk.stop))
        torch.testing.assert_close((logprobs_n.detach(), entropy_n), tuple(t[chunk] for t in expected))
        assert not entropy_n.requires_grad
        return -logprobs_n

    linear_logprob_loss(hidden_ND, weight_VD, targets_N, loss, chunk_bytes=ONE_CHUNK_IS_16_ROWS)
    assert seen == [(0, 16), (16, 32), (32, 40)]


def test_chunks_fit_their_budget() -> None:
    assert chunk_rows(50_000, 100 * 4 * 50_000) == 100
    assert chunk_rows(50_000, 100 * 4 * 50_000 - 1) == 99
    assert chunk_rows(50_000, 1) == 16
    assert 512 <= chunk_rows(49_152) <= 1024


def test_frozen_head_gets_no_gradient() -> None:
    hidden_ND, weight_VD, targets_N = make_inputs(5)
    weight_VD.requires_grad_()
    linear_logprob_loss(hidden_ND, weight_VD, targets_N, minus_logprob)[0].backward()
    assert weight_VD.grad is None and hidden_ND.grad is not None


class MostRows(TorchDispatchMode):
    """Records the most rows that any tensor of width `vocabulary` had."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.vocabulary,):
            self.rows = max(self.rows, result.numel() // self.vocabulary)
        return result


def test_no_tensor_of_tokens_by_vocabulary() -> None:
    """Only chunks are formed, and only the hidden states' gradient waits for the backward."""
    hidden_ND, weight_VD, targets_N = make_inputs(200, vocabulary=97)
    kept: list[torch.Tensor] = []
    with (
        MostRows(97) as most,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        loss, *_ = linear_logprob_loss(hidden_ND, weight_VD, targets_N, minus_logprob, chunk_bytes=ONE_CHUNK_IS_16_ROWS)
        loss.backward()
        linear_logprobs(hidden_ND, weight_VD, targets_N, chunk_bytes=ONE_CHUNK_IS_16_ROWS)
    assert most.rows == 16
    assert [t.shape for t in kept if t.numel() > 16] == [hidden_ND.shape]


@pytest.mark.parametrize("offset", [-1e4, -1e6, 1e6])
def test_rows_of_very_negative_or_large_logits_keep_their_digits(offset: float) -> None:
    """Whole numbers, so that fp32 logits are exact and only what follows can lose digits."""
    generator = torch.Generator().manual_seed(0)
    small_ND = torch.randint(-2, 3, (20, 4), generator=generator).double()
    weight_VD = torch.randint(-2, 3, (30, 4), generator=generator).double()
    targets_N = torch.randint(0, 30, (20,), generator=generator)
    hidden_ND = torch.cat([small_ND, torch.full((20, 1), offset, dtype=torch.float64)], dim=1)
    weight_VD = torch.cat([weight_VD, torch.ones(30, 1, dtype=torch.float64)], dim=1)
    expected = from_full_logits(hidden_ND, weight_VD, targets_N)
    measured = linear_logprobs(hidden_ND.float(), weight_VD.float(), targets_N)
    torch.testing.assert_close(measured, tuple(t.float() for t in expected), rtol=1e-5, atol=1e-6)


def test_an_unlikely_target_is_finite() -> None:
    hidden_ND = torch.tensor([[1.0]], requires_grad=True)
    weight_VD = torch.tensor([[0.0], [-1e30], [-3e38]])
    loss, logprobs_N, entropy_N = linear_logprob_loss(hidden_ND, weight_VD, torch.tensor([1]), minus_logprob)
    loss.backward()
    assert logprobs_N.tolist() == pytest.approx([-1e30]) and entropy_N.tolist() == [0.0]
    assert hidden_ND.grad is not None and hidden_ND.grad.isfinite().all()


def test_bf16_hidden_states_give_fp32_results_and_a_bf16_gradient() -> None:
    hidden_ND, weight_VD, targets_N = make_inputs(40, hidden=32, vocabulary=200, dtype=torch.bfloat16)
    loss, logprobs_N, entropy_N = linear_logprob_loss(hidden_ND, weight_VD, targets_N, minus_logprob)
    loss.backward()
    assert hidden_ND.grad is not None
    assert (hidden_ND.grad.dtype, loss.dtype, logprobs_N.dtype, entropy_N.dtype) == (torch.bfloat16, *[torch.float32] * 3)
    logprobs_bf16, entropy_bf16 = linear_logprobs(hidden_ND, weight_VD, targets_N)
    assert torch.equal(logprobs_bf16, logprobs_N) and torch.equal(entropy_bf16, entropy_N)
    # The logits alone are rounded to bf16: the rest is as in fp32 on those logits.
    logits_NV = (hidden_ND.detach() @ weight_VD.t()).float()
    expected = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
    torch.testing.assert_close(logprobs_N, expected)
