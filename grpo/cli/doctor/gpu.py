"""What `rankup doctor` says of the GPU, of NVIDIA's driver, and of the compiler that Triton needs on CUDA.

The driver is asked through its library NVML, which is wherever a driver is: it answers without torch, and where torch can use
no GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .findings import Finding, Level, gib

LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The first release of NVIDIA's driver that runs programs built for a major version of CUDA."""
BF16_FROM = (8, 0)
WITHOUT_BF16 = (
    "no bf16 before compute capability 8.0: set model.dtype: float16, or float32, which takes twice the memory; torch computes "
    "attention and LoRA's products, without flash attention and Triton"
)


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver: its release, such as `580.65.06`, and the names of the GPUs that it lists."""

    release: str
    gpus: tuple[str, ...]

    @property
    def major(self) -> int:
        """580 of `580.65.06`."""
        return int(self.release.partition(".")[0])


def installed_driver() -> Driver | None:
    """The driver; None if there is none, or if it does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text, count = ctypes.create_string_buffer(96), ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return None
    release, names = text.value.decode(), []
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        handle = ctypes.c_void_p()
        failed = nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        if not failed and not nvml.nvmlDeviceGetName(handle, text, len(text)):
            names.append(text.value.decode())
    nvml.nvmlShutdown()
    return Driver(release, tuple(names))


def gpu() -> Iterator[Finding]:
    """Name, compute capability, driver and memory of the GPU, or why none can be used."""
    driver = installed_driver()
    if torch.cuda.is_available():
        yield _usable()
        yield _driver(driver)
        free, total = torch.cuda.mem_get_info()
        figures = {"total_bytes": float(total), "free_bytes": float(free)}
        yield Finding("GPU memory", f"{gib(total)}, {gib(free)} free", figures=figures)
    elif torch.version.cuda is not None:
        reason = "the driver lists no GPU" if driver is None or not driver.gpus else f"torch cannot use {driver.gpus[0]}"
        note = f"{reason}: check the driver and CUDA_VISIBLE_DEVICES, or run scripts/install.sh cpu to use the CPU"
        yield Finding("GPU", f"none, but torch is built for CUDA {torch.version.cuda}", note, "problem")
        yield _driver(driver)
    elif driver is not None and driver.gpus:
        note = "torch is built for the CPU: run scripts/install.sh cuda to use the GPU"
        yield Finding("GPU", f"{driver.gpus[0]}, not used", note, "warning")
    else:
        yield Finding("GPU", "none: runs use the CPU")


def _usable() -> Finding:
    """The GPU that torch uses, and what it cannot do."""
    capability, count = torch.cuda.get_device_capability(), torch.cuda.device_count()
    value = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    oldest = min((_capability(code) for code in torch.cuda.get_arch_list()), default=capability)
    if capability < oldest:
        note = f"torch {torch.__version__} has no code for it: it needs compute capability {oldest[0]}.{oldest[1]} or above"
        return Finding("GPU", value, note, "problem")
    if capability < BF16_FROM:
        return Finding("GPU", value, WITHOUT_BF16, "warning")
    return Finding("GPU", value, f"the first of {count}: each worker uses one (cluster.workers)" if count > 1 else "")


def _capability(code: str) -> tuple[int, int]:
    """Of `sm_90a` or `compute_120`."""
    digits = "".join(letter for letter in code.partition("_")[2] if letter.isdigit())
    return int(digits[:-1]), int(digits[-1])


def _driver(driver: Driver | None) -> Finding:
    built_for = f"torch is built for CUDA {torch.version.cuda}"
    if driver is None:
        return Finding("driver", f"unknown, {built_for}", "NVIDIA's libnvidia-ml.so.1 does not answer", "warning")
    least = LEAST_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]), 0)
    value = f"{driver.release}, {built_for}"
    if driver.major < least:
        return Finding("driver", value, f"too old: install NVIDIA's driver {least} or later on the host", "problem")
    return Finding("driver", value, f"{least} or later is needed" if least else "", "ok")


def compiler() -> Iterator[Finding]:
    """What Triton compiles a kernel's launcher with, at the first start on a GPU; nothing where torch is for the CPU."""
    if torch.version.cuda is None:
        return
    level: Level = "problem" if torch.cuda.is_available() else "warning"
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if found is not None and shutil.which(found) is not None:
        yield Finding("C compiler", found, "Triton's, for the launchers of its kernels", "ok")
    else:
        note = "Triton compiles the launchers of its kernels with one: apt install gcc, or set CC to a compiler"
        yield Finding("C compiler", f"CC={found} is not there" if found else "none", note, level)
    header = Path(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h")
    if header.is_file():
        yield Finding("Python.h", str(header), "Triton's, for the launchers of its kernels", "ok")
    else:
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        note = f"Triton compiles the launchers of its kernels against it: apt install {package}"
        yield Finding("Python.h", f"{header} is missing", note, level)
