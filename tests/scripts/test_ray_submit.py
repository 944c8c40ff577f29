"""What `scripts/ray_submit.sh` submits, and a job that it submits for real."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import steps_of

from rankup.grpo.cli.main import parse
from rankup.kernels.device import native_dtype

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ray_submit.sh"
QUICKSTART = SCRIPT.parents[1] / "configs" / "quickstart.yaml"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where this `rankup` is
RUN_FILE = """
model: {{name: {model}, dtype: float32}}
lora: {{rank: 8, alpha: 16}}
rollout: {{num_generations: 4, max_prompt_length: 64, max_completion_length: 8, kv_cache_gib: 0.0625}}
optim: {{prompts_per_step: 3, max_steps: 2, learning_rate: 1e-2}}
data: {{train: data/rows.jsonl}}
rewards: {{functions: low_ids.py:low_ids}}
logging: {{output_dir: out/tiny}}
"""
REWARD = """
def low_ids(completion_ids, **kwargs):
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]
"""


def make_project(folder: Path, *, model: str) -> Path:
    """A folder with a run file, data that git ignores, and a reward function."""
    (folder / "data").mkdir(parents=True)
    (folder / "run.yaml").write_text(RUN_FILE.format(model=model))
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"count to {n}"}) + "\n" for n in range(8)))
    (folder / "low_ids.py").write_text(REWARD)
    (folder / ".gitignore").write_text("data/\n")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project", model="smollm2-135m-instruct")


def run_script(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_", "RAY_"))}
    return subprocess.run(
        [SCRIPT, *words], cwd=folder, env=variables | {"PATH": PATH} | environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


def dry_run(folder: Path, *words: str, **environment: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The runtime environment, the arguments of `ray job submit`, and the command of the job."""
    result = run_script(folder, "--dry-run", *words, **environment)
    assert result.returncode == 0, result.stderr
    *runtime_env, command = result.stdout.splitlines()
    words_of_command = shlex.split(command)
    assert words_of_command[:6] == [
        "RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1", "ray", "job", "submit", "--runtime-env", "FILE",
    ]  # fmt: skip
    at = words_of_command.index("--")
    return yaml.safe_load("\n".join(runtime_env)), words_of_command[6:at], words_of_command[at + 1 :]


def refusal(folder: Path, *words: str) -> str:
    result = run_script(folder, "--dry-run", *words)
    assert (result.returncode, result.stdout) == (1, "")
    return result.stderr


def test_help(tmp_path: Path):
    result = run_script(tmp_path, "--help")
    assert result.returncode == 0
    assert "Examples:" in result.stdout


def test_the_folder_is_uploaded_and_the_run_folder_stays_in_the_folder_of_the_call(project: Path):
    runtime_env, submit, command = dry_run(project, "run.yaml", "seed=3", "--resume")
    assert runtime_env["working_dir"] == str(project)
    assert {".git", ".venv", "/runs", "*.safetensors", "/out/tiny", "/out/tiny.*"} <= set(runtime_env["excludes"])
    assert list(runtime_env["env_vars"]) == ["PATH"]
    assert command == ["rankup", "train", "run.yaml", "seed=3", f"logging.output_dir={project}/out/tiny", "--resume"]
    options = parse(command[1:])
    assert (options.file, options.resume) == (Path("run.yaml"), True)
    name, submission = submit
    assert name == "--submission-id" and submission.startswith("rankup-run-")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("logging.output_dir=mine", "logging.output_dir={project}/mine"),
        ('output_dir="a: b"', 'logging.output_dir="{project}/a: b"'),
        ("logging.output_dir=/elsewhere", None),
    ],
)
def test_a_relative_run_folder_becomes_absolute(project: Path, override: str, expected: str | None):
    *_, command = dry_run(project, "run.yaml", override)
    assert command[4:] == ([] if expected is None else [expected.format(project=project)])


def test_a_model_in_a_folder_gets_an_absolute_path_and_is_not_uploaded(project: Path):
    (project / "model").mkdir()
    *_, command = dry_run(project, "run.yaml", "model.name=model")
    assert command[-1] == f"model.name={project}/model"


def test_a_run_file_may_have_an_absolute_path(project: Path):
    *_, command = dry_run(project, str(project / "run.yaml"))
    assert command[:3] == ["rankup", "train", "run.yaml"]


