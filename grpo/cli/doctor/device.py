"""The section `device` of `rankup doctor`: GPU, CPU and memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from .findings import Check, Finding, gib
from .gpu import compiler, gpu

SMALL_SHARED_MEMORY = 2**30


def processor() -> Iterator[Finding]:
    """Model, cores that this process may use, and the instructions that make bf16 fast."""
    cpu = torch.cpu.get_capabilities()
    usable, total, limit = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cgroup_limits()[1]
    cores = f"{usable} cores" if usable == total else f"{usable} of {total} cores"
    note = f"limited to {limit:g} cores by its control group" if limit is not None and limit < usable else ""
    yield Finding("CPU", f"{cpu.get('cpu_name', cpu['architecture'])}, {cores}", note, figures={"cores": float(usable)})
    if cpu["architecture"] != "x86_64":
        yield Finding("CPU instructions", torch.backends.cpu.get_cpu_capability())
        return
    names = {"avx512_f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX"}
    supported = ", ".join(name for flag, name in names.items() if cpu[flag]) or "no AVX-512, AVX-512 bf16 or AMX"
    if cpu["avx512_bf16"] or cpu["amx_bf16"] or torch.cuda.is_available():
        yield Finding("CPU instructions", supported)
    else:
        yield Finding("CPU instructions", supported, "bf16 is emulated and slow: model.dtype=float32 may be faster", "warning")


def memory() -> Iterator[Finding]:
    """RAM and shared memory."""
    total, available, limit = psutil.virtual_memory().total, available_memory(), cgroup_limits()[0]
    note = f"limited to {gib(limit)} by its control group" if limit is not None and limit < total else ""
    figures = {"total_bytes": float(total), "available_bytes": float(available)}
    yield Finding("memory", f"{gib(total)}, {gib(available)} available", note, figures=figures)
    shared = shutil.disk_usage("/dev/shm")
    value = f"{gib(shared.total)}, {gib(shared.free)} free"
    if shared.total < SMALL_SHARED_MEMORY:
        yield Finding("/dev/shm", value, "too small for Ray's object store: start the container with --shm-size=8g", "warning")
    else:
        yield Finding("/dev/shm", value)


def available_memory() -> int:
    """Bytes of RAM that this process can still use."""
    return min(psutil.virtual_memory().available, cgroup_limits()[0] or 2**63)


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[int | None, float | None]:
    """Bytes of memory and number of cores that the control group (version 1 or 2) allows; None for no limit.

    Both the group's folder and the root are read: in a container only the root may be visible.
    """
    paths = {line.split(":", 2)[2].strip("/") for line in membership.read_text().splitlines()} | {""}
    folders = [root / controller / path for controller in ("", "memory", "cpu") for path in paths]
    memory_files = [folder / name for folder in folders for name in ("memory.max", "memory.limit_in_bytes")]
    memory = [number for file in memory_files for number in _numbers(file)]
    quotas = [_numbers(folder / "cpu.max") for folder in folders]
    quotas += [_numbers(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in folders]
    cores = [numbers[0] / numbers[1] for numbers in quotas if numbers]
    return min(memory, default=None), min(cores, default=None)


def _numbers(*files: Path) -> list[int]:
    """The numbers in these files; none if one is missing or holds `max` or a negative number, which mean no limit."""
    words = [word for file in files for word in (file.read_text().split() if file.is_file() else ["max"])]
    return [int(word) for word in words] if all(word.isdigit() for word in words) else []


CHECKS: dict[str, Check] = {"GPU": gpu, "compiler": compiler, "CPU": processor, "memory": memory}
