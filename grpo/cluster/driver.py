"""One run on several devices, through Ray Train, seen from the process that starts it.

    summary = train_on_cluster(
        config, inputs, storage=None, view=view, interrupts=interrupts, resume=True, allow_changes=False
    )

Every worker (`worker.py`) runs the single-device loop, with vLLM, policy and optimizer on its own device and a shard of
each step's prompts; `common/world.py` has the collectives. The main worker records and saves, and what it shows arrives here
through a mailbox. When a worker is lost, Ray restarts all of them, and they resume from the newest checkpoint.
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
from ..common.log import logger
from ..config import GRPOConfig
from ..config.cluster import ClusterConfig
from ..display.view import View
from ..run.records import read_summary
from ..setup import UserInputs
from .mailbox import Outcome, open_mailbox, this_node
from .ray_train import Job, fit
from .worker import Task

POLL_SECONDS = 0.2


def train_on_cluster(
    config: GRPOConfig,
    inputs: UserInputs,
    *,
    storage: Storage | None,
    view: View,
    interrupts: Interrupts,
    resume: Resume,
    allow_changes: bool,
) -> dict[str, Any]:
    """Start the workers, show their events, and wait for the end; returns the content of `summary.json`.

    Joins the cluster of Ray's variable `RAY_ADDRESS`; if that is not set, starts a cluster of this machine for the run.

    Args:
        config: with `cluster.workers` above 1.
        inputs: reward functions and data sets passed to `GRPOTrainer`; they are sent to the workers.
        storage: of `checkpoint.storage`; the run is fetched from there if this machine does not see its folder.
        view: where progress is shown.
        interrupts: handles and defers signals.

    Raises:
        ValueError: a cluster of this machine is too small for the workers.
        ClusterError: the run has failed.
        RunInterrupted: a signal came, and the workers have finished their step and saved.
    """
    with ExitStack() as stack:
        stack.enter_context(_connected(view, config.cluster))
        _check_inputs(config, inputs)
        mailbox = open_mailbox()
        view.stage(f"starting {config.cluster.workers} workers")
        job = _job(config, inputs, mailbox, resume=resume, allow_changes=allow_changes)
        fitting = ray.remote(fit).options(num_cpus=0, max_retries=0, label_selector=this_node())
        stack.enter_context(_ended(fitted := fitting.remote(job)))
        while True:
            # Checked before the mailbox is read, so that everything posted until then is shown.
            is_over = bool(ray.wait([fitted], timeout=0)[0]) or ray.get(mailbox.has_failed.remote())
            for event in ray.get(mailbox.take.remote(is_over=is_over)):
                event.show(view)
            if is_over:
                break
            if interrupts.requested is not None and not ray.get(mailbox.request_stop.remote()):
                # No worker has reached a step, or all are restarting: there is nothing to save, and they end with this process.
                interruption = RunInterrupted(interrupts.requested)
                raise interruption.saved(None) if ray.get(mailbox.has_begun.remote()) else interruption
            time.sleep(POLL_SECONDS)
        outcome: Outcome | None
        outcome, has_begun = ray.get([mailbox.outcome.remote(), mailbox.has_begun.remote()])
        error = ray.get(fitted) if outcome is None else outcome.error
    if error is not None:
        checkpoints = config.logging.output_dir / "checkpoints"
        raise ClusterError(error, can_resume=has_begun and any(checkpoints.glob("step_*")))
    assert outcome is not None, "Ray Train has ended, but the main worker has not"
    if storage is not None and read_summary(config.logging.output_dir) != outcome.summary:
        storage.pull(always=True)  # the workers wrote to another disk
    if outcome.summary is not None and outcome.is_complete:
        return outcome.summary
    interruption = RunInterrupted(interrupts.requested or signal.SIGTERM)
    raise interruption.saved(outcome.checkpoint) if outcome.is_saved else interruption


@contextmanager
def _connected(view: View, cluster: ClusterConfig) -> Iterator[None]:
    """Connect to Ray inside the block, and show the user its address.

    Raises:
        ConnectionError: no cluster answers where `RAY_ADDRESS` says.
        ValueError: a cluster of this machine is too small for the workers.
    """
    view.stage("connecting to Ray")
    has_connection = CONNECTION.hold(dashboard=True, logs=False)
    is_alone = has_connection and starts_a_cluster()
    try:
        total, alive = ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has = f"{len(alive)} node{'s' * (len(alive) > 1)}, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        logger.info(f"Ray: {has}" + (f"; dashboard {url}" if (url := CONNECTION.dashboard_url) else ""))
        each = _resources(cluster)
        places = sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in each.items()) for node in alive)
        if places < cluster.workers and is_alone:
            raise ValueError(
                f"cluster.workers={cluster.workers}: this machine has {has}, room for {places} of them: use fewer, "
                "or a smaller cluster.cpus_per_worker, or join a larger cluster with RAY_ADDRESS"
            )
        if places < cluster.workers:
            logger.info(f"room for {places} of {cluster.workers} workers: the run starts when enough nodes have joined")
        yield
    finally:
        if has_connection:
            CONNECTION.release()


@contextmanager
def _ended(reference: Any) -> Iterator[None]:
    """Cancel the task, and everything that it started, at the end of the block."""
    try:
        yield
    finally:
        if not ray.wait([reference], timeout=0)[0]:
            ray.cancel(reference, force=True)


def _check_inputs(config: GRPOConfig, inputs: UserInputs) -> None:
    """Check that the user's functions and data can be pickled."""
    try:
        with open(os.devnull, "wb") as nowhere:
            cloudpickle.dump((config, inputs), nowhere)  # type: ignore[attr-defined]
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise ValueError(
            f"functions and data are sent to the workers, but these cannot be pickled ({error}): pass them by name, "
            "such as reward.py:score and rows.jsonl"
        ) from error


def _resources(cluster: ClusterConfig) -> dict[str, float]:
    """The resources that Ray reserves for each worker, by Ray's names."""
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def _job(config: GRPOConfig, inputs: UserInputs, mailbox: Any, *, resume: Resume, allow_changes: bool) -> Job:
    """Ray Train's job. The workers' directory may differ from this one, so the paths that they write to are absolute."""
    storage = config.checkpoint.storage
    if storage is not None and "://" not in storage:
        storage = str(Path(storage).absolute())
    output_dir = config.logging.output_dir.absolute()
    config = config.model_copy(
        update={
            "logging": config.logging.model_copy(update={"output_dir": output_dir}),
            "checkpoint": config.checkpoint.model_copy(update={"storage": storage}),
        }
    )
    task = Task(config=config, inputs=inputs, folder=Path.cwd(), resume=resume, allow_changes=allow_changes)
    return Job(
        task=cloudpickle.dumps(task),  # type: ignore[attr-defined]
        cluster=config.cluster,
        resources=_resources(config.cluster),
        run_name=config.logging.run_name,
        mailbox=mailbox,
    )
