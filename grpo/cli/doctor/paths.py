"""Which of several ways will be taken here, and why: the section `paths` of `rankup doctor`.

    for finding in examine(CHECKS): ...

Nothing is decided here: the very functions are asked that decide in a run, with tensors as a run has them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from .findings import Check, Finding


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def lora_product() -> Iterator[Finding]:
    """The product of base weight and adapter, forward and backward."""
    import torch

    from ....kernels import lora

    if lora._has_kernel(torch.zeros(1, 64, dtype=torch.bfloat16, device=_device())):
        note = "16-bit operands, compute capability of at least 8.0; with model.dtype: float32 by torch"
        yield Finding(name="LoRA product", value="Triton: one kernel for base and adapter", note=note)
    else:
        yield Finding(name="LoRA product", value="torch: a product each", note=_why_no_kernel())


def _why_no_kernel() -> str:
    import torch

    if not torch.cuda.is_available():
        return "the kernel is for CUDA devices"
    major, minor = torch.cuda.get_device_capability()
    return f"the kernel asks for compute capability 8.0, this device has {major}.{minor}"


def row_kernels() -> Iterator[Finding]:
    """RMSNorm, SwiGLU, and the rows of logits."""
    import torch

    from ....kernels.device import runs_triton

    has = runs_triton(torch.zeros(1, device=_device()))
    value, note = ("Triton", "on CUDA, in every dtype") if has else ("torch", "the kernels are for CUDA devices")
    yield Finding(name="norms, SwiGLU, logits", value=value, note=note)


def attention() -> Iterator[Finding]:
    """Attention over shared prompts."""
    import torch

    from ....kernels import attention_varlen

    query = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=_device())
    if attention_varlen.is_available_for(query):
        note = "heads of up to 192 numbers, a multiple of 8; other models and float32: batched products of torch"
        yield Finding(name="attention", value="flash kernels of torch, one call a pack", note=note)
    else:
        note = "flash kernels are for bf16 on CUDA since Ampere; on CPU these are faster than torch's"
        yield Finding(name="attention", value="batched products of torch", note=note)


def sampler() -> Iterator[Finding]:
    """Whose base weights are whose, how vLLM multiplies with the adapter, and whether it runs graphs."""
    from ....rollout.vllm_compat import import_vllm

    import_vllm()
    from vllm.platforms import current_platform

    if current_platform.device_type == "cpu":
        note = "vLLM repacks linear layers for the CPU; model.share_base_weights: true shares them, and samples more slowly"
        yield Finding(name="base weights", value="embeddings, head, norms held once", note=note)
        note = "one adapter: two products a layer. vLLM's own way copies it for every token on CPU"
        yield Finding(name="sampler's LoRA", value="dense, the head too", note=note)
        yield Finding(name="sampler", value="eager", note="vLLM compiles nothing with LoRA on CPU")
        return
    note = "for trainer and vLLM together (model.share_base_weights)"
    yield Finding(name="base weights", value="held once", note=note)
    note = "vLLM's own kernels; rollout.lora_path: dense takes two products a layer instead"
    yield Finding(name="sampler's LoRA", value="punica, the head dense", note=note)
    note = "rollout.enforce_eager: true for none; vLLM's first model runner, as on CPU"
    yield Finding(name="sampler", value="compiled, CUDA graphs", note=note)


def nf4() -> Iterator[Finding]:
    """bitsandbytes' native library for this device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Finding(name="bitsandbytes", value="not installed", level="warning", note="no NF4 base and no 8-bit optimizer")
        return
    import torch
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        reason = lib.error_msg.strip().splitlines()[0]
        note = f"no NF4 base and no 8-bit optimizer: its native library does not load ({reason})"
        yield Finding(name="bitsandbytes", value="without its native library", level="warning", note=note)
        return
    kind = "CUDA" if getattr(lib, "compiled_with_cuda", False) else "the CPU"
    fits = (kind == "CUDA") == torch.cuda.is_available()
    paged = "paged ones too" if kind == "CUDA" else "paged ones on CUDA only"
    fit = f"NF4 base weights, 8-bit optimizers ({paged})"
    note = fit if fits else "not this device's: NF4 and 8-bit optimizers will be slow or fail"
    yield Finding(name="bitsandbytes", value=f"native library for {kind}", level="info" if fits else "warning", note=note)


def sandbox() -> Iterator[Finding]:
    """What runs code that a model wrote."""
    from ....rewards.sandbox import bubblewrap_problem

    problem = bubblewrap_problem()
    if problem is None:
        yield Finding(name="code rewards", value="bubblewrap", note="no network, no files, limits on all it takes")
    else:
        note = f"{problem}. Rewards that run code are refused: apt install bubblewrap, or unsafe_local: true without isolation"
        yield Finding(name="code rewards", value="no sandbox", level="warning", note=note)


def ray() -> Iterator[Finding]:
    """Where workers and rewards of a cluster would be."""
    address = os.environ.get("RAY_ADDRESS")
    value = f"the cluster at {address}" if address else "a cluster of this machine"
    note = "RAY_ADDRESS says so" if address else "RAY_ADDRESS is not set; for cluster.workers and rewards.isolation: ray"
    yield Finding(name="Ray", value=value, note=note)


CHECKS: dict[str, Check] = {
    "LoRA product": lora_product,
    "norms, SwiGLU, logits": row_kernels,
    "attention": attention,
    "sampler": sampler,
    "bitsandbytes": nf4,
    "code rewards": sandbox,
    "Ray": ray,
}
