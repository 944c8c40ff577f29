"""Log-probabilities and their gradients from hidden states, against plain autograd over full logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_oracle import Case, from_full_logits, leaves, make_adapter, make_case
from torch.utils._python_dispatch import TorchDispatchMode

from rankup.kernels import logprob_rows
from rankup.kernels.logprob import Head, TokenFactor, TokenLoss, chunk_rows, linear_logprob_loss, linear_logprobs
from rankup.kernels.lora import Adapter

ONE_CHUNK_IS_16_ROWS = 1  # byte: chunks have at least 16 rows


def minus_logprob(logprobs_n: torch.Tensor, _entropy_n: torch.Tensor, _chunk: slice) -> torch.Tensor:
    return -logprobs_n


def curved_loss(tokens: int, *, entropy: bool) -> TokenLoss:
    """A different nonlinear function for every token."""
    weights_N = torch.linspace(-1, 2, tokens, dtype=torch.float64)

    def loss(logprobs_n: torch.Tensor, entropy_n: torch.Tensor, chunk: slice) -> torch.Tensor:
        loss_n = weights_N[chunk] * (logprobs_n.exp() + logprobs_n**2)
        return loss_n - (0.3 * weights_N[chunk] + 0.7) * entropy_n**2 if entropy else loss_n

    return loss


def sequence_loss(tokens: int, sequences: int) -> TokenLoss:
    """Products of probabilities over interleaved sequences, clipped: no chunk suffices, and it is not one value per token."""

    def loss(logprobs_N: torch.Tensor, entropy_N: torch.Tensor, everything: slice) -> torch.Tensor:
        assert everything == slice(0, tokens)
        sequence_N = torch.arange(tokens) % sequences
        sums_S = logprobs_N.new_zeros(sequences).index_add(0, sequence_N, logprobs_N + 2.4)
        return sums_S.exp().clamp(max=3.0) * logprobs_N.new_tensor([1.0, -2.0, 0.5]) - entropy_N.mean()

    return loss


def uneven(logprobs_N: torch.Tensor, entropy_N: torch.Tensor) -> torch.Tensor:
    """A factor for each token that depends on all tokens, zero for every third."""
    assert not logprobs_N.requires_grad and not entropy_N.requires_grad
    return (torch.arange(len(logprobs_N)) % 3) * (entropy_N.mean() - 0.1 * logprobs_N.mean())


def assert_equals_full_logits(
    case: Case, loss: TokenLoss, temperature: float = 1.0, factor: TokenFactor | None = None, **options: Any
) -> None:
    """Loss, log-probabilities, entropies and all gradients."""
    hidden_ND, head, targets_N = case
    expected = from_full_logits(*case, temperature)
    factor_N = 1.0 if factor is None else factor(*(t.detach() for t in expected))
    expected_loss = (loss(*expected, slice(0, len(targets_N))) * factor_N).sum()
    total, *measured = linear_logprob_loss(*case, loss, temperature=temperature, factor=factor, **options)
    torch.testing.assert_close(tuple(measured), expected)
    torch.testing.assert_close(total, expected_loss)
    assert not measured[0].requires_grad and not measured[1].requires_grad
    gradients = torch.autograd.grad(total, leaves(hidden_ND, head))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected_loss, leaves(hidden_ND, head)))


@contextmanager
def blocks_of(rows: int, case: Case) -> Iterator[None]:
    """With the small vocabularies of tests one block would hold all rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob_rows, "CPU_BLOCK_BYTES", rows * 8 * case[1].weight_VD.shape[0])
        yield


# ------------------------------------------------------------------------------------------------------------ exactness


