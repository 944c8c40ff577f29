"""The command itself, with real signals: it ends with status 0, says how to resume, and then resumes to the same result.

The processes of runs on the torch engine find no vLLM: such a run needs none.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import timeless

from rankup.grpo.cli.main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RANKUP = Path(sys.executable).with_name("rankup")
RUN_FILE = """
model: {{name: {model}, dtype: float32}}
lora: {{rank: 8, alpha: 16}}
rollout: {{engine: torch, num_generations: 4, max_prompt_length: 64, max_completion_length: 8, kv_cache_gib: 0.0625}}
optim: {{prompts_per_step: 3, max_steps: 12, learning_rate: 1e-2}}
data: {{train: rows.jsonl, eval: rows.jsonl}}
rewards: {{functions: reward.py:low_ids, isolation: process, num_workers: 1}}
logging: {{completions_steps: 3}}
"""
REWARD = """
import time

def low_ids(completion_ids, **kwargs):
    time.sleep(0.1)
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def project(tiny_model_path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file, its data and its reward function."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "run.yaml").write_text(RUN_FILE.format(model=tiny_model_path("llama")))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"count to {n}"}) + "\n" for n in range(8)))
    (folder / "reward.py").write_text(REWARD)
    (folder / "no_vllm" / "vllm").mkdir(parents=True)
    (folder / "no_vllm" / "vllm" / "__init__.py").write_text("raise ModuleNotFoundError('there is no vLLM', name='vllm')")
    return folder


def start(project: Path, *words: str, vllm: bool = False) -> subprocess.Popen[str]:
    path = [*([] if vllm else [str(project / "no_vllm")]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [RANKUP, *words], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip


def lines_until(process: subprocess.Popen[str], part: str) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip()
        if part in line:
            return
    raise AssertionError(f"the run ended without {part!r}: {process.communicate()[1]}")


def test_a_signal_ends_the_command_with_status_0_and_it_resumes_to_the_same_result(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    assert main(["train", "run.yaml", "logging.output_dir=undisturbed"]) == 0

    stopped = start(project, "train", "run.yaml", "logging.output_dir=stopped")
    list(lines_until(stopped, "step  2/12"))
    stopped.send_signal(signal.SIGINT)
    out, error = stopped.communicate(timeout=60)
    assert (stopped.returncode, error) == (0, "")
    lines = out.splitlines()
    assert any("SIGINT: finishing this step, then saving" in line for line in lines)
    (how_to_resume,) = [line.removeprefix("to resume: ") for line in lines if line.startswith("to resume: ")]
    assert how_to_resume == "rankup train run.yaml logging.output_dir=stopped --resume"
    assert json.loads((project / "stopped" / "summary.json").read_text())["interrupted"]

    program, *words = shlex.split(how_to_resume)
    assert program == "rankup"
    resumed = start(project, *words)
    out, error = resumed.communicate(timeout=300)
    assert (resumed.returncode, error) == (0, "")
    assert "resuming after step" in out
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (project / "stopped" / adapter).read_bytes() == (project / "undisturbed" / adapter).read_bytes()
    assert timeless(project / "stopped") == timeless(project / "undisturbed")


@pytest.mark.engine
def test_the_command_trains_with_vllm(engine_shelf, project: Path):
    engine_shelf.close()  # two do not fit
    changes = ["rollout.engine=vllm", "optim.max_steps=2", "logging.output_dir=vllm"]
    process = start(project, "train", "run.yaml", *changes, vllm=True)
    out, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, "")
    assert "step 2/2" in out and (project / "vllm" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_second_signal_ends_the_command_immediately(project: Path):
    (project / "slow.py").write_text(REWARD.replace("time.sleep(0.1)", "open('called', 'w').close(); time.sleep(60)"))
    process = start(
        project, "train", "run.yaml", "logging.output_dir=second", "rewards.functions=slow.py:low_ids", "data.eval=null"
    )
    while not (project / "called").exists():  # the first step is on its way
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    list(lines_until(process, "SIGTERM: finishing this step"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_an_error_shows_the_command_to_resume(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (project / "fails.py").write_text(REWARD.replace("time.sleep(0.1)", "assert kwargs['trainer_state'].global_step < 2"))
    monkeypatch.chdir(project)
    changes = ["rewards.functions=fails.py:low_ids", "data.eval=null", "rewards.isolation=inline"]
    assert main(["train", "run.yaml", "logging.output_dir=failed", *changes]) == 1
    out, error = capfd.readouterr()
    assert "the newest checkpoint is failed/checkpoints/step_000002" in " ".join(out.split())
    lines = error.splitlines()
    assert lines[0].startswith("rankup: error: reward function 'low_ids' failed")
    assert lines[-1].startswith("to resume: rankup train run.yaml logging.output_dir=failed") and lines[-1].endswith("--resume")


@pytest.mark.exhaustive
def test_the_soak_script_kills_resumes_and_counts(project: Path, tmp_path: Path):
    soak = [ROOT / "scripts" / "soak.py", "run.yaml", "--kills", "2", "--seed", "4", "--folder", tmp_path / "soak"]
    result = subprocess.run([*soak, "rewards.isolation=inline"], cwd=project, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 end with the same adapter, metrics and completions" in result.stdout.splitlines()[-1]
