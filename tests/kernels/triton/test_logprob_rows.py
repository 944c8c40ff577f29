"""Rows of logits by kernels: against the definition in fp64, against torch, and compiled for three chips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ahead_of_time import compile_for
from logprob_oracle import from_full_logits, leaves, make_adapter, make_case

from rankup.kernels import logprob
from rankup.kernels.logprob_rows import Rows, Slopes, TorchRows
from rankup.kernels.triton.logprob_rows import (
    GRADIENT_BLOCK,
    MEASURE_BLOCK,
    TritonRows,
    gradient_kernel,
    measure_kernel,
)

interpreted = pytest.mark.interpreted
RAGGED = [(0, 5), (1, 1), (1, MEASURE_BLOCK + 1), (3, 7), (5, 507), (4, 2 * MEASURE_BLOCK), (3, GRADIENT_BLOCK - 1)]
SLOPES = ["both", "logprob", "entropy"]


# ---------------------------------------------------------------------------------------------------------- interpreted


def make_rows(rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets."""
    return 4 * torch.randn(rows, vocabulary), torch.randint(0, vocabulary, (rows,))


def make_slopes(rows: int, which: str) -> Slopes:
    logprob_n, entropy_n = torch.randn(2, rows)
    return Slopes(None if which == "entropy" else logprob_n, None if which == "logprob" else entropy_n)