@settings(deadline=None, max_examples=100)
@given(
    tokens=st.sampled_from([0, 1, 15, 16, 17, 33, 50]),
    vocabulary=st.integers(1, 40),
    rank=st.sampled_from([0, 1, 3]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scale=st.sampled_from([0.25, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    entropy=st.booleans(),
    chunk_bytes=st.sampled_from([ONE_CHUNK_IS_16_ROWS, 4000, 2**20]),
    block_rows=st.sampled_from([1, 3, 100]),
    passes=st.sampled_from([1, 2]),
    factor=st.sampled_from([None, uneven]),
)
def test_any_shape_equals_full_logits(
    tokens: int,
    vocabulary: int,
    rank: int,
    softcap: float | None,
    scale: float,
    temperature: float,
    entropy: bool,
    chunk_bytes: int,
    block_rows: int,
    passes: Literal[1, 2],
    factor: TokenFactor | None,
) -> None:
    case = make_case(tokens, vocabulary=vocabulary, rank=rank, softcap=softcap, scale=scale)
    loss = curved_loss(tokens, entropy=entropy)
    with blocks_of(block_rows, case):
        assert_equals_full_logits(case, loss, temperature, factor, chunk_bytes=chunk_bytes, passes=passes)
        measured = linear_logprobs(*case, temperature=temperature, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(measured, from_full_logits(*case, temperature))
    assert not measured[0].requires_grad and not measured[1].requires_grad


@pytest.mark.parametrize("tokens", [3, 16, 17, 49])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_loss_over_sequences_that_span_chunks(tokens: int, softcap: float | None) -> None:
    case = make_case(tokens, rank=2, softcap=softcap)
    assert_equals_full_logits(case, sequence_loss(tokens, 3), chunk_bytes=ONE_CHUNK_IS_16_ROWS, passes=2)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("factor", [None, uneven])
@pytest.mark.parametrize("rank", [0, 2])
def test_two_passes_equal_one(entropy: bool, factor: TokenFactor | None, rank: int) -> None:
    case = make_case(40, rank=rank)
    results = []
    for passes in (1, 2):
        options: dict[str, Any] = {"chunk_bytes": ONE_CHUNK_IS_16_ROWS, "passes": passes, "factor": factor}
        loss, *measured = linear_logprob_loss(*case, curved_loss(40, entropy=entropy), **options)
        results.append((loss, *measured, *torch.autograd.grad(loss, leaves(*case[:2]))))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.6}])
def test_gradcheck(passes: Literal[1, 2], entropy: bool, head: dict[str, Any]) -> None:
    hidden_ND, frozen, targets_N = make_case(20, hidden=3, vocabulary=7, rank=2, **head)
    adapter = frozen.adapter
    assert adapter is not None

    def function(hidden_ND: torch.Tensor, master_a: torch.Tensor, master_b: torch.Tensor) -> torch.Tensor:
        published = Adapter(master_a, master_b, master_a.detach(), master_b.detach() * adapter.scaling, adapter.scaling)
        loss, *_ = linear_logprob_loss(
            hidden_ND,
            replace(frozen, adapter=published),
            targets_N,
            curved_loss(20, entropy=entropy),
            temperature=0.8,
            chunk_bytes=ONE_CHUNK_IS_16_ROWS,
            passes=passes,
        )
        return 3.0 * loss  # so that the incoming gradient is not 1

    assert torch.autograd.gradcheck(function, (hidden_ND, adapter.master_a, adapter.master_b))


def relative_errors(exact: list[torch.Tensor], results: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(r.double() - e).norm() / e.norm() for e, r in zip(exact, results, strict=True)])


