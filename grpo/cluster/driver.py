"""One run on many devices, through Ray Train, seen from where it was started.

    summary = train_on_cluster(
        config, inputs, storage=None, view=view, interrupts=interrupts, resume=True, allow_changes=False
    )

Every worker (`cluster_worker.py`) is the whole single-device trainer: vLLM, policy and optimizer on a device of its own, and a
share of each step's prompts. They exchange what `world.py` says. The first one records and saves; what it shows comes here over
a desk (`desk.py`). When a worker is lost, Ray starts all of them again, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

from ...rewards.ray_connection import CONNECTION, starts_a_cluster
from ..checkpoint.resume import Resume
from ..checkpoint.storage import Storage
from ..common.errors import ClusterError
from ..common.interrupts import Interrupts, RunInterrupted
from ..config import GRPOConfig
from ..config.cluster import ClusterConfig
from ..display.terminal import View
from ..run.records import read_summary
from .mailbox import Outcome, Reader, open_desk, this_node
from .ray_train import fit
from .worker import Task

POLL_SECONDS = 0.2


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
    with ExitStack() as stack:
        stack.enter_context(_connected(view, config.cluster))
        _check_inputs(inputs)
        desk = open_desk()
        reader = Reader(desk, view)
        view.stage(f"starting {config.cluster.workers} workers")
        task = _task(config, inputs, desk, resume=resume, allow_changes=allow_changes)
        fitting = ray.remote(fit).options(num_cpus=0, max_retries=0, label_selector=this_node())
        stack.enter_context(_ended(fitted := fitting.remote(task, _resources(config.cluster))))
        while True:
            # Asked before the desk is read: what was written until then is shown.
            is_over = bool(ray.wait([fitted], timeout=0)[0]) or ray.get(desk.has_failed.remote())
            reader.show()
            if is_over:
                break
            if interrupts.asked is not None and not ray.get(desk.ask_to_stop.remote()):
                # No worker has come to a step, or all wait to start again: there is nothing to save, and they end with us.
                interruption = RunInterrupted(interrupts.asked)
                raise interruption.saved(None) if ray.get(desk.has_begun.remote()) else interruption
            time.sleep(POLL_SECONDS)
        reader.finish()
        outcome: Outcome | None
        outcome, has_begun = ray.get([desk.outcome.remote(), desk.has_begun.remote()])
        error = ray.get(fitted) if outcome is None else outcome.error
    if error is not None:
        checkpoints = config.logging.output_dir / "checkpoints"
        raise ClusterError(error, can_resume=has_begun and any(checkpoints.glob("step_*")))
    assert outcome is not None, "Ray Train has come to an end, and the first worker has not"
    if storage is not None and read_summary(config.logging.output_dir) != outcome.summary:
        storage.pull(always=True)  # the workers' disk is another one
    if outcome.summary is not None and outcome.has_finished and interrupts.asked is None:
        return outcome.summary
    interruption = RunInterrupted(interrupts.asked or signal.SIGTERM)  # too late to change anything, or in a step
    raise interruption.saved(outcome.checkpoint) if outcome.is_saved else interruption


@contextmanager
def _connected(view: View, cluster: ClusterConfig) -> Iterator[None]:
    """Inside the block Ray is connected, and the user knows to what.

    Raises:
        ConnectionError: no cluster answers where `RAY_ADDRESS` says.
        ValueError: this machine alone is too small for the workers.
    """
    view.stage("connecting to Ray")
    has_connection = CONNECTION.hold(dashboard=True, logs=False)
    is_alone = has_connection and starts_a_cluster()
    try:
        total, alive = ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has = f"{len(alive)} node{'s' * (len(alive) > 1)}, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        view.note(f"Ray: {has}" + (f"; dashboard {url}" if (url := CONNECTION.dashboard_url) else ""))
        each = _resources(cluster)
        places = sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in each.items()) for node in alive)
        if places < cluster.workers and is_alone:
            raise ValueError(
                f"cluster.workers={cluster.workers}: this machine has {has}, which is room for {places} of them: take fewer, "
                "or a smaller cluster.cpus_per_worker, or join a larger cluster with RAY_ADDRESS"
            )
        if places < cluster.workers:
            view.note(f"there is room for {places} of {cluster.workers} workers: the run begins when enough nodes have joined")
        yield
    finally:
        if has_connection:
            CONNECTION.release()


@contextmanager
def _ended(reference: Any) -> Iterator[None]:
    """A task that does not outlive the block, and with it whatever it has started."""
    try:
        yield
    finally:
        if not ray.wait([reference], timeout=0)[0]:
            ray.cancel(reference, force=True)


def _check_inputs(inputs: dict[str, Any]) -> None:
    """See that reward functions and data can be sent."""
    try:
        with open(os.devnull, "wb") as nowhere:
            cloudpickle.dump(inputs, nowhere)  # type: ignore[attr-defined]
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