def test_variables_are_passed_by_name_and_their_values_are_not_printed(project: Path):
    secrets = {"HF_TOKEN": "a secret", "MINE": "another secret", "HF_HOME": "/of/this/machine"}
    result = run_script(project, "--dry-run", "--env", "MINE", "run.yaml", **secrets)
    assert "secret" not in result.stdout + result.stderr
    runtime_env, *_ = dry_run(project, "--env", "MINE", "run.yaml", **secrets)
    assert list(runtime_env["env_vars"]) == ["PATH", "HF_TOKEN", "MINE"]


def test_words_after_the_dashes_go_to_ray(project: Path):
    _, submit, command = dry_run(project, "run.yaml", "--", "--no-wait", "--submission-id=mine", "--address", "http://head:8265")
    assert submit == ["--no-wait", "--submission-id=mine", "--address", "http://head:8265"]
    assert "--no-wait" not in command


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "run file missing"),
        (["no_such.yaml"], "run file not found: no_such.yaml"),
        (["run.yaml", "lora.rnk=3"], "lora.rnk: unknown key"),
        (["--env"], "--env needs the name of a variable"),
        (["--env", "NO_SUCH_VARIABLE", "run.yaml"], "--env: NO_SUCH_VARIABLE is not set"),
        (["run.yaml", "--", "--runtime-env-json={}"], "this script makes the runtime environment"),
        (["../outside.yaml"], "outside.yaml is not in the current folder"),
        (["runs/old/config.yaml"], "is in a folder of runs, which is not uploaded"),
        (["out/tiny/config.yaml"], "is in a folder of runs, which is not uploaded"),
    ],
)
def test_an_error_is_one_line(project: Path, words: list[str], reason: str):
    for copy in ("../outside.yaml", "runs/old/config.yaml", "out/tiny/config.yaml"):
        (project / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / "run.yaml", project / copy)
    message = refusal(project, *words)
    assert message.startswith("ray_submit: ") and reason in message
    assert len(message.splitlines()) == 1


def free_ports(count: int) -> list[int]:
    """Free ports; all are held at the same time, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The address of the dashboard of a Ray cluster of two CPUs, started outside of the environment of `rankup`."""
    port, dashboard_port, agent_port = free_ports(3)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: it becomes part of the names of sockets
    command = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true",
        f"--port={port}", f"--dashboard-port={dashboard_port}", f"--temp-dir={folder}", "--disable-usage-stats",
        f"--object-store-memory={100 * 2**20}",
        f"--dashboard-agent-listen-port={agent_port}",  # by default one port, which another cluster of this machine may have
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": os.defpath,
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # as in all tests
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # by default it ends half a minute after the signal
    }
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not accepts_jobs(f"http://127.0.0.1:{dashboard_port}"):
            assert head.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard_port}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def accepts_jobs(address: str) -> bool:
    """Whether the cluster takes a job, an empty one: its agent starts after its dashboard."""
    job = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(f"{address}/api/jobs/", data=job, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60):
            return True
    except OSError:
        return False


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_the_quick_start_submitted_for_two_workers_leaves_its_folder_where_the_file_says(
    tmp_path: Path, engine_shelf, dashboard: str
):
    """With rewards that are computed in the cluster too."""
    engine_shelf.close()  # the run starts further engines, and no further one fits
    shutil.copy(QUICKSTART, tmp_path / "quickstart.yaml")
    ray = {"RAY_API_SERVER_ADDRESS": dashboard, "RAY_AUTH_MODE": "disabled"}
    smaller = (
        f"model.dtype={native_dtype()}", "optim.prompts_per_step=2", "rollout.num_generations=4", "optim.max_steps=2",
        "data.eval=null",
    )  # fmt: skip
    result = run_script(tmp_path, "quickstart.yaml", "cluster.workers=2", "rewards.isolation=ray", *smaller, **ray)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "done: 2 steps" in result.stdout and f"dashboard {dashboard}" in result.stdout
    run = tmp_path / "runs" / "quickstart"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert [row["workers/1/tokens_per_second"] > 0 for row in steps_of(run)] == [True, True]
    assert json.loads((run / "summary.json").read_text())["steps"] == 2

    failed = run_script(tmp_path, "quickstart.yaml", "data.train=no_such.jsonl", **ray)
    assert failed.returncode == 1
    assert "rankup: error: no file no_such.jsonl" in failed.stdout + failed.stderr
