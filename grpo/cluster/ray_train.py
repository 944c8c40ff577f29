"""Ray Train's controller of a run, as a Ray task: it can be cancelled at any time, whatever it waits for.

    job = Job(task=pickle.dumps(task), cluster=config.cluster, resources={"CPU": 1.0}, run_name="mine", mailbox=mailbox)
    ref = ray.remote(fit).remote(job)
    ray.get(ref)                # None, or why Ray Train gave up

The task stays pickled until it is in a worker: only the workers import the trainer, not the processes that start them.
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

from ..config import ClusterConfig

GRACE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What Ray Train has to know of a run.

    Attributes:
        task: a pickled `worker.Task`.
        resources: reserved for each worker, by Ray's names.
        mailbox: the actor's handle.
    """

    task: bytes
    cluster: ClusterConfig
    resources: dict[str, float]
    run_name: str
    mailbox: Any


def fit(job: Job) -> str | None:
    """Start the workers, restart them when one is lost, until the run has ended; returns why it failed, or None."""
    with tempfile.TemporaryDirectory(prefix="ray_train_") as folder:
        trainer = _trainer(job, folder)
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            failures = job.cluster.max_failures
            worst = "; ".join(f"worker {rank}: {summarize(one)}" for rank, one in sorted(error.worker_failures.items()))
            return f"workers failed more than cluster.max_failures={failures} times, last: {worst}\n{error}"
        except ray.train.TrainingFailedError as error:
            return f"Ray Train could not run the workers: {summarize(error)}\n{error}"
    return None


def _run_worker(arguments: Mapping[str, Any]) -> None:
    from .devices import prepare_device  # these take seconds, and Ray's controller never calls this
    from .worker import run_worker

    prepare_device()
    run_worker(arguments["task"], arguments["mailbox"])


def _trainer(job: Job, folder: str) -> TorchTrainer:
    """`folder`: for Ray Train's state. Our checkpoints do not go through it."""
    uses_gpus = "GPU" in job.resources
    # Later than the deadline of a step, which reports where it hung.
    timeout = int(job.cluster.step_timeout + GRACE_SECONDS)
    return TorchTrainer(
        _run_worker,  # type: ignore[arg-type]  # Ray's types allow a plain dict only
        train_loop_config={"task": job.task, "mailbox": job.mailbox},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.cluster.workers, use_gpu=uses_gpus, resources_per_worker=job.resources
        ),
        torch_config=OneDeviceEach(backend="cpu:gloo,cuda:nccl" if uses_gpus else "gloo", timeout_s=timeout),
        run_config=ray.train.RunConfig(
            name=job.run_name,
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=job.cluster.max_failures),
            callbacks=[ReportsFailures(job.mailbox, job.cluster.max_failures)],
        ),
    )


class _OneDeviceBackend(_TorchBackend):
    share_cuda_visible_devices = False

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Do nothing: the process group ends with the worker. Ray's default would end it while a worker is still saving."""


@dataclass
class OneDeviceEach(TorchConfig):
    """Ray Train's default, but a worker sees only its own GPU, as device 0: vLLM and the policy use that one."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OneDeviceBackend


class ReportsFailures(ray.train.UserCallback):
    """Reports lost workers to the mailbox. Ray Train calls it in a separate process."""

    def __init__(self, mailbox: Any, max_failures: int) -> None:
        self._mailbox = mailbox
        self._max_failures = max_failures
        self._num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._num_failures += 1
        what = "; ".join(f"worker {rank}: {summarize(error)}" for rank, error in sorted(worker_exceptions.items()))
        then = "restarting all workers" if self._num_failures <= self._max_failures else "giving up"
        failures = f"failure {self._num_failures} of cluster.max_failures={self._max_failures}"
        self._mailbox.report_failure.remote(f"{what}; {failures}: {then}")


def summarize(error: Exception) -> str:
    """Why a worker failed, in one line: `its node has died`, or the last line of the traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reasons = [reason for line in lines for reason in re.findall("because (its .+? has died)", line)]
    return reasons[0] if reasons else lines[-1].strip()
