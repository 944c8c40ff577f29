"""`scripts/gpu_check.sh` on the CPU: every step at the smallest sizes, in one report; and errors in its options."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")


def environment() -> dict[str, str]:
    """With this environment's commands first in PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run_script(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *words], env=environment(), capture_output=True, text=True, timeout=timeout)


def steps(folder: Path) -> dict[str, str]:
    """The outcome of each step."""
    rows = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    return {name: word for name, word, _, _ in rows}


def test_help() -> None:
    result = run_script("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Examples:" in result.stdout and "--model Qwen/Qwen2.5-0.5B-Instruct" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu"], "unknown option '--gpu'"),
        (["--steps"], "--steps needs a value"),
        (["--cpu", "--steps", "0"], "--steps must be an integer of at least 1, not '0'"),
        (["--cpu", "--output", str(SCRIPT.parent)], "is not empty: choose another folder"),
        (["--cpu", "--tiny"], "--wheels and --tiny need --no-engine"),
        (["--cpu", "--no-engine", "--limit", "soon"], "--limit must be an integer of at least 1, not 'soon'"),
    ],
)
def test_wrong_options_are_an_error_in_one_line(words: list[str], message: str) -> None:
    result = run_script(*words)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("gpu_check: ") and message in line


@WITHOUT_GPU
def test_without_a_gpu_it_stops_with_an_error(tmp_path: Path) -> None:
    result = run_script("--output", str(tmp_path / "report"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "torch finds no GPU" in result.stderr and "gpu_check.sh --cpu" in result.stderr
    assert not (tmp_path / "report").exists()


def test_the_report_shows_what_the_benchmarks_print(tmp_path: Path) -> None:
    names = ("train_step", "rollout", "rank", "vs_trl")
    (tmp_path / "bench").mkdir()
    for name in names:
        shutil.copy(SCRIPT.parents[1] / "docs" / "performance" / f"{name}.json", tmp_path / "bench")
    (tmp_path / "steps.tsv").write_text("train_step\tok\t3\tscripts/bench/train_step.py\n")
    subprocess.run([sys.executable, "-P", SCRIPT.with_name("gpu_report.py"), tmp_path], check=True, timeout=60)
    report = (tmp_path / "report.md").read_text()
    assert [f"## Benchmark {name}" for name in sorted(names)] == [line for line in report.splitlines() if "Benchmark" in line]
    assert "| 64+64 | rankup | **" in report and "\n- 64+64: " in report


@WITHOUT_GPU
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_step_on_the_cpu_writes_its_log_and_its_part_of_the_report(tiny_model_path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    result = run_script("--cpu", "--output", str(folder), "--model", str(tiny_model_path("llama")), timeout=1200)
    logs = {path.stem: path.read_text() for path in (folder / "logs").glob("*.log")}
    assert result.returncode == 0, (result, logs)
    names = ["doctor", "kernels", "check", "train", "eval", "kernel_times", "learner-tiny", "train_step"]
    assert steps(folder) == dict.fromkeys(names, "ok") and logs.keys() == set(names)
    assert json.loads((folder / "doctor.json").read_text())["healthy"] is True
    assert "comparisons passed" in logs["check"] and "passed" in logs["kernels"] and "reward" in logs["eval"]
    report = (folder / "report.md").read_text()
    for part in ("## Device", "## Versions", "## Paths", "kernels pass", "## Steps", "## Run", "## Benchmark train_step"):
        assert part in report
    assert "![Learning curve](run/learning_curve.png)" in report and "| 16+8 | rankup |" in report
    run = report.partition("## Run")[2].partition("## Benchmark")[0]
    assert "| step | reward | loss | gradient |" in run and "\n| 1 | " in run and "\n| 2 | " in run
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] > 0 for line in metrics if "reward" in line] == [True, True]


ABSENT = ("vllm", "hypothesis", "bitsandbytes", "ray", "trl", "datasets", "pytest", "gguf", "reasoning_gym", "rankup", "__edit")
"""What a machine with torch and transformers alone does not have, by the first letters of its files."""


def bare_environment(folder: Path, absent: tuple[str, ...]) -> dict[str, str]:
    """With a `python3` that has this environment's packages without those `absent`."""
    packages, commands = folder / "packages", folder / "bin"
    packages.mkdir(parents=True)
    commands.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(absent):
            (packages / path.name).symlink_to(path)
    (commands / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    (commands / "python3").chmod(0o755)
    return os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}


@WITHOUT_GPU
@pytest.mark.slow
def test_without_an_engine_it_needs_torch_and_transformers_alone(tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = [SCRIPT, "--no-engine", "--cpu", "--output", report]
    environment = bare_environment(tmp_path / "python", ABSENT)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    logs = {path.stem: path.read_text() for path in (report / "logs").glob("*.log")}
    assert (result.returncode, result.stderr) == (0, ""), (result, logs)
    names = ["self_test", "kernel_times", "learner-tiny", "learner-tiny-nf4"]
    assert steps(report) == dict.fromkeys(names, "ok") and logs.keys() == set(names)
    text = (report / "report.md").read_text()
    assert "- on cpu: 21 of 21 pass" in text and "| tiny | gate, up | backward | 48 → 32 |" in text
    assert "- two equal updates, default: bit-identical\n" in text and "- tiny, NF4: not measured: bitsandbytes" in text
    learner = json.loads((report / "bench" / "learner-tiny.json").read_text())
    assert learner["is_finite"] and learner["versions"]["rankup"] and learner["memory"]["plan"]["parts"]["base_weights"] > 0
    assert learner["equal_updates"]["default"]["gradients"] == {"tensors": 28, "different": {}}


@WITHOUT_GPU
@pytest.mark.slow
def test_without_pydantic_the_kernels_run_and_the_learner_says_what_is_missing(tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = [SCRIPT, "--no-engine", "--cpu", "--output", report]
    environment = bare_environment(tmp_path / "python", (*ABSENT, "pydantic", "peft"))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1, result
    assert steps(report) == {
        "self_test": "ok",
        "kernel_times": "ok",
        "learner-tiny": "failed (1)",
        "learner-tiny-nf4": "failed (1)",
    }
    assert "- tiny: not measured: not installed: peft, pydantic\n" in (report / "report.md").read_text()


@WITHOUT_GPU
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_failed_step_is_reported_and_ctrl_c_still_writes_the_report(tmp_path: Path) -> None:
    """The model folder is empty, so the check fails; the interrupt comes during one of the next steps."""
    folder = tmp_path / "report"
    (tmp_path / "model").mkdir()
    # Like a terminal, even if these tests run in the background of a shell, where SIGINT is ignored.
    command = ["env", "--default-signal=INT", SCRIPT, "--cpu", "--output", folder, "--model", tmp_path / "model"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 600
        while "check" not in (steps(folder) if (folder / "steps.tsv").exists() else {}) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=120)[0]
    assert process.returncode == 130, shown
    assert shown.splitlines()[-1] == f"report: {folder / 'report.md'}"
    outcomes = steps(folder)
    assert outcomes["check"] == "failed (1)" and list(outcomes.values())[-1] == "interrupted"
    report = (folder / "report.md").read_text()
    assert "the folder has no config.json" in report and "interrupted" in report
