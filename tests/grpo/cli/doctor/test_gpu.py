"""What `rankup doctor` says of GPUs, drivers and compilers that this machine does not have."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from rankup.grpo.cli.doctor import gpu
from rankup.grpo.cli.doctor.findings import Finding
from rankup.grpo.cli.doctor.gpu import Driver

H100 = Driver("580.65.06", ("NVIDIA H100", "NVIDIA H100"))


def use_gpu(
    monkeypatch: pytest.MonkeyPatch,
    driver: Driver | None = H100,
    *,
    capability: tuple[int, int] = (9, 0),
    built_for: str | None = "13.0",
    is_available: bool = True,
) -> dict[str, Finding]:
    """The findings where torch and the driver answer like this."""
    monkeypatch.setattr(gpu, "installed_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    for name, value in {
        "is_available": is_available,
        "get_device_capability": capability,
        "get_arch_list": ["sm_75", "sm_80", "sm_90", "compute_120"],
        "mem_get_info": (2**34, 2**36),
        "device_count": 2,
        "get_device_name": "NVIDIA H100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    return {finding.name: finding for finding in gpu.gpu()}


def test_a_gpu_that_torch_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    found = use_gpu(monkeypatch)
    assert found["GPU"].value == "NVIDIA H100, compute capability 9.0" and "the first of 2" in found["GPU"].note
    assert (found["driver"].level, found["driver"].value) == ("ok", "580.65.06, torch is built for CUDA 13.0")
    assert found["GPU memory"].value == "64.0 GiB, 16.0 GiB free"
    assert found["GPU memory"].figures == {"total_bytes": 2.0**36, "free_bytes": 2.0**34}


@pytest.mark.parametrize(
    ("capability", "level", "words"),
    [
        ((7, 0), "problem", "it needs compute capability 7.5 or above"),
        ((7, 5), "warning", "model.dtype: float16"),
        ((8, 0), "info", "cluster.workers"),
        ((12, 0), "info", "cluster.workers"),
    ],
)
def test_what_a_card_cannot_do(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], level: str, words: str) -> None:
    found = use_gpu(monkeypatch, capability=capability)["GPU"]
    assert found.level == level and words in found.note


@pytest.mark.parametrize(
    ("release", "built_for", "level"),
    [
        ("550.54.14", "13.0", "problem"),
        ("580.65.06", "13.0", "ok"),
        ("610.10", "13.2", "ok"),
        ("550.54.14", "12.8", "ok"),
        ("470.82", "12.8", "problem"),
    ],
)
def test_the_driver_must_be_new_enough(monkeypatch: pytest.MonkeyPatch, release: str, built_for: str, level: str) -> None:
    found = use_gpu(monkeypatch, Driver(release, ("NVIDIA H100",)), built_for=built_for)["driver"]
    assert found.level == level
    assert (f"install NVIDIA's driver {525 if built_for < '13' else 580} or later" in found.note) == (level == "problem")


@pytest.mark.parametrize(
    ("driver", "built_for", "level", "words"),
    [
        (H100, None, "warning", "torch is built for the CPU: run scripts/install.sh cuda"),
        (H100, "13.0", "problem", "torch cannot use NVIDIA H100"),
        (Driver("580.65", ()), "13.0", "problem", "the driver lists no GPU"),
        (None, "13.0", "problem", "the driver lists no GPU"),
        (None, None, "info", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, built_for: str | None, level: str, words: str
) -> None:
    found = use_gpu(monkeypatch, driver, built_for=built_for, is_available=False)
    assert found["GPU"].level == level and words in found["GPU"].note
    assert ("driver" in found) == (built_for is not None)


def test_a_driver_too_old_for_torch_is_named_where_torch_finds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = use_gpu(monkeypatch, Driver("535.10", ("NVIDIA H100",)), is_available=False)
    assert found["driver"].level == "problem" and "driver 580 or later" in found["driver"].note


def compiler_findings(monkeypatch: pytest.MonkeyPatch, *, commands: dict[str, str], include: Path) -> dict[str, Finding]:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", commands.get)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(include)})
    return {finding.name: finding for finding in gpu.compiler()}


def test_compiler_and_header_for_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").write_text("")
    commands = {"gcc": "/usr/bin/gcc", "/usr/bin/gcc": "/usr/bin/gcc"}
    found = compiler_findings(monkeypatch, commands=commands, include=tmp_path)
    assert [(one.level, one.value) for one in found.values()] == [("ok", "/usr/bin/gcc"), ("ok", str(tmp_path / "Python.h"))]


def test_a_missing_compiler_and_header_are_problems_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    found = compiler_findings(monkeypatch, commands={}, include=tmp_path)
    assert [one.level for one in found.values()] == ["problem", "problem"]
    assert "apt install gcc" in found["C compiler"].note and "apt install python3." in found["Python.h"].note
    monkeypatch.setenv("CC", "/no/such/cc")
    found = compiler_findings(monkeypatch, commands={"gcc": "/usr/bin/gcc"}, include=tmp_path)
    assert found["C compiler"].value == "CC=/no/such/cc is not there"


def test_torch_for_the_cpu_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert list(gpu.compiler()) == []
