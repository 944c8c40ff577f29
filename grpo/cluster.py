"""One run on many devices, through Ray Train, seen from where it was started.

    summary = train_on_cluster(
        config, inputs, storage=None, view=view, interrupts=interrupts, resume=True, allow_changes=False
    )

Every worker (`cluster_worker.py`) is the whole single-device trainer: vLLM, policy and optimizer on a device of its own, and a
share of each step's prompts. They exchange what `peers.py` says. The first one records and saves; what it shows comes here over
a desk (`desk.py`). When a worker is lost, Ray starts all of them again, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend

from ..rewards.ray_connection import CONNECTION, starts_a_cluster
from .cluster_worker import Task, run_worker
from .config import GRPOConfig
from .config_cluster import ClusterConfig
from .desk import Outcome, Reader, open_desk
from .errors import ClusterError
from .interrupts import Interrupts, RunInterrupted
from .records import SUMMARY_FILE
from .resume import Resume
from .storage import Storage
from .terminal import View

POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0


def train_on_cluster(
    config: GRPOConfig,
    inputs: dict[str, Any],
    *,
    storage: Storage | None,
    view: View,
    interrupts: Interrupts,
    resume: Resume,
    allow_changes: bool,
) -> dict[str, Any]:
    """Start the workers, show what they say, and wait for the end; returns what `summary.json` says.

    Joins the cluster of Ray's own `RAY_ADDRESS`; without one, starts a cluster on this machine alone, which ends with the run.

    Args:
        config: with `cluster.workers` above 1.
        inputs: arguments of `GRPOTrainer` besides the configuration: reward functions, data sets. They are sent to the workers.
        storage: of `checkpoint.storage`; the run is fetched from there if its folder is not seen here.
        view: where progress is shown.
        interrupts: answers signals, and defers them.

    Raises:
        ValueError: this machine alone is too small for the workers.
        ClusterError: the run has failed.
        RunInterrupted: a signal came; the workers have finished their step and saved.
    """
    with _connected(view, config.cluster) as is_ours:
        _check_inputs(inputs)
        desk = open_desk()
        reader = Reader(desk, view)
        fit = _Fit(_task(config, inputs, desk, resume=resume, allow_changes=allow_changes))
        fit.start()
        while True:
            is_over = not fit.is_alive() or ray.get(desk.has_failed.remote())  # asked before what was written is read
            reader.show()
            if is_over:
                break
            if interrupts.asked is not None and not ray.get(desk.ask_to_stop.remote()) and is_ours:
                # No worker has come to a step, or all wait to start again: there is nothing to save, and they end with us.
                interruption = RunInterrupted(interrupts.asked)
                raise interruption.saved(None) if ray.get(desk.has_begun.remote()) else interruption
            time.sleep(POLL_SECONDS)
        reader.finish()
        outcome: Outcome | None
        outcome, has_begun = ray.get([desk.outcome.remote(), desk.has_begun.remote()])
    error = fit.reason() if outcome is None else outcome.error
    if error is not None:
        checkpoints = config.logging.output_dir / "checkpoints"
        raise ClusterError(error, can_go_on=has_begun and any(checkpoints.glob("step_*")))
    assert outcome is not None
    if storage is not None and not (config.logging.output_dir / SUMMARY_FILE).exists():
        storage.pull(view.note)  # the workers' disk is another one
    if outcome.summary is None:
        interruption = RunInterrupted(interrupts.asked or signal.SIGTERM)
        raise interruption.saved(outcome.checkpoint) if outcome.is_saved else interruption
    return outcome.summary


@contextmanager
def _connected(view: View, cluster: ClusterConfig) -> Iterator[bool]:
    """Inside the block Ray is connected, and the user knows to what. Yields whether the connection ends with the block."""
    view.stage("connecting to Ray")
    is_alone = starts_a_cluster() and not ray.is_initialized()
    has_connection = CONNECTION.hold(dashboard=True, logs=False)
    try:
        total = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
        has = f"{nodes} node{'s' * (nodes > 1)}, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        view.note(f"Ray: {has}" + (f"; dashboard {url}" if (url := CONNECTION.dashboard_url) else ""))
        needed = {name: amount * cluster.workers for name, amount in _resources(cluster).items()}
        missing = [f"{amount:g} {name}s" for name, amount in needed.items() if total.get(name, 0) < amount]
        if missing and is_alone:
            raise ValueError(
                f"cluster.workers={cluster.workers} need {' and '.join(missing)}, and this machine has {has}: take fewer "
                "workers or a smaller cluster.cpus_per_worker, or join a larger cluster with RAY_ADDRESS"
            )
        if missing:
            view.note(f"the workers need {' and '.join(missing)}: the run begins when enough nodes have joined the cluster")
        yield has_connection
    finally:
        if has_connection:
            CONNECTION.release()


def _check_inputs(inputs: dict[str, Any]) -> None:
    """See that reward functions and data can be sent."""
    try:
        with open(os.devnull, "wb") as nowhere:
            ray.cloudpickle.dump(inputs, nowhere)
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise ValueError(
            f"reward functions and data are sent to the workers, which cannot be done with these ({error}): give them by name, "
            "such as reward.py:score and rows.jsonl"
        ) from error


def _resources(cluster: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for each worker, by Ray's names."""
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def _task(config: GRPOConfig, inputs: dict[str, Any], desk: Any, *, resume: Resume, allow_changes: bool) -> Task:
    """What the workers are to do. Their current folder may be another, so what is written gets absolute paths."""
    folder, base_dir, storage = Path.cwd(), config.base_dir, config.checkpoint.storage
    if base_dir is not None and base_dir.is_relative_to(folder):
        base_dir = base_dir.relative_to(folder)
    if storage is not None and "://" not in storage:
        storage = str(Path(storage).absolute())
    output_dir = config.logging.output_dir.absolute()
    config = config.model_copy(
        update={
            "logging": config.logging.model_copy(update={"output_dir": output_dir}),
            "checkpoint": config.checkpoint.model_copy(update={"storage": storage}),
        }
    )
    return Task(
        config=config,
        inputs=inputs,
        folder=folder,
        base_dir=base_dir,
        desk=desk,
        resume=resume,
        allow_changes=allow_changes,
    )


class _Fit(threading.Thread):
    """Ray Train at work, until the run has ended or was lost too often."""

    def __init__(self, task: Task) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._task = task
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="ray_train_") as folder:
                self._trainer(folder).fit()
        except Exception as error:  # whatever it is: the thread that waits for us tells it
            self._error = error

    def reason(self) -> str:
        """Why the run has no outcome."""
        failures = self._task.config.cluster.max_failures
        what = "nothing is known of how" if self._error is None else end_of(self._error)
        return f"workers were lost more than cluster.max_failures={failures} times, the last time so: {what}"

    def _trainer(self, folder: str) -> TorchTrainer:
        """`folder` is for Ray Train's own notes: our checkpoints do not go through it."""
        task, cluster = self._task, self._task.config.cluster
        resources = _resources(cluster)
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
