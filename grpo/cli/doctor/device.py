"""The device of a run, and the machine around it: what the section `device` of `rankup doctor` shows.

    for finding in examine(CHECKS): ...
    available_memory()          # bytes of RAM that a process may still take
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .findings import Check, Finding, gib

CGROUPS = Path("/sys/fs/cgroup")
LITTLE_SHARED_MEMORY = 2**30


def gpu() -> Iterator[Finding]:
    """Name, compute capability and memory of the GPU, or why there is none to be used."""
    import torch

    there = _seen_by_driver()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        more = torch.cuda.device_count() - 1
        note = f"the first of {more + 1}: a worker is one device (cluster.workers)" if more else ""
        yield Finding(name="GPU", value=f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}", note=note)
        driver = there[0].partition(", ")[2] if there else "unknown"
        yield Finding(name="driver", value=f"{driver}, torch is built for CUDA {torch.version.cuda}")
        figures = {"total_bytes": float(total), "free_bytes": float(free)}
        yield Finding(name="GPU memory", value=f"{gib(total)}, {gib(free)} free", figures=figures)
    elif torch.version.cuda is not None:
        reason = "the driver shows one (nvidia-smi), but torch cannot use it" if there else "the driver shows none (nvidia-smi)"
        note = f"{reason}: see to the driver and CUDA_VISIBLE_DEVICES, or install for the CPU with scripts/install.sh cpu"
        yield Finding(name="GPU", value=f"none for this torch, built for CUDA {torch.version.cuda}", level="problem", note=note)
    elif there:
        note = "this installation is for the CPU, and runs there: scripts/install.sh cuda makes one for the GPU"
        yield Finding(name="GPU", value=f"{there[0]}, not used", level="warning", note=note)
    else:
        yield Finding(name="GPU", value="none: runs take the CPU")


def _seen_by_driver() -> list[str]:
    """`name, driver's version` of each GPU that NVIDIA's driver shows."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return result.stdout.strip().splitlines() if result.returncode == 0 else []


def processor() -> Iterator[Finding]:
    """Model, cores that this process may use, and the instructions that make bf16 fast."""
    import torch

    usable, of_machine = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    cores = f"{usable} cores" if usable == of_machine else f"{usable} of {of_machine} cores"
    limit = cgroup_limits()[1]
    lower = limit is not None and limit < usable
    note = f"a limit of its control group: {limit:g} of them at a time" if lower else ""
    yield Finding(name="processor", value=f"{_processor_name()}, {cores}", note=note, figures={"cores": float(usable)})
    if platform.machine() not in ("x86_64", "AMD64"):
        yield Finding(name="instructions", value=torch.backends.cpu.get_cpu_capability())
        return
    sets = {
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX-512 bf16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    has = ", ".join(name for name, supported in sets.items() if supported) or "none of AVX-512, AVX-512 bf16, AMX"
    slow = not (sets["AVX-512 bf16"] or sets["AMX"] or torch.cuda.is_available())
    note = "bf16 is emulated, which is slow: model.dtype=float32 may be faster" if slow else ""
    yield Finding(name="instructions", value=has, level="warning" if slow else "info", note=note)


def _processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()  # other architectures than x86 name no model there


def memory() -> Iterator[Finding]:
    """RAM, what of it is available, and shared memory."""
    total, available = _meminfo()["MemTotal"], available_memory()
    limit = cgroup_limits()[0]
    lower = limit is not None and limit < total
    yield Finding(
        name="memory",
        value=f"{gib(total)}, {gib(available)} available",
        note=f"a limit of its control group: {gib(limit)}" if lower and limit is not None else "",
        figures={"total_bytes": float(total), "available_bytes": float(available)},
    )
    shared = shutil.disk_usage("/dev/shm")
    small = shared.total < LITTLE_SHARED_MEMORY
    yield Finding(
        name="/dev/shm",
        value=f"{gib(shared.total)}, {gib(shared.free)} free",
        level="warning" if small else "info",
        note="little for Ray's object store: start the container with --shm-size=8g" if small else "",
    )


def available_memory() -> int:
    """Bytes of RAM that a process may still take: the machine's, or its control group's if that is less."""
    available = _meminfo()["MemAvailable"]
    limit = cgroup_limits()[0]
    return available if limit is None else min(available, limit)


def _meminfo() -> dict[str, int]:
    """Bytes by the kernel's names."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}


def cgroup_limits(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> tuple[int | None, float | None]:
    """Bytes of memory and number of processors that the control group allows, None where it sets no limit.

    Its own folder is looked into, and that at the root: within a container only the latter may be there. Versions 1 and 2.
    """
    groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    memory_limits: list[int] = []
    processors: list[float] = []
    for controllers, path in groups:
        for below in {path.strip("/"), ""}:
            folder = root / below
            memory_limits += _numbers(folder / "memory.max")[:1]
            processors += _ratio(_numbers(folder / "cpu.max"))
            if "memory" in controllers.split(","):
                memory_limits += _numbers(root / "memory" / below / "memory.limit_in_bytes")
            if "cpu" in controllers.split(","):
                quota = _numbers(root / "cpu" / below / "cpu.cfs_quota_us")
                processors += _ratio([*quota, *_numbers(root / "cpu" / below / "cpu.cfs_period_us")])
    return min(memory_limits, default=None), min(processors, default=None)


def _numbers(file: Path) -> list[int]:
    """The numbers in a file; none where it is not there, or begins with a word (`max`) or a negative number: no limit."""
    words = file.read_text().split() if file.is_file() else []
    return [int(word) for word in words] if words and words[0].isdigit() else []


def _ratio(quota_and_period: list[int]) -> list[float]:
    return [quota_and_period[0] / quota_and_period[1]] if len(quota_and_period) == 2 else []


CHECKS: dict[str, Check] = {"GPU": gpu, "processor": processor, "memory": memory}