@pytest.mark.parametrize("head", [{}, {"softcap": 20.0, "scale": 0.5}])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_accurate_as_plain_torch(head: dict[str, Any], entropy: bool, dtype: torch.dtype) -> None:
    """Against fp64 on the same rounded numbers: log-probabilities, entropies and every gradient."""
    case = make_case(200, hidden=64, vocabulary=500, rank=8, dtype=dtype, **head)
    hidden_ND, rounded_head, targets_N = case
    adapter = rounded_head.adapter
    assert adapter is not None
    exact_adapter = make_adapter(adapter.a.double(), adapter.b.double() / adapter.scaling, adapter.scaling)
    exact_head = replace(rounded_head, weight_VD=rounded_head.weight_VD.double(), adapter=exact_adapter)
    exact_case = (hidden_ND.detach().double().requires_grad_(), exact_head, targets_N)
    token_loss = curved_loss(200, entropy=entropy)

    def plain(case: Case) -> list[torch.Tensor]:
        logprobs_N, entropy_N = from_full_logits(*case)
        loss = token_loss(logprobs_N, entropy_N, slice(0, 200)).sum()
        return [logprobs_N, entropy_N, *torch.autograd.grad(loss, leaves(*case[:2]))]

    loss, *measured = linear_logprob_loss(*case, token_loss, chunk_bytes=500 * 2 * 70)
    ours = [*measured, *torch.autograd.grad(loss, leaves(*case[:2]))]
    assert [t.dtype for t in (loss, *ours)] == [torch.float32] * 3 + [dtype] + [torch.float32] * 2
    exact = plain(exact_case)
    assert (relative_errors(exact, ours) <= 1.5 * relative_errors(exact, plain(case))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [0, 8])
def test_a_token_with_factor_zero_has_no_gradient(dtype: torch.dtype, rank: int) -> None:
    """A factor of 0 or 1 gives bit-exact results whether it is applied afterwards or in the loss."""
    case, keep_N = make_case(200, hidden=64, vocabulary=500, rank=rank, dtype=dtype), torch.arange(200) % 3 > 0
    results = []
    for loss, factor in (
        (lambda lp, _, __: -lp, lambda *_: keep_N),
        (lambda lp, _, chunk: -lp * keep_N[chunk], None),
    ):
        total, *_ = linear_logprob_loss(*case, loss, chunk_bytes=500 * 2 * 70, factor=factor)
        results.append([total, *torch.autograd.grad(total, leaves(*case[:2]))])
    assert all(map(torch.equal, *results)) and not results[0][1][~keep_N].any() and results[0][1].dtype == dtype


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("passes", "slices"), [(1, [(0, 14), (14, 28), (28, 40)]), (2, [(0, 40)])])
def test_the_loss_sees_logprobs_and_entropies(passes: Literal[1, 2], slices: list[tuple[int, int]]) -> None:
    case = make_case(40)
    expected = from_full_logits(*case)
    seen = []

    def loss(logprobs_n: torch.Tensor, entropy_n: torch.Tensor, chunk: slice) -> torch.Tensor:
        seen.append((chunk.start, chunk.stop))
        torch.testing.assert_close((logprobs_n, entropy_n), tuple(t[chunk] for t in expected))
        assert logprobs_n.requires_grad and entropy_n.requires_grad
        return -logprobs_n

    linear_logprob_loss(*case, loss, chunk_bytes=ONE_CHUNK_IS_16_ROWS, passes=passes)
    assert seen == slices


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_loss_of_the_entropy_alone(passes: Literal[1, 2], softcap: float | None) -> None:
    case = make_case(20, rank=2, softcap=softcap)
    assert_equals_full_logits(case, lambda _, entropy_n, __: entropy_n**2, chunk_bytes=ONE_CHUNK_IS_16_ROWS, passes=passes)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("factor", [None, uneven])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "rank": 2}])
def test_a_loss_scale_multiplies_gradients_alone(
    passes: Literal[1, 2], factor: TokenFactor | None, head: dict[str, Any]
) -> None:
    """In fp16 too, where a gradient would else be rounded to zero before it is multiplied."""
    for dtype, size in ((torch.float32, 1.0), (torch.float16, 1e-8)):
        case, found, curved = make_case(40, hidden=5, vocabulary=7, dtype=dtype, **head), [], curved_loss(40, entropy=True)

        def small(*arguments: Any, size: float = size, curved: TokenLoss = curved) -> torch.Tensor:
            return size * curved(*arguments)

        for scale in (None, 2.0**12):
            loss, *measured = linear_logprob_loss(
                *case, small, chunk_bytes=1, passes=passes, factor=factor, loss_scale=scale
            )
            found.append([loss.detach(), *measured, *torch.autograd.grad(loss, leaves(*case[:2]))])
        plain, scaled = found
        assert all(map(torch.equal, plain[:3], scaled[:3]))
        of_hidden, scaled_of_hidden = plain[3].float(), scaled[3].float() / 2**12
        if dtype == torch.float32:
            assert all(torch.equal(2**12 * one, other) for one, other in zip(plain[3:], scaled[3:], strict=True))
        else:
            assert (of_hidden != 0).sum() < 0.9 * (scaled_of_hidden != 0).sum()


