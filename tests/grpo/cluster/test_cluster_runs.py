"""Runs on a real Ray cluster of several nodes on this machine: two workers make the run of one, whatever dies.

Starting the workers of a run takes far longer than its steps, so the tests share what they can: the run of one worker is made
in this process, and the undisturbed run of two is the one that is started from Python.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from clusters import REWARD, ClusterRun, is_alive, wait_until, write_run_file
from safetensors.torch import load_file
from tiny_runs import steps_of, timeless

from rankup.grpo.cli.main import main
from rankup.grpo.cluster import driver

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of three nodes of one CPU each besides the head."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    for _ in range(3):
        nodes.add_node(**NODE)
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> dict[str, str]:
    """The environment variables with which a run joins it."""
    return {"RAY_ADDRESS": str(nodes.address)}


@pytest.fixture(scope="module")
def model(tiny_model_path) -> Path:
    return tiny_model_path("llama")


def run_here(folder: Path, *overrides: str) -> Path:
    """The run of one worker, in this process and without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml", "logging.output_dir=runs/run", *overrides]) == 0
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def one(tmp_path_factory, model: Path) -> Path:
    """The run of one worker."""
    folder = tmp_path_factory.mktemp("one")
    write_run_file(folder, model)
    return run_here(folder)


SCRIPT = (
    REWARD
    + """
import sys
from rankup import GRPOConfig, GRPOTrainer
from rankup.grpo.algorithm.advantages import group_advantages
from rankup.grpo.data.sampler import PromptSampler
from transformers import TrainerCallback

class Marks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        Path(f"called_{os.environ['RANK']}_{state.global_step}").touch()

def advantages(groups):
    rewards = [group.scores.total for group in groups]
    return [one.advantages for one in group_advantages(rewards, estimator="group", scale_rewards="batch")]

def sample(step, num_prompts, prompts):
    Path(f"sampled_{os.environ['RANK']}").touch()
    return PromptSampler(prompts, prompts_per_step=num_prompts, seed=42).indices(step)

def make_rows(count):
    return [{"prompt": f"count to {n}", "target": n} for n in range(count)]

trainer = GRPOTrainer(
    model=sys.argv[1],
    reward_funcs=many_low_ids,
    args=GRPOConfig(
        dtype="float32", rank=8, alpha=16, num_generations=4, max_prompt_length=64, max_completion_length=8, prompts_per_step=3,
        max_steps=5, learning_rate=1e-2, eval_steps=2, save_steps=1, keep_last=10, engine="torch",
        output_dir="runs/run", workers=2, max_failures=0,
        advantage_estimator=advantages, sampler=sample, options={"count": 12},
    ),
    train_dataset=make_rows,
    eval_dataset=make_rows,
)
trainer.add_callback(Marks)
output = trainer.train()
print("in the end:", output.global_step, Path("runs", "run", "adapter").is_dir(), trainer.state.global_step)
"""
)


@pytest.fixture(scope="module")
def from_python(tmp_path_factory, model: Path, cluster: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The run of two workers, undisturbed, by a script: its process, and the run folder."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(model)]
    result = subprocess.run(command, cwd=folder, env=os.environ | cluster, capture_output=True, text=True, timeout=600)
    return result, folder / "runs" / "run"


@pytest.fixture(scope="module")
def two(from_python: tuple[subprocess.CompletedProcess[str], Path]) -> Path:
    """The run folder of two workers, undisturbed."""
    result, run = from_python
    assert result.returncode == 0, result.stdout + result.stderr
    return run


def adapter_of(run: Path) -> dict:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def difference(a: dict, b: dict) -> float:
    """The norm of the difference of two adapters over that of the first."""
    distance = sum(((a[name] - b[name]) ** 2).sum().item() for name in a) ** 0.5
    return distance / sum((a[name] ** 2).sum().item() for name in a) ** 0.5


def test_from_python_with_functions_and_rows_of_the_script(from_python: tuple[subprocess.CompletedProcess[str], Path]):
    result, run = from_python
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("in the end: 5 True 5\n")
    calls = {path.name for path in run.parents[1].glob("called_*")}
    assert calls == {f"called_{rank}_{step}" for rank in range(2) for step in range(1, 6)}, "callbacks run on every worker"
    assert {path.name for path in run.parents[1].glob("sampled_*")} == {"sampled_0"}, "the main process picks the prompts"


def test_two_workers_come_to_the_adapter_of_one(one: Path, two: Path):
    assert difference(adapter_of(one), adapter_of(two)) < 1e-5


def test_their_metrics_are_those_of_the_complete_batch(one: Path, two: Path):
    names = ("loss", "reward", "reward_std", "grad_norm", "entropy", "completions/mean_length", "num_tokens", "targets")
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-4, abs=1e-6)
        assert b["workers/0/tokens_per_second"] > 0 and b["workers/1/tokens_per_second"] > 0
    evaluations = [json.loads((run / "summary.json").read_text())["evaluation"] for run in (one, two)]
    assert evaluations[0]["after"]["reward"] == pytest.approx(evaluations[1]["after"]["reward"])


