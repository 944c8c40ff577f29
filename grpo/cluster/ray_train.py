"""Ray Train at work on a run, in a process of Ray's: what can be ended at once, whatever it waits for.

    ref = ray.remote(fit).remote(task, {"CPU": 1.0})
    ray.get(ref)                # None, or why Ray Train has given up
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend

from .worker import Task, run_worker

GRACE_SECONDS = 60.0


def fit(task: Task, resources: Mapping[str, float]) -> str | None:
    """Start the workers, and again when one is lost, until the run has ended; returns why there is no end.

    Args:
        resources: what Ray reserves for each worker, by Ray's names.
    """
    with tempfile.TemporaryDirectory(prefix="ray_train_") as folder:
        trainer = _trainer(task, dict(resources), folder)
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            failures = task.config.cluster.max_failures
            worst = "; ".join(f"worker {rank}: {end_of(one)}" for rank, one in sorted(error.worker_failures.items()))
            return f"workers were lost more than cluster.max_failures={failures} times, the last time so: {worst}\n{error}"
        except ray.train.TrainingFailedError as error:
            return f"Ray Train could not run the workers: {end_of(error)}\n{error}"
    return None


def _trainer(task: Task, resources: dict[str, float], folder: str) -> TorchTrainer:
    """`folder` is for Ray Train's own notes: our checkpoints do not go through it."""
    cluster = task.config.cluster
    # A little later than the deadline on a step, which says where it hung.
    timeout = int(cluster.step_timeout + GRACE_SECONDS)
    return TorchTrainer(
        run_worker,  # type: ignore[arg-type]  # Ray's types know a plain dict only
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        torch_config=OneDeviceEach(backend="cpu:gloo,cuda:nccl" if "GPU" in resources else "gloo", timeout_s=timeout),
        run_config=ray.train.RunConfig(
            name=task.config.logging.run_name,
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[TellsLosses(task.desk, cluster.max_failures)],
        ),
    )


class _OneDeviceBackend(_TorchBackend):
    share_cuda_visible_devices = False

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """The workers' processes end with them. Ray's own would take the process group from one that is still saving."""


@dataclass
class OneDeviceEach(TorchConfig):
    """Ray Train's own, but a worker sees its own GPU only, as the first: vLLM and the policy take that one."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OneDeviceBackend


class TellsLosses(ray.train.UserCallback):
    """Tells the desk which workers were lost. Ray Train calls it in a process of its own."""

    def __init__(self, desk: Any, max_failures: int) -> None:
        self._desk = desk
        self._max_failures = max_failures
        self._num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._num_failures += 1
        what = "; ".join(f"worker {rank}: {end_of(error)}" for rank, error in sorted(worker_exceptions.items()))
        then = "all start again" if self._num_failures <= self._max_failures else "that was once too often"
        self._desk.lost.remote(f"{what}. Failure {self._num_failures} of cluster.max_failures={self._max_failures}: {then}")


def end_of(error: Exception) -> str:
    """What has become of a worker, in a line: `its node has died`, or the last line of a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reasons = [reason for line in lines for reason in re.findall("because (its .+? has died)", line)]
    return reasons[0] if reasons else lines[-1].strip()