def exact(
    logits_nV: torch.Tensor, targets_n: torch.Tensor, slopes: Slopes, factor: float, softcap: float | None
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies and the gradient of the logits, by autograd in fp64."""
    y_nV = logits_nV.double().requires_grad_()
    z_nV = factor * (y_nV if softcap is None else softcap * (y_nV / softcap).tanh())
    log_p_nV = z_nV.log_softmax(-1)
    results = log_p_nV.gather(1, targets_n[:, None])[:, 0], -(log_p_nV.exp() * log_p_nV).sum(-1)
    losses = [result @ slope_n.double() for result, slope_n in zip(results, slopes, strict=True) if slope_n is not None]
    (gradient_nV,) = torch.autograd.grad(torch.stack(losses).sum(), y_nV)
    return *(result.detach() for result in results), gradient_nV


def by_kernels(
    logits_nV: torch.Tensor, targets_n: torch.Tensor, slopes: Slopes, factor: float, softcap: float | None
) -> tuple[torch.Tensor, ...]:
    arithmetic = TritonRows(factor, softcap)
    rows = arithmetic.measure(logits_nV, targets_n)
    factor_n1 = arithmetic.gradient_in_place(logits_nV, targets_n, rows, slopes)
    return rows.logprobs_n, rows.entropy_n, logits_nV * factor_n1


@interpreted
@pytest.mark.parametrize(("rows", "vocabulary"), RAGGED)
@pytest.mark.parametrize("which", SLOPES)
@pytest.mark.parametrize(("factor", "softcap"), [(1.0, None), (0.7, 30.0), (1 / 0.3, None)])
def test_any_shape_equals_the_definition(rows: int, vocabulary: int, which: str, factor: float, softcap: float | None) -> None:
    case = *make_rows(rows, vocabulary), make_slopes(rows, which), factor, softcap
    expected = [t.float() for t in exact(*case)]
    torch.testing.assert_close(list(by_kernels(*case)), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_rows_of_a_wider_tensor_and_every_second_target() -> None:
    wide_nV, targets_n = torch.randn(6, 40), torch.randint(0, 25, (12,))[::2]
    before_nV, slopes = wide_nV.clone(), make_slopes(6, "both")
    expected = [t.float() for t in exact(wide_nV[:, 8:33], targets_n, slopes, 1.0, None)]
    torch.testing.assert_close(list(by_kernels(wide_nV[:, 8:33], targets_n, slopes, 1.0, None)), expected)
    outside = [slice(0, 8), slice(33, None)]
    assert all(torch.equal(wide_nV[:, columns], before_nV[:, columns]) for columns in outside)


@interpreted
@pytest.mark.parametrize("offset", [-1e4, -1e6, 1e6, -1e30])
@pytest.mark.parametrize("which", SLOPES)
def test_rows_of_very_negative_or_large_logits_are_precise(offset: float, which: str) -> None:
    """Logits that are exact in fp32. The largest of a row comes last, so that all sums are rescaled."""
    small_nV = torch.arange(MEASURE_BLOCK + 9.0).remainder(5).expand(3, -1)
    logits_nV = (small_nV.double() + offset).float()
    targets_n, slopes = torch.tensor([0, 7, MEASURE_BLOCK + 3]), make_slopes(3, which)
    expected = [t.float() for t in exact(logits_nV, targets_n, slopes, 1.0, None)]
    torch.testing.assert_close(list(by_kernels(logits_nV, targets_n, slopes, 1.0, None)), expected, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("which", SLOPES)
@pytest.mark.parametrize("nothing", [float("-inf"), -3e38])
def test_a_logit_of_minus_infinity_is_the_same_as_no_token(which: str, nothing: float) -> None:
    logits_nV = torch.full((2, 2 * MEASURE_BLOCK), nothing)  # the first block has no other logits
    logits_nV[:, -3:] = torch.tensor([[1.0, 2.0, 0.5], [3e38, 2.9e38, 0.0]])
    targets_n, slopes = torch.full((2,), 2 * MEASURE_BLOCK - 2), make_slopes(2, which)
    expected = [t.float() for t in exact(logits_nV[:, -3:], torch.tensor([1, 1]), slopes, 1.0, None)]
    *measured, gradient_nV = by_kernels(logits_nV, targets_n, slopes, 1.0, None)
    torch.testing.assert_close([*measured, gradient_nV[:, -3:]], expected)
    assert not gradient_nV[:, :-3].any()


@interpreted
def test_a_target_outside_the_vocabulary_is_not_read() -> None:
    rows = TritonRows(1.0, None).measure(torch.randn(3, 4), torch.tensor([1, 4, -1]))
    assert rows.logprobs_n.isfinite().tolist() == [True, False, False] and rows.entropy_n.isfinite().all()


@interpreted
@pytest.mark.parametrize("softcap", [None, 100.0, 10.0])
@pytest.mark.parametrize(("likely", "unlikely"), [(7.0, 0.0), (90.0, -90.0)])
def test_almost_certain_and_impossible_targets_have_exact_gradients(
    softcap: float | None, likely: float, unlikely: float
) -> None:
    case = torch.tensor([[likely, unlikely]] * 2), torch.tensor([0, 1]), Slopes(torch.ones(2), None), 1.0, softcap
    expected = exact(*case)[2].float()
    torch.testing.assert_close(by_kernels(*case)[2], expected, rtol=1e-4, atol=1e-12)


@interpreted
@pytest.mark.parametrize("which", SLOPES)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_in_fp16_the_kernels_are_as_accurate_as_torch(which: str, softcap: float | None) -> None:
    """Not bf16, which the interpreter truncates where chips round."""
    assert_as_exact_as_torch(8, 1000, which, softcap, torch.float16, "cpu")


def assert_as_exact_as_torch(
    rows: int, vocabulary: int, which: str, softcap: float | None, dtype: torch.dtype, device: str
) -> None:
    """Compared with fp64 on the same rounded logits, the kernels' errors are at most twice those of torch."""
    logits_nV, targets_n = (t.to(device) for t in make_rows(rows, vocabulary))
    slopes = Slopes(*(None if slope_n is None else slope_n.to(device) for slope_n in make_slopes(rows, which)))
    case = targets_n, slopes, 0.8, softcap
    expected = exact(logits_nV.to(dtype), *case)
    ours = by_kernels(logits_nV.to(dtype), *case)
    in_torch = TorchRows(p_nV := logits_nV.to(dtype), 0.8, softcap)
    measured = in_torch.measure(p_nV, targets_n)
    factor_n1 = in_torch.gradient_in_place(p_nV, targets_n, measured, slopes)
    torchs = measured.logprobs_n, measured.entropy_n, p_nV * factor_n1
    for one, other, right in zip(ours, torchs, expected, strict=True):
        assert (one - right).norm() <= 2 * (other - right).norm() + 5e-6 * right.norm()


@interpreted
@pytest.mark.parametrize("options", [{}, {"passes": 2}])
@pytest.mark.parametrize("head", [{}, {"softcap": 5.0, "scale": 0.6}])
def test_the_loss_of_a_head_with_an_adapter(monkeypatch: pytest.MonkeyPatch, head: dict[str, Any], options: Any) -> None:
    """As on a CUDA device, where kernels replace the rows in torch."""
    hidden_ND, exact_head, targets_N = make_case(40, rank=3, **head)
    expected = from_full_logits(hidden_ND, exact_head, targets_N, 0.9)
    expected_loss = (expected[0].exp() - expected[1] ** 2).sum()
    gradients = torch.autograd.grad(expected_loss, leaves(hidden_ND, exact_head))
    adapter = exact_head.adapter
    assert adapter is not None
    fp32_adapter = make_adapter(adapter.a.float(), adapter.b.float() / adapter.scaling, adapter.scaling)
    fp32_head = replace(exact_head, weight_VD=exact_head.weight_VD.float(), adapter=fp32_adapter)
    fp32_hidden_ND = hidden_ND.detach().float().requires_grad_()

    monkeypatch.setattr(logprob, "runs_triton", lambda *_: True)
    loss, *measured = logprob.linear_logprob_loss(
        fp32_hidden_ND, fp32_head, targets_N, lambda lp, h, _: lp.exp() - h**2, temperature=0.9, chunk_bytes=1, **options
    )
    ours = [loss, *measured, *torch.autograd.grad(loss, leaves(fp32_hidden_ND, fp32_head))]
    exactly = [expected_loss, *expected, *gradients]
    torch.testing.assert_close(ours, [t.detach().float() for t in exactly], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- ahead of time


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_builds_stay_in_registers(capability: int, dtype: torch.dtype, softcap: float | None) -> None:
    vector = torch.empty(512, device="meta")
    logits_nV = torch.empty(512, 151_936, dtype=dtype, device="meta")
    case = logits_nV, torch.empty(512, dtype=torch.int64, device="meta"), Rows(vector, vector, vector, vector)
    arithmetic = TritonRows(0.7, softcap)
    gradient = arithmetic.gradient_arguments(*case, Slopes(vector, vector))
    for kernel, arguments in ((measure_kernel, arithmetic.measure_arguments(*case)), (gradient_kernel, gradient)):
        build = compile_for(capability, kernel, **arguments)
        assert build.fits and (build.stack, build.local) == (0, 0) and build.registers <= 128
        assert not build.count("atom") and not build.count("red"), "sums in one order"
        assert build.count("ld.global.v4") or build.count("ld.global.v8"), "16 bytes and more at a time"


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("which", SLOPES)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (123, 507), pytest.param(64, 151_936, marks=pytest.mark.large)])
def test_on_a_gpu_it_is_as_accurate_as_torch(
    rows: int, vocabulary: int, which: str, softcap: float | None, dtype: torch.dtype
) -> None:
    assert_as_exact_as_torch(rows, vocabulary, which, softcap, dtype, "cuda")