@pytest.mark.parametrize("passes", [1, 2])
def test_a_constant_loss_has_no_gradient(passes: Literal[1, 2]) -> None:
    hidden_ND, head, targets_N = make_case(20, rank=2)
    loss, *_ = linear_logprob_loss(
        hidden_ND, head, targets_N, lambda lp, _, __: torch.ones_like(lp), chunk_bytes=ONE_CHUNK_IS_16_ROWS, passes=passes
    )
    assert loss.item() == 20
    assert [g.count_nonzero().item() for g in torch.autograd.grad(loss, leaves(hidden_ND, head))] == [0, 0, 0]


# --------------------------------------------------------------------------------------------------------------- memory


def test_chunks_fit_in_their_budget() -> None:
    assert chunk_rows(50_000, 2, 100 * 2 * 50_000) == 100
    assert chunk_rows(50_000, 2, 100 * 2 * 50_000 - 1) == 99
    assert chunk_rows(50_000, 4, 100 * 4 * 50_000) == 100
    assert chunk_rows(50_000, 2, 1) == 16
    assert 1024 <= chunk_rows(49_152, 2) <= 2048


def test_frozen_head_gets_no_gradient() -> None:
    hidden_ND, head, targets_N = make_case(5)
    head.weight_VD.requires_grad_()
    linear_logprob_loss(hidden_ND, head, targets_N, minus_logprob)[0].backward()
    assert head.weight_VD.grad is None and hidden_ND.grad is not None


