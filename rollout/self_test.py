"""Self-test of everything that rankup uses of vLLM's internals, without starting an engine.

    vllm_device()                                                  # "cpu" or "cuda": the device of the installed vLLM
    {use: error for use, error in self_test().items() if error}    # empty with a supported vLLM

The functions that build an engine and sample with it are called as in a run, on empty modules: each asks for the attributes
that it needs and raises if one is missing. Slots and adapter of a real engine are verified at the start of every run, and
by `rankup check`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from . import cpu_ops, dense_lora, vllm_compat
from .base_weights import find_base_weights
from .config import RolloutConfig, SamplingConfig
from .engine import EngineSettings, engine_args
from .sampling_params import sampling_params
from .slots import find_slots


def vllm_device() -> str:
    """The device type of the installed vLLM; empty if it finds none.

    Raises:
        ValueError: vLLM is not installed, or set to run its engine in another process.
    """
    vllm_compat.import_vllm()
    from vllm.platforms import current_platform

    return current_platform.device_type


def self_test() -> dict[str, Exception | None]:
    """Each use of vLLM's internals on its device, and the error that it raises."""
    device = vllm_device()
    module = nn.Module()
    module.packed_modules_mapping = {}  # type: ignore[assignment]
    # An existing folder: vLLM checks that it exists and reads nothing in it.
    settings = EngineSettings(
        model=os.getcwd(), rollout=RolloutConfig(), target_modules=("q_proj",), nf4_weights=("q_proj.weight",)
    )
    sampling = SamplingConfig(num_generations=2, max_completion_length=1, stop=["a"])
    uses: dict[str, Callable[[], object]] = {
        "engine arguments": lambda: engine_args(settings, on_cpu=device == "cpu"),
        "sampling parameters": lambda: sampling_params(sampling, 0, stop_token_ids=[1]),
        "adapter slots": lambda: find_slots(module, settings.model),
        "base weights": lambda: find_base_weights(module, settings.model),
        "unpacked linear weights": lambda: vllm_compat.keep_linear_weights(module),
        "addresses of LoRA buffers": vllm_compat.forget_lora_pointers,
        "dense LoRA": lambda: _make_lora_wrappers(device),
    }
    if device == "cpu":
        uses |= {
            "norms": vllm_compat.cpu_norms,
            "sampling tokens": _sample_likeliest_token,
            "adapted layers": lambda: vllm_compat.replace_cpu_layers(module),
        }
    errors: dict[str, Exception | None] = dict.fromkeys(uses)
    for use, call in uses.items():
        try:
            call()
        except (AttributeError, ImportError, TypeError, ValueError) as error:  # what other versions of vLLM may lead to
            errors[use] = error
    return errors


def _make_lora_wrappers(device: str) -> None:
    for dense in (False, True):
        name = dense_lora.wrapper_name(device, dense=dense, head=True)
        assert name is not None
        with vllm_compat.lora_wrapper_replaced(name):
            getattr(dense_lora, name.rpartition(".")[2])


def _sample_likeliest_token() -> None:
    tokens, _ = cpu_ops.sample(torch.tensor([[0.0, 9.0]]), {}, torch.tensor([1]), None)
    if tokens.tolist() != [1]:
        raise ValueError("top-k 1 sampled a token that is not the likeliest")
