"""Settings of torch and cuBLAS: set within a block, restored after it, and refused where they contradict the environment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rankup.kernels.numerics import WORKSPACE, deterministic_algorithms, full_precision_sums, make_cublas_repeatable


def reductions() -> list[bool]:
    matmul: Any = torch.backends.cuda.matmul
    return [matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction]


@pytest.mark.parametrize("before", [(True, True), (False, False)])
def test_sums_are_in_fp32_within_the_block_only(before: tuple[bool, bool]) -> None:
    matmul = torch.backends.cuda.matmul
    original = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    matmul.allow_bf16_reduced_precision_reduction = before
    try:
        with pytest.raises(KeyError), full_precision_sums():
            assert reductions() == [False, False]
            raise KeyError
        assert reductions() == [before[0], True]
        assert matmul.allow_bf16_reduced_precision_reduction_split_k == before[1]
    finally:
        matmul.allow_bf16_reduced_precision_reduction = original


@pytest.fixture
def mode() -> Iterator[None]:
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("before", ["default", "warn"])
@pytest.mark.usefixtures("mode")
def test_algorithms_are_deterministic_within_the_block_only(before: str) -> None:
    torch.set_deterministic_debug_mode(before)
    with pytest.raises(KeyError), deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        raise KeyError
    assert torch.get_deterministic_debug_mode() == {"default": 0, "warn": 1}[before]
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("is_started", "allocations", "in_time"), [(False, 0, True), (True, 0, True), (True, 3, False)]
)
def test_cublas_gets_a_workspace_before_the_first_product(
    is_started: bool, allocations: int, in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_started)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"allocation.all.allocated": allocations})
    monkeypatch.delenv(WORKSPACE, raising=False)
    assert make_cublas_repeatable() == in_time
    assert make_cublas_repeatable(), "the environment has it now"


def test_another_workspace_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8"):
        make_cublas_repeatable()