class MostRows(TorchDispatchMode):
    """Records the largest number of rows of any tensor with width `vocabulary`."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.vocabulary,):
            self.rows = max(self.rows, result.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("passes", [1, 2])
def test_no_tensor_of_tokens_by_vocabulary(passes: Literal[1, 2]) -> None:
    """Only chunks are formed; only gradients of hidden states and master weights are saved for the backward."""
    case = make_case(200, vocabulary=97, rank=2, softcap=3.0)
    kept: list[torch.Tensor] = []
    with (
        MostRows(97) as most,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        loss, *_ = linear_logprob_loss(
            *case, lambda lp, entropy, _: lp * entropy.detach(), chunk_bytes=ONE_CHUNK_IS_16_ROWS, passes=passes
        )
        loss.backward()
        linear_logprobs(*case, chunk_bytes=ONE_CHUNK_IS_16_ROWS)
    assert most.rows == 16
    besides_the_loss = [t.shape for t in kept if t.dim() == 2]
    assert besides_the_loss == [t.shape for t in leaves(*case[:2])] and all(t.numel() <= 200 for t in kept if t.dim() < 2)


def test_a_bf16_chunk_is_not_copied_to_fp32() -> None:
    """Not even inside a torch operation: scatter_ into bf16 copies its target to fp32 and back."""
    tokens, vocabulary = 256, 40_000
    hidden_ND = torch.randn(tokens, 8).bfloat16().requires_grad_()
    head = Head(weight_VD=torch.randn(vocabulary, 8).bfloat16())
    targets_N = torch.randint(vocabulary, (tokens,))
    with torch.profiler.profile(profile_memory=True) as profile:
        loss, *_ = linear_logprob_loss(hidden_ND, head, targets_N, lambda lp, entropy, _: -lp)
        loss.backward()
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert 2 * tokens * vocabulary <= largest < 3 * tokens * vocabulary, "the chunk itself, and nothing larger"


# ------------------------------------------------------------------------------------------------------- extreme logits


@pytest.mark.parametrize("offset", [-1e4, -1e6, 1e6])
def test_rows_of_very_negative_or_large_logits_are_precise(offset: float) -> None:
    """Integers, so that fp32 logits are exact and only the later steps can lose digits."""
    generator = torch.Generator().manual_seed(0)
    small_ND = torch.randint(-2, 3, (20, 4), generator=generator).double()
    weight_VD = torch.randint(-2, 3, (30, 4), generator=generator).double()
    targets_N = torch.randint(0, 30, (20,), generator=generator)
    hidden_ND = torch.cat([small_ND, torch.full((20, 1), offset, dtype=torch.float64)], dim=1)
    weight_VD = torch.cat([weight_VD, torch.ones(30, 1, dtype=torch.float64)], dim=1)
    expected = from_full_logits(hidden_ND, Head(weight_VD=weight_VD), targets_N)
    measured = linear_logprobs(hidden_ND.float(), Head(weight_VD=weight_VD.float()), targets_N)
    torch.testing.assert_close(measured, tuple(t.float() for t in expected), rtol=1e-5, atol=1e-6)


def test_an_unlikely_target_is_finite() -> None:
    hidden_ND = torch.tensor([[1.0]], requires_grad=True)
    head = Head(weight_VD=torch.tensor([[0.0], [-1e30], [-3e38]]))
    loss, logprobs_N, entropy_N = linear_logprob_loss(hidden_ND, head, torch.tensor([1]), minus_logprob)
    loss.backward()
    assert logprobs_N.tolist() == pytest.approx([-1e30]) and entropy_N.tolist() == [0.0]
    assert hidden_ND.grad is not None and hidden_ND.grad.isfinite().all()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_a_logit_of_minus_infinity_is_the_same_as_no_token(softcap: float | None, entropy: bool) -> None:
    hidden_ND = torch.tensor([[10.0], [20.0]], requires_grad=True)
    weight_VD = torch.tensor([[0.03], [-3e38], [0.01]])
    head, targets_N = Head(weight_VD=weight_VD, softcap=softcap), torch.tensor([0, 2])
    existing = replace(head, weight_VD=weight_VD[[0, 2]])

    def loss(logprobs_n: torch.Tensor, entropy_n: torch.Tensor, _chunk: slice) -> torch.Tensor:
        return logprobs_n**2 - (entropy_n**2 if entropy else 0.0)

    total, *measured = linear_logprob_loss(hidden_ND, head, targets_N, loss)
    expected = from_full_logits(hidden_ND, existing, torch.tensor([0, 1]))
    torch.testing.assert_close(tuple(measured), expected)
    expected_gradients = torch.autograd.grad(loss(*expected, slice(0, 2)).sum(), hidden_ND)
    torch.testing.assert_close(torch.autograd.grad(total, hidden_ND), expected_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 100.0])
@pytest.mark.parametrize(("likely", "unlikely"), [(7.0, 0.0), (90.0, -90.0)])
def test_almost_certain_and_impossible_targets_have_exact_gradients(
    dtype: torch.dtype, softcap: float | None, likely: float, unlikely: float
) -> None:
    """For p = 1 - 1e-3, which bf16 rounds to 1, and for p that is 0 in fp32."""
    weight_VD, targets_N = torch.tensor([[likely], [unlikely]], dtype=dtype), torch.tensor([0, 1])
    hidden_ND = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    loss, *_ = linear_logprob_loss(hidden_ND, Head(weight_VD=weight_VD, softcap=softcap), targets_N, minus_logprob)
    exact_ND = hidden_ND.detach().double().requires_grad_()
    exact = from_full_logits(exact_ND, Head(weight_VD=weight_VD.double(), softcap=softcap), targets_N)[0]
    (expected,) = torch.autograd.grad(-exact.sum(), exact_ND)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden_ND)[0].double(), expected, rtol=1e-2, atol=1e-7)
