"""What `rankup doctor` reports about the machine."""

import os
from pathlib import Path

import pytest
import torch

from rankup.grpo.cli.doctor import device
from rankup.grpo.cli.doctor.device import CHECKS, available_memory, cgroup_limits
from rankup.grpo.cli.doctor.findings import run_checks


def test_this_machine() -> None:
    found = {finding.name: finding for finding in run_checks(CHECKS)}
    assert {"GPU", "CPU", "memory", "/dev/shm"} <= set(found)
    assert [finding for finding in found.values() if finding.level == "problem"] == []
    assert found["CPU"].figures["cores"] == len(os.sched_getaffinity(0))
    memory = found["memory"].figures
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory["available_bytes"] < memory["total_bytes"] == pytest.approx(of_machine, rel=0.01)
    assert 0 < available_memory() < of_machine


def test_a_gpu_that_torch_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_nvidia_smi", lambda: ["NVIDIA H100, 580.65", "NVIDIA H100, 580.65"])
    for name, value in {
        "is_available": True,
        "get_device_capability": (9, 0),
        "mem_get_info": (2**34, 2**36),
        "device_count": 2,
        "get_device_name": "NVIDIA H100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    gpu, driver, memory = device.gpu()
    assert gpu.value == "NVIDIA H100, compute capability 9.0" and "the first of 2" in gpu.note
    assert driver.value.startswith("580.65, ") and memory.value == "64.0 GiB, 16.0 GiB free"
    assert memory.figures == {"total_bytes": 2.0**36, "free_bytes": 2.0**34}


@pytest.mark.parametrize(
    ("listed", "built_for", "level", "words"),
    [
        (["NVIDIA H100, 580.65"], None, "warning", "scripts/install.sh cuda"),
        (["NVIDIA H100, 580.65"], "13.0", "problem", "torch cannot use it"),
        ([], "13.0", "problem", "nvidia-smi lists no GPU"),
        ([], None, "info", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, listed: list[str], built_for: str | None, level: str, words: str
) -> None:
    monkeypatch.setattr(device, "_nvidia_smi", lambda: listed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    (gpu,) = device.gpu()
    assert gpu.level == level and words in gpu.note


def limits_of(folder: Path, membership: str, files: dict[str, str]) -> tuple[int | None, float | None]:
    """The limits if /proc/self/cgroup contains `membership` and /sys/fs/cgroup has `files`."""
    (folder / "membership").write_text(membership)
    for name, text in files.items():
        (folder / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / name).write_text(text)
    return cgroup_limits(folder / "groups", folder / "membership")


VERSION_1 = "4:memory:/pod/a\n3:cpu,cpuacct:/pod/a\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/\n", {}, (None, None)),
        ("0::/\n", {"memory.max": "max\n", "cpu.max": "max 100000\n"}, (None, None)),
        ("0::/\n", {"memory.max": "8589934592\n", "cpu.max": "150000 100000\n"}, (2**33, 1.5)),
        ("0::/pod/a\n", {"pod/a/memory.max": "4096\n", "memory.max": "max\n"}, (4096, None)),
        ("0::/not/seen/here\n", {"memory.max": "4096\n"}, (4096, None)),
        (VERSION_1, {"memory/pod/a/memory.limit_in_bytes": "4096\n"}, (4096, None)),
        (VERSION_1, {"cpu/pod/a/cpu.cfs_quota_us": "200000\n", "cpu/pod/a/cpu.cfs_period_us": "100000\n"}, (None, 2.0)),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, (None, None)),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, membership: str, files: dict[str, str], limits: tuple[int | None, float | None]
) -> None:
    assert limits_of(tmp_path, membership, files) == limits
