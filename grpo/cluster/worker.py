"""One worker of a run on a cluster: the trainer on its share of every step. `cluster.py` starts it, in a thread of Ray Train's.

    run_worker({"task": task})      # in each worker; again, in new processes, after one of them was lost

What ends a worker is one of three: the run has ended, well or with an error that starting again would not mend (the desk is
told, and Ray is not to try again); or something was lost, and raising it makes Ray start all workers again.
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
from ..common.errors import explain, is_transient
from ..common.interrupts import RunInterrupted
from ..common.quiet import quiet_loggers
from ..common.world import World
from ..config import GRPOConfig
from ..run.records import read_summary
from ..run.silent import SilentView
from ..run.worker_reports import DivergedError
from ..trainer import GRPOTrainer
from .mailbox import DeskView, Outcome

ABSENT = (errno.EIO, errno.ESTALE, errno.EADDRINUSE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)
"""What a file system of the network, or the network, says when it is not there."""

UNWIND_SECONDS = 60.0
"""What the first worker gets to save what it holds when another one has failed, before Ray ends them all."""

TELLING_SECONDS = 2.0
"""What a worker that hangs gets to say so."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker is to do.

    Attributes:
        config: with absolute paths where the run is written.
        inputs: reward functions and data as they were handed to the trainer.
        folder: the folder that relative paths count from, and `base_dir`, the run file's, seen from there.
        desk: its handle.
    """

    config: GRPOConfig
    inputs: dict[str, Any]
    folder: Path
    base_dir: Path | None
    desk: Any
    resume: Resume
    allow_changes: bool


class Deadline:
    """Ends this process, after writing every thread's stack to standard error, when no sign of life came for too long.

    That needs no Python: what hangs (an engine, a network) may never let go of the interpreter. `tell` is called before, if
    Python can.
    """

    def __init__(self, seconds: float, tell: Callable[[], None]) -> None:
        self._seconds = seconds
        self._tell = tell
        self._last = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether a sign of life is due."""
        return self._thread.is_alive()

    def start(self) -> None:
        """The next sign of life is due within the time, from now on."""
        self._last = time.monotonic()
        self._thread.start()
        self.extend()

    def extend(self) -> None:
        """A sign of life; nothing before `start`."""
        if self.is_running:
            self._last = time.monotonic()
            faulthandler.dump_traceback_later(self._seconds + TELLING_SECONDS, exit=True)

    def stop(self) -> None:
        """Wait no longer."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.01, self._last + self._seconds - time.monotonic())):
            if time.monotonic() >= self._last + self._seconds:
                self._tell()
                return


def run_worker(arguments: Mapping[str, Task]) -> None:
    """See the module's docstring."""
    task = arguments["task"]
    desk = task.desk
    if ray.get(desk.outcome.remote()) is not None:  # the run has failed, and Ray has started us because of that
        return
    quiet_loggers()
    if task.folder.is_dir():  # elsewhere Ray has put a copy of it, and us into that
        os.chdir(task.folder)
    rank = dist.get_rank()
    timeout = task.config.cluster.step_timeout
    last_words = (
        f"worker {rank} has heard nothing of the others for cluster.step_timeout={timeout:g} s and ends; what its threads were "
        f"doing stands in Ray's logs, in worker-*-{os.getpid()}.err on {ray.util.get_node_ip_address()}"
    )
    deadline = Deadline(timeout, lambda: desk.lost.remote(last_words))
    world = World.from_process_group(on_collective=deadline.extend)
    if world.is_main:
        ray.get(desk.set_first_at_work.remote(True))
    try:
        _train(task, world, deadline)
    except Exception as error:  # Ray is to answer it; those that it cannot answer are told here
        if _is_final(error, has_begun=ray.get(desk.has_begun.remote())):
            ray.get(desk.end.remote(Outcome(error=explain(error) or str(error))))
        if dist.is_initialized():  # vLLM's end has done that, where there was one: nobody is to wait for us
            dist.destroy_process_group()
        if not world.is_main:
            _await_first(desk)
        raise
    finally:
        deadline.stop()
        if world.is_main:
            ray.get(desk.set_first_at_work.remote(False))


def _train(task: Task, world: World, deadline: Deadline) -> None:
    desk = task.desk
    config = task.config.seen_from(task.base_dir)
    _check_folder_is_shared(config, world)

    def should_stop() -> bool:
        if not deadline.is_running:
            world.all_gather(None)  # vLLM has started everywhere, which no deadline of a step could hold
            deadline.start()
        deadline.extend()
        return world.is_main and ray.get(desk.is_asked_to_stop.remote())

    view = DeskView(desk) if world.is_main else SilentView()
    trainer = GRPOTrainer(args=config, view=view, world=world, **task.inputs)
    trainer.should_stop = should_stop
    # What has begun goes on from its newest checkpoint, whichever one it was to begin with.
    resume = bool(ray.get(desk.has_begun.remote())) or task.resume
    try:
        summary = trainer.train(resume_from_checkpoint=resume, allow_changes=task.allow_changes)
        outcome = Outcome(summary=summary, is_saved=True, has_finished=True)
    except RunInterrupted as interruption:
        summary = read_summary(config.logging.output_dir) if world.is_main else None
        outcome = Outcome(summary=summary, checkpoint=interruption.checkpoint, is_saved=interruption.code == 0)
    if world.is_main:
        ray.get(desk.end.remote(outcome))


def _is_final(error: Exception, *, has_begun: bool) -> bool:
    """Whether starting again is no answer: to the user's mistakes, and to workers that do not hold the same policy.

    What could be reached when the run began is not there for a moment, of disks and storages too.
    """
    is_absent = has_begun and (isinstance(error, StorageError) or getattr(error, "errno", None) in ABSENT)
    return isinstance(error, DivergedError) or (explain(error) is not None and not is_absent and not is_transient(error))


def _await_first(desk: Any) -> None:
    """Give the first worker its time to save."""
    deadline = time.monotonic() + UNWIND_SECONDS
    while ray.get(desk.is_first_at_work.remote()) and time.monotonic() < deadline:
        time.sleep(0.1)


def _check_folder_is_shared(config: GRPOConfig, world: World) -> None:
    """See that a run could go on from its checkpoints wherever its workers are started again.

    Raises:
        ValueError: some node does not see the folder of the run, and there is no storage in its place.
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
        blind = [rank for rank, sees in enumerate(world.all_gather(probe.exists())) if not sees]
    if blind:
        raise ValueError(
            f"workers {', '.join(map(str, blind))} do not see {folder} of the first worker: give a logging.output_dir on a "
            "disk that all nodes share, or a checkpoint.storage that all nodes reach, such as s3://bucket/runs/mine"
        )
