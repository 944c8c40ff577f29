"""The device of a session: what is set while it is open, and what a deterministic run needs on each."""

from __future__ import annotations

import logging

import pytest
import torch

from rankup.grpo.config import GRPOConfig
from rankup.grpo.update import device, resolve
from rankup.grpo.update.device import prepared_device
from rankup.kernels.numerics import WORKSPACE


def test_products_keep_their_sums_in_fp32_while_a_session_is_open() -> None:
    matmul = torch.backends.cuda.matmul
    with prepared_device(GRPOConfig()) as name:
        assert name == ("cuda" if torch.cuda.is_available() else "cpu")
        assert not matmul.allow_bf16_reduced_precision_reduction
    assert matmul.allow_bf16_reduced_precision_reduction


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_of_torch", lambda: "cuda")
    monkeypatch.setattr(resolve, "device_of_torch", lambda: "cuda")
    monkeypatch.delenv(WORKSPACE, raising=False)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("is_late", [True, False])
def test_a_deterministic_run_says_if_cuda_had_started(
    is_late: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_late)
    with caplog.at_level(logging.INFO, "rankup"), prepared_device(GRPOConfig(deterministic=True)):
        pass
    assert ("CUDA had started before CUBLAS_WORKSPACE_CONFIG was set" in caplog.text) == is_late


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
def test_on_cpu_a_deterministic_run_is_told_that_it_always_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rankup"), prepared_device(GRPOConfig(deterministic=True)):
        pass
    assert "changes nothing on CPU" in caplog.text


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("deterministic", "path"), [(True, "dense"), (False, "auto")])
def test_a_deterministic_run_samples_with_plain_products(deterministic: bool, path: str, tiny_model_path) -> None:
    settings = resolve.engine_settings(GRPOConfig(deterministic=deterministic), str(tiny_model_path("llama")))
    assert settings.rollout.lora_path == path


def test_kernels_that_are_not_deterministic_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.lora_path: punica adds in an order that differs"):
        GRPOConfig(deterministic=True, lora_path="punica")
    assert GRPOConfig(full_determinism=True).deterministic
