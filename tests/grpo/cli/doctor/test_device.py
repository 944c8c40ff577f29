"""What `rankup doctor` reports about the machine."""

import os
from pathlib import Path

import pytest

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
