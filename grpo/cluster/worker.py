"""One worker of a cluster run: the loop on its shard of every step. `driver.py` starts it, in a Ray Train thread.

    run_worker({"task": task})      # in each worker; again, in new processes, after one of them was lost

A worker ends in one of three ways. The run has ended, or failed with an error that a restart would not fix: both are
reported to the mailbox, and Ray restarts nothing. Otherwise something was lost, and the raised error makes Ray restart all
workers.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from ..checkpoint.remote import StorageError
from ..checkpoint.resume import Resume
from ..common.errors import BaseWeightsModifiedError, explain, is_transient
from ..common.interrupts import RunInterrupted
from ..common.quiet import quiet_loggers
from ..common.world import World
from ..config import GRPOConfig
from ..loop import train
from ..run.records import read_summary
from ..run.worker_reports import DivergedError
from ..setup import prepare_run
from ..user_inputs import UserInputs
from .events import EventView
from .mailbox import Outcome

UNAVAILABLE = (errno.EIO, errno.ESTALE, errno.EADDRINUSE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)
"""Errors of a network, or of a network file system, that is temporarily unavailable."""

UNWIND_SECONDS = 60.0
"""How long the main worker gets to save its progress after another worker failed, before Ray ends them all."""

REPORT_SECONDS = 2.0
"""How long a worker that hangs gets to report it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task of a worker.

    Attributes:
        config: with absolute paths for everything that is written.
        inputs: reward functions and data sets of the user.
        folder: the folder that relative paths start from.
        mailbox: the actor's handle.
    """

    config: GRPOConfig
    inputs: UserInputs
    folder: Path
    mailbox: Any
    resume: Resume
    allow_changes: bool


class Deadline:
    """Ends this process, after writing every thread's stack to standard error, when `extend` was not called for too long.

    This works without the interpreter: what hangs (an engine, a network) may never release the GIL. `report` is called before,
    if the interpreter still runs.
    """

    def __init__(self, seconds: float, report: Callable[[], None]) -> None:
        self._seconds = seconds
        self._report = report
        self._last = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Require a call of `extend` within the time, from now on."""
        self._last = time.monotonic()
        self._thread.start()
        self.extend()

    def extend(self) -> None:
        """Restart the time. Does nothing before `start`."""
        if self.is_running:
            self._last = time.monotonic()
            faulthandler.dump_traceback_later(self._seconds + REPORT_SECONDS, exit=True)

    def stop(self) -> None:
        """Require nothing any more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.01, self._last + self._seconds - time.monotonic())):
            if time.monotonic() >= self._last + self._seconds:
                self._report()
                return


def run_worker(arguments: Mapping[str, Task]) -> None:
    """See the module's docstring."""
    task = arguments["task"]
    mailbox = task.mailbox
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
        _train(task, world, deadline)
    except Exception as error:  # Ray restarts the workers; what a restart would not fix is reported here
        if _is_final(error, has_begun=ray.get(mailbox.has_begun.remote())):
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


def _train(task: Task, world: World, deadline: Deadline) -> None:
    mailbox = task.mailbox
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
        with interrupts.deferred():
            summary = train(setup, resume=resume, allow_changes=task.allow_changes)
        outcome = Outcome(summary=summary, is_saved=True, is_complete=True)
    except RunInterrupted as interruption:
        summary = read_summary(config.logging.output_dir) if world.is_main else None
        outcome = Outcome(summary=summary, checkpoint=interruption.checkpoint, is_saved=interruption.code == 0)
    if world.is_main:
        ray.get(mailbox.end.remote(outcome))


def _is_final(error: Exception, *, has_begun: bool) -> bool:
    """Whether a restart would not fix it: a mistake of the user, or workers that hold different policies.

    Disks and storages that could be reached when the run began are taken to be temporarily unavailable. Base weights are loaded
    again by a restart.
    """
    is_unavailable = has_begun and (isinstance(error, StorageError) or getattr(error, "errno", None) in UNAVAILABLE)
    is_mended_by_restart = is_unavailable or is_transient(error) or isinstance(error, BaseWeightsModifiedError)
    return isinstance(error, DivergedError) or (explain(error) is not None and not is_mended_by_restart)


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
