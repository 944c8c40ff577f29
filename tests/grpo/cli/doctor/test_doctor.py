"""`rankup doctor` on this machine: all is well; and what it says where something is missing or broken."""

import io
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rankup.grpo.cli.doctor import engine, paths, versions
from rankup.grpo.cli.doctor.doctor import as_json, problems
from rankup.grpo.cli.doctor.findings import Finding, examine
from rankup.grpo.cli.doctor.view import show_section, show_verdict

ROOT = Path(__file__).resolve().parents[4]
COMMAND = "import sys; from rankup.grpo.cli.main import main; sys.exit(main())"


def run_doctor(*arguments: str, folder: Path, without: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, where packages whose names begin with `without` are not installed."""
    options: list[str] = []
    if without:
        packages = folder / "packages"
        packages.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.startswith(without):
                (packages / path.name).symlink_to(path)
        (packages / "rankup").symlink_to(ROOT)
        options, environment["PYTHONPATH"] = ["-S"], str(packages)
    command = [sys.executable, *options, "-c", COMMAND, "doctor", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def by_name(findings: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in findings}


@pytest.mark.slow
def test_on_this_machine_all_is_well(tmp_path: Path) -> None:
    result = run_doctor(folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line for line in lines if line in ("device", "versions", "paths", "self-test", "engine")] == [
        "device",
        "versions",
        "paths",
        "self-test",
        "engine",
    ]
    assert lines[-1].startswith("all is well") and "FAIL" not in result.stdout and "\x1b" not in result.stdout


@pytest.mark.slow
def test_as_json(tmp_path: Path) -> None:
    result = run_doctor("--json", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["healthy"] is True and list(found["sections"]) == ["device", "versions", "paths", "self-test", "engine"]
    assert by_name(found["sections"]["versions"])["torch"]["value"] == torch.__version__
    assert by_name(found["sections"]["device"])["memory"]["figures"]["total_bytes"] > 0
    for kernel in found["sections"]["self-test"]:
        assert 0 <= kernel["figures"]["error"] <= kernel["figures"]["bound"], kernel
    pieces = by_name(found["sections"]["engine"])["vLLM's pieces"]
    assert pieces["level"] == "ok", pieces


@pytest.mark.slow
def test_without_vllm_runs_fail_and_kernels_are_tried_nevertheless(tmp_path: Path) -> None:
    result = run_doctor("--json", folder=tmp_path, without=("vllm",))
    assert (result.returncode, result.stderr) == (1, "")
    sections = json.loads(result.stdout)["sections"]
    vllm = by_name(sections["versions"])["vllm"]
    assert (vllm["level"], vllm["value"]) == ("problem", "not installed") and "scripts/install.sh" in vllm["note"]
    assert "vLLM is not installed" in by_name(sections["engine"])["vLLM"]["note"]
    assert {finding["level"] for finding in sections["self-test"]} == {"ok"}


@pytest.mark.slow
def test_without_bitsandbytes_runs_work(tmp_path: Path) -> None:
    result = run_doctor("--json", folder=tmp_path, without=("bitsandbytes",))
    assert (result.returncode, result.stderr) == (0, "")
    sections = json.loads(result.stdout)["sections"]
    version, path = by_name(sections["versions"])["bitsandbytes"], by_name(sections["paths"])["bitsandbytes"]
    assert version["level"] == path["level"] == "warning"
    assert "NF4" in version["note"] and "8-bit" in path["note"]
    assert {finding["name"] for finding in sections["self-test"] if finding["level"] == "warning"} == {"NF4, bf16", "NF4, fp32"}


def test_without_torch_only_versions_can_be_told(tmp_path: Path) -> None:
    result = run_doctor(folder=tmp_path, without=("torch",))
    assert (result.returncode, result.stderr) == (1, "")
    assert "FAIL  torch" in result.stdout and "run scripts/install.sh" in result.stdout


def test_versions_other_than_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.level for finding in versions.package("torch")] == ["ok"]
    monkeypatch.setitem(versions.NEEDED_FOR, "no-such-package", None)
    (missing,) = versions.package("no-such-package")
    assert (missing.level, missing.note) == ("problem", "run scripts/install.sh")
    judged = {version: versions._judged("vllm", version, "==0.32.*").level for version in ("0.32.7", "0.33.0")}
    assert judged == {"0.32.7": "ok", "0.33.0": "warning"}


def test_every_way_is_told_with_its_reason() -> None:
    found = {finding.name: finding for finding in examine(paths.CHECKS)}
    assert [finding for finding in found.values() if not finding.note or finding.level == "problem"] == []
    on_cpu = not torch.cuda.is_available()
    assert ("Triton" in found["norms, SwiGLU, logits"].value) is not on_cpu
    assert ("dense" in found["sampler's LoRA"].value.split(",")[0]) is on_cpu


@pytest.mark.parametrize(
    ("variable", "level"),
    [
        ("VLLM_ENABLE_V1_MULTIPROCESSING=1", "problem"),
        ("VLLM_USE_V2_MODEL_RUNNER=1", "problem"),
        ("OMP_NUM_THREADS=0", "warning"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="two of them do no harm on CUDA")
def test_a_variable_that_breaks_runs_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, level: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [finding.level for finding in engine.environment()] == ["ok"]
    monkeypatch.setenv(*variable.split("="))
    (finding,) = engine.environment()
    assert (finding.value, finding.level) == (variable, level) and "unset it" in finding.note


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    converted, _ = engine.caches()
    assert converted.level == "problem" and "set XDG_CACHE_HOME" in converted.note
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there" / "yet"))
    converted, _ = engine.caches()
    assert converted.level != "problem" and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_check_that_raises_is_a_problem_of_its_name_and_the_others_are_made(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy() -> list[Finding]:
        print("a remark", file=sys.stderr)
        return [Finding(name="third", value="made")]

    def fails() -> list[Finding]:
        raise RuntimeError("CUDA error: misaligned address\nmore of it")

    checks = {"first": fails, "second": lambda: [Finding(name="x", value=str(int("no number")))], "third": noisy}
    first, second, third = examine(checks)
    assert (first.name, first.level) == ("first", "problem")
    assert first.note == "RuntimeError: CUDA error: misaligned address (--traceback shows where)"
    assert (second.name, second.level) == ("second", "problem") and "no number" in second.note
    assert third.value == "made"
    assert capfd.readouterr() == ("", "")
    list(examine(checks, show_tracebacks=True))
    assert "in fails" in capfd.readouterr().err


FINDINGS = [
    Finding(name="one", value="a value " * 4, note="a reason that is rather long, as reasons are " * 3),
    Finding(name="two", value="fine", level="ok"),
    Finding(name="three", value="slow", level="warning", note="do this"),
    Finding(name="four", value="/a/folder/whose/name/is/as/long/as/names/of/folders/are/in/practice/and/longer/still"),
]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_wider_than_the_terminal_and_nothing_is_lost(width: int) -> None:
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, highlight=False)
    shown = show_section("device", iter(FINDINGS), console)
    show_verdict({"device": shown}, 3.0, console)
    text = buffer.getvalue()
    assert shown == FINDINGS and max(map(len, text.splitlines())) <= width
    squeezed = "".join(text.split())
    assert [f for f in FINDINGS for part in (f.value, f.note) if width == 60 and "".join(part.split()) not in squeezed] == []
    assert "all is well, 1 note (3 s)" in text


def test_a_problem_is_counted() -> None:
    broken = Finding(name="five", value="no", level="problem", note="do that")
    sections = {"device": [*FINDINGS, broken]}
    buffer = io.StringIO()
    show_verdict(sections, 3.0, Console(file=buffer, width=100))
    assert buffer.getvalue() == "1 problem, 1 note: a run will fail here (3 s)\n"
    assert problems(sections) == [broken] and as_json(sections, 3.0)["healthy"] is False
    assert as_json({"device": FINDINGS}, 3.0)["healthy"] is True
