"""One worker of a cluster run: the loop on its shard of every step. `driver.py` starts it, in a Ray Train thread.

    run_worker(pickle.dumps(task), mailbox)     # in each worker; again, in new processes, after one of them was lost

A worker ends in one of three ways. The run has ended, or failed with an error that a restart would not fix: both are
reported to the mailbox, and Ray restarts nothing. Otherwise something was lost, and the raised error makes Ray restart all
workers.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from ..checkpoint.resume import Resume
from ..common.errors import explain
from ..common.interrupts import RunInterrupted
from ..common.quiet import quiet_loggers
from ..common.world import World
from ..config import GRPOConfig
from ..loop import train
from ..run.records import read_summary
from ..sessions import Sessions
from ..setup import UserInputs, prepare_run
from .deadline import Deadline
from .events import EventView
from .final_errors import is_final
from .mailbox import Outcome

UNWIND_SECONDS = 60.0
"""How long the main worker gets to save its progress after another worker failed, before Ray ends them all."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task of a worker.

    Attributes:
        config: with absolute paths for everything that is written.
        inputs: reward functions and data sets of the user.
        folder: the folder that relative paths start from.
    """

    config: GRPOConfig
    inputs: UserInputs
    folder: Path
    resume: Resume
    allow_changes: bool


def run_worker(pickled_task: bytes, mailbox: Any) -> None:
    """See the module's docstring. `mailbox`: the actor's handle."""
    task: Task = pickle.loads(pickled_task)
    if ray.get(mailbox.outcome.remote()) is not None:  # the run has failed for good, and Ray restarted the workers all the same
        return
    quiet_loggers()
    if task.folder.is_dir():  # otherwise Ray has copied the folder to this node and changed into the copy
        os.chdir(task.folder)
    rank = dist.get_rank()
    timeout = task.config.cluster.step_timeout
    last_words = (
        f"worker {rank}: no collective completed within cluster.step_timeout={timeout:g} s, so it ends; the stacks of its "
        f"threads are in Ray's logs, in worker-*-{os.getpid()}.err on {ray.util.get_node_ip_address()}"
    )
    deadline = Deadline(timeout, lambda: mailbox.report_failure.remote(last_words))
    world = World.from_process_group(on_collective=deadline.extend)
    if world.is_main:
        ray.get(mailbox.set_main_is_working.remote(True))
    try:
        _train(task, mailbox, world, deadline)
    except Exception as error:  # Ray restarts the workers; what a restart would not fix is reported here
        if is_final(error, has_begun=ray.get(mailbox.has_begun.remote())):
            ray.get(mailbox.end.remote(Outcome(error=explain(error) or str(error))))
        if dist.is_initialized():  # closing vLLM has destroyed it already; no other worker should wait for this one
            dist.destroy_process_group()
        if not world.is_main:
            _await_main(mailbox)
        raise
    finally:
        deadline.stop()
        if world.is_main:
            ray.get(mailbox.set_main_is_working.remote(False))


def _train(task: Task, mailbox: Any, world: World, deadline: Deadline) -> None:
    config = task.config
    _check_folder_is_shared(config, world)

    def start_deadline() -> None:
        world.all_gather(None)  # the engines of all workers have started, which takes longer than any step
        deadline.start()

    setup = prepare_run(
        config,
        task.inputs,
        view=EventView(mailbox.post.remote) if world.is_main else None,
        world=world,
        stop_requested=lambda: world.is_main and ray.get(mailbox.poll_stop.remote()),
        on_ready=start_deadline,
    )
    # Restarted workers resume from the newest checkpoint, whichever one the run first started from.
    resume = bool(ray.get(mailbox.has_begun.remote())) or task.resume
    interrupts = setup.interrupts
    try:
        with interrupts.deferred(), closing(Sessions(setup)) as sessions:
            summary = train(setup, sessions, resume=resume, allow_changes=task.allow_changes)
        outcome = Outcome(summary=summary, is_saved=True, is_complete=True)
    except RunInterrupted as interruption:
        summary = read_summary(config.logging.output_dir) if world.is_main else None
        outcome = Outcome(summary=summary, checkpoint=interruption.checkpoint, is_saved=interruption.code == 0)
    if world.is_main:
        ray.get(mailbox.end.remote(outcome))


def _await_main(mailbox: Any) -> None:
    """Give the main worker its time to save."""
    deadline = time.monotonic() + UNWIND_SECONDS
    while ray.get(mailbox.main_is_working.remote()) and time.monotonic() < deadline:
        time.sleep(0.1)


def _check_folder_is_shared(config: GRPOConfig, world: World) -> None:
    """Check that a run can resume wherever its workers are restarted.

    Raises:
        ValueError: a node does not see the run folder, and there is no storage in its place.
    """
    storage = config.checkpoint.storage
    if storage is not None and "://" in storage:
        return
    folder = (config.logging.output_dir if storage is None else Path(storage)).parent
    with ExitStack() as stack:
        name = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            name = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".seen_by_all_")).name
        probe = Path(world.broadcast_from_main(lambda: name or ""))
        without = [rank for rank, sees in enumerate(world.all_gather(probe.exists())) if not sees]
    if without:
        raise ValueError(
            f"workers {', '.join(map(str, without))} do not see {folder} of worker 0: set logging.output_dir to a "
            "disk that all nodes share, or checkpoint.storage to a place that all nodes reach, such as s3://bucket/runs/mine"
        )