@pytest.mark.engine
def test_two_workers_with_vllm_come_to_the_adapter_of_one(tmp_path: Path, model: Path, cluster: dict[str, str], engine_shelf):
    engine_shelf.close()  # these processes start further engines
    overrides = ("rollout.engine=vllm", "optim.max_steps=2", "data.eval=null", "logging.eval_steps=0")
    for name in ("one", "two"):
        write_run_file(tmp_path / name, model)
    one = run_here(tmp_path / "one", *overrides)
    two = ClusterRun(tmp_path / "two", (*overrides, "cluster.workers=2"), cluster)
    assert two.wait() == 0, two.output
    assert difference(adapter_of(one), adapter_of(two.output_dir)) < 1e-5


def test_a_run_recovers_from_whatever_dies(two: Path, tmp_path: Path, model: Path, cluster: dict[str, str]):
    assert_recovery(tmp_path, model, cluster, undisturbed=two)


@pytest.mark.engine
@pytest.mark.exhaustive
def test_a_run_with_vllm_recovers_from_whatever_dies(
    tmp_path: Path, model: Path, nodes: Any, cluster: dict[str, str], engine_shelf
):
    nodes.add_node(**NODE)  # in place of one that another test may have killed
    engine_shelf.close()  # these processes start further engines
    write_run_file(tmp_path / "two", model)
    two = ClusterRun(tmp_path / "two", ("rollout.engine=vllm", "cluster.workers=2"), cluster)
    assert two.wait() == 0, two.output
    assert_recovery(tmp_path / "recovered", model, cluster, "rollout.engine=vllm", undisturbed=two.output_dir)


def assert_recovery(folder: Path, model: Path, cluster: dict[str, str], *overrides: str, undisturbed: Path) -> None:
    """A signal to the run, then SIGKILL of a worker, a worker that hangs, SIGKILL of a node: the end is the undisturbed one."""
    write_run_file(folder, model)
    for step in range(1, 5):
        (folder / f"stop_{step}").touch()
    overrides = (*overrides, "cluster.workers=2", "cluster.step_timeout=15")
    run = ClusterRun(folder, overrides, cluster)

    run.until_stopped_at(1)
    run.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM: finishing this step, then saving" in run.output)
    time.sleep(2)  # until the workers have received it
    run.let_continue(1)
    assert run.wait() == 0
    assert "to resume: rankup train run.yaml" in run.output and (run.output_dir / "checkpoints" / "step_000002").is_dir()

    run = ClusterRun(folder, (*overrides, "--resume"), cluster)
    os.kill(run.until_stopped_at(2)[1]["worker"], signal.SIGKILL)
    run.let_continue(2)
    os.kill(run.until_stopped_at(3)[0]["worker"], signal.SIGSTOP)
    run.let_continue(3)
    lost = run.until_stopped_at(4)[0]
    os.kill(lost["node"], signal.SIGKILL)
    wait_until(lambda: not is_alive(lost["worker"]))
    run.let_continue(4)
    assert run.wait() == 0, run.output

    assert timeless(run.output_dir) == timeless(undisturbed)
    expected, adapter = adapter_of(undisturbed), adapter_of(run.output_dir)
    assert all(expected[name].equal(adapter[name]) for name in expected)
    assert run.output.count("restarting all workers") == 3 and "its node has died" in run.output
    assert "worker 1: no collective completed within cluster.step_timeout=15 s" in run.output
    assert "raylet" not in run.output


def test_workers_that_hold_two_policies_stop_with_both(tmp_path: Path, model: Path):
    """On a cluster started for the run, which ends with it. A final error is reported once, and not retried."""
    write_run_file(tmp_path, model, logging={"eval_before": False})
    (tmp_path / "drift_2").touch()
    run = ClusterRun(tmp_path, ("cluster.workers=2",))
    assert run.wait() == 1
    assert "restarting all workers" not in run.output
    number = "version [0-9]+, adapter [0-9a-f]{16}"
    assert re.search(f"rankup: error: worker 1 holds another policy than worker 0: {number}, instead of {number}", run.output)
    assert run.output.endswith("to resume: rankup train run.yaml logging.output_dir=runs/run cluster.workers=2 --resume\n")
    assert (run.output_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert [row["step"] for row in steps_of(run.output_dir)] == [1, 2]


STAYS_WHILE_IT_IS_LOADED = """
if "RANK" in os.environ:  # in a worker, not in the process that starts the run
    (HERE / "loading").touch()
    time.sleep(600)
"""


def test_a_signal_before_the_first_step_ends_a_run_immediately(tmp_path: Path, model: Path, cluster: dict[str, str]):
    write_run_file(tmp_path, model)
    with (tmp_path / "reward.py").open("a") as file:
        file.write(STAYS_WHILE_IT_IS_LOADED)
    run = ClusterRun(tmp_path, ("cluster.workers=2",), cluster)
    wait_until(lambda: (tmp_path / "loading").exists())
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 128 + signal.SIGTERM, run.output
    assert not run.output_dir.exists()


def test_a_machine_that_is_too_small_is_reported_immediately(tmp_path: Path, model: Path, monkeypatch, capsys):
    """By the cluster that was started for the run, which ends with it."""
    write_run_file(tmp_path, model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delattr(driver, "open_mailbox")  # workers that are started all the same would wait forever
    assert main(["train", "run.yaml", "cluster.workers=2", "cluster.cpus_per_worker=1000"]) == 1
    output = "".join(capsys.readouterr())
    assert "cluster.workers=2: this machine has 1 node" in output and "room for 0 of them" in output
    assert not ray.is_initialized()
