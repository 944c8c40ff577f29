"""float16 on a CUDA device: gradients with the loss scale, and cards that have no bf16 (NULLCUDA_GPU=t4)."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from sample_groups import random_groups

from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import GRPOConfig
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner
from rankup.kernels.device import check_dtype

pytestmark = pytest.mark.nullcuda


@pytest.fixture
def gradient(tiny_model_path):
    """A function that gives the gradient of a step on a device."""

    def of(device: str, dtype: Literal["float16", "float32"]) -> tuple[torch.Tensor, Learner]:
        config = GRPOConfig(
            dtype=dtype, rank=16, alpha=8, mode="none", guards={"enabled": False}, initial_loss_scale=2.0**24
        )
        with quiet_stderr():
            policy = Policy(str(tiny_model_path("llama")), lora=config.lora, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in policy.layers.values():
                layer.master_b.copy_(0.05 * torch.randn(layer.master_b.shape, generator=generator))
        policy.write_slots()
        learner = Learner(policy, config)
        assert learner.backward(random_groups([(7, [5, 1, 9]), (3, [3, 6])])).stats is not None
        return torch.cat([m.grad.flatten().cpu() for m in policy.masters if m.grad is not None]), learner

    return of


def test_gradients_after_an_overflow_are_those_of_fp32(gradient) -> None:
    exact, _ = gradient("cpu", "float32")
    found, learner = gradient("cuda", "float16")
    assert learner.loss_scale is not None and learner.loss_scale.overflows > 0
    assert (found - exact).norm() < 5e-3 * exact.norm()


def test_bf16_needs_a_card_that_has_it() -> None:
    if torch.cuda.get_device_capability() >= (8, 0):
        check_dtype("bfloat16", "cuda")
    else:
        with pytest.raises(ValueError, match=r"compute capability 8.0 .* has 7.5: set model.dtype=float16"):
            check_dtype("bfloat16", "cuda")
    check_dtype("float16", "cuda")
    check_dtype("float32", "cuda")
