"""Where a run is between two steps, and its checkpoints: written when they are due, taken up again later.

    with open_recorder(config, resumption, note=view.note) as recorder:
        keeper = RunKeeper(config, session, recorder, store, inputs=inputs, note=view.note)
        keeper.go_on(resumption)                    # or keeper.begin(is_evaluated=False) for a new run
        ... a step ...
        keeper.advance(1, is_evaluated=True)
        keeper.save()
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.errors import Attempts
from ..common.interrupts import RunInterrupted
from ..common.random_states import random_states, set_random_states
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig, dump_config
from ..display.terminal import View
from ..run.records import METRICS_FILE, RunRecorder
from ..run.reporting import make_reports
from ..run.run_folder import locked_folder
from ..run.silent import SilentRecorder
from ..update.session import Session
from .resume import Resumption, software_changes
from .state import Position, load_state, write_state
from .storage import Storage, StorageError
from .store import MANIFEST, CheckpointError, CheckpointStore

LOCK_TIMEOUT_S = 60.0
"""What a worker that was lost gets to die, and to let go of the folder, before the one in its place gives up."""


@contextmanager
def owned_folder(
    folder: Path, *, resumes: bool, note: Callable[[str], None], world: World = SINGLE_PROCESS, storage: Storage | None = None
) -> Iterator[None]:
    """Own the folder inside the block, and have in it what a run that is taken up needs of the storage.

    That is the first worker's alone, and comes before a checkpoint is chosen and an engine started.

    Raises:
        ValueError: another process owns it.
        StorageError: the storage could not be read.
    """
    if not world.is_main:
        yield
        return
    if resumes and storage is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, timeout=LOCK_TIMEOUT_S if world.size > 1 else 0.0):
        if resumes and storage is not None:
            storage.pull()
            if world.size > 1:
                storage.push()  # others may see the copy only, and go on from what is newest here
        yield


@contextmanager
def open_recorder(
    config: GRPOConfig,
    resumption: Resumption | None,
    *,
    note: Callable[[str], None],
    world: World = SINGLE_PROCESS,
    storage: Storage | None = None,
) -> Iterator[RunRecorder]:
    """The run folder of a new run, or of one that goes on. Only the first of several workers records.

    Raises:
        ValueError: the folder, or the one in the storage, cannot be the run's.
        StorageError: the storage could not be reached.
    """
    output_dir = config.logging.output_dir
    if not world.is_main:
        yield SilentRecorder(output_dir)
        return
    resume = None if resumption is None else resumption.state.recorder
    if storage is not None and resumption is None and (moved := storage.move_aside()) is not None:
        note(f"the run that was in {storage.url} is now in {moved}")
    with RunRecorder(output_dir, config_yaml=dump_config(config), resume=resume) as recorder:
        if recorder.moved_aside is not None:
            note(f"the run that was in {output_dir} is now in {recorder.moved_aside}")
        yield recorder


class RunKeeper:
    """See the module's docstring.

    Attributes:
        position: of the last `advance`, or of the checkpoint that the run goes on from.
        num_tokens: tokens sampled so far; the trainer counts them up.
        last: the newest checkpoint, written or gone on from; None where there is none.
    """

    position: Position

    def __init__(
        self,
        config: GRPOConfig,
        session: Session,
        recorder: RunRecorder,
        store: CheckpointStore,
        *,
        inputs: Mapping[str, Any],
        note: Callable[[str], None],
        world: World = SINGLE_PROCESS,
        storage: Storage | None = None,
    ) -> None:
        self.num_tokens = 0
        self._storage = storage
        self._run = uuid.uuid4().hex
        self._peers = world
        self._config = config
        self._session = session
        self._recorder = recorder
        self._store = store
        self._inputs = inputs
        self._note = note
        self.last: Path | None = None
        self._last_position: tuple[int, bool] | None = None

    def advance(self, steps_done: int, *, is_evaluated: bool) -> None:
        """The run is between two steps: what a checkpoint would say of it from now until the next update begins."""
        self._session.learner.is_between_steps = True
        self.position = Position(
            steps_done=steps_done,
            is_evaluated=is_evaluated,
            num_tokens=self.num_tokens,
            random_states=[random_states()],
        )
        self._records = self._recorder.state_dict()

    def begin(self, *, is_evaluated: bool) -> None:
        """A new run, before its first step."""
        self._open_reports(None)
        self.advance(0, is_evaluated=is_evaluated)

    def go_on(self, resumption: Resumption) -> None:
        """Take over everything that a checkpoint says; checkpoints of later steps are set aside."""
        checkpoint, state = resumption.checkpoint, resumption.state
        # What can fail comes first: nothing in the folder changes before it is known that the run does go on.
        self._run = checkpoint.run or self._run
        with self._at_hand(checkpoint.path) as path:
            goes_on = load_state(path, state, self._session)
        if not goes_on:
            self._note(f"optim.optimizer={self._config.optim.optimizer} begins anew: the checkpoint has another one's state")
        self._open_reports(state.recorder)
        for path in self._store.set_aside_after(checkpoint.step) if self._peers.is_main else ():
            self._note(f"a checkpoint that the run does not go on from is now {path}")
        if not self._recorder.resume():
            self._note(f"{METRICS_FILE} is shorter than it was at step {checkpoint.step}: some rows are lost")
        for change in software_changes(state, self._session.policy.device):
            self._note(f"the last bits may differ from those of an undisturbed run: {change}")
        self.num_tokens, self.last = state.position.num_tokens, checkpoint.path
        self._last_position = (state.position.steps_done, state.position.is_evaluated)
        states = state.position.random_states  # of every worker that there was
        set_random_states(states[self._peers.rank % len(states)])
        self.advance(state.position.steps_done, is_evaluated=state.position.is_evaluated)

    def save(self) -> None:
        """Write a checkpoint. One that fails is told, and the run goes on: the next one may succeed."""
        try:
            self.write()
        except CheckpointError as error:
            self._note(f"{error}; the run goes on, and earlier checkpoints are whole")

    def write(self) -> Path | None:
        """The checkpoint of `position`, unless it is there already; returns its folder. All workers call it, the first writes.

        None where there is nothing to go on from: before the first step, and while an update is under way, of which no
        step's state is in memory.

        Raises:
            CheckpointError: it could not be written.
        """
        position = self.position
        if self._last_position == (position.steps_done, position.is_evaluated):
            return self.last
        if position.steps_done == 0 or not self._session.learner.is_between_steps:
            return None

        position = dataclasses.replace(position, random_states=self._peers.gather(position.random_states))
        error: CheckpointError | None = None
        if self._peers.is_main:
            try:
                self._write(position)
            except CheckpointError as failure:
                error = failure
        if self._peers.broadcast_from_main(lambda: error is None):
            self._last_position = (position.steps_done, position.is_evaluated)
        if error is not None:
            raise error
        return self.last

    def _write(self, position: Position) -> None:
        def fill(folder: Path) -> None:
            write_state(
                folder,
                position,
                self._session,
                config_yaml=dump_config(self._config),
                recorder=self._records,
                inputs=self._inputs,
            )

        by_evaluation = self._config.logging.eval_steps > 0
        reward = self._recorder.reward_at(position.steps_done, by_evaluation=by_evaluation)
        started = time.perf_counter()
        self._recorder.sync()
        self.last = self._store.write(position.steps_done, fill, reward=reward, run=self._run)
        self.copy()
        self._recorder.add_seconds("checkpoint", time.perf_counter() - started)

    def copy(self) -> None:
        """Bring the copy in the storage up to date. One that fails is told, and the run goes on: the next makes up for it."""
        if self._storage is not None and self._peers.is_main:
            try:
                self._storage.push()
            except StorageError as error:
                self._note(f"{error}; the run goes on")

    def save_adapter(self) -> None:
        """The policy as it is, in the run folder. Only the first of several workers writes this and what follows."""
        if self._peers.is_main:
            self._session.policy.save_adapter(self._recorder.adapter_dir)

    def draw(self) -> None:
        """The learning curve, once there is a step."""
        if self._peers.is_main and self.position.steps_done:
            from ..run.plots import plot_learning_curve

            run_dir = self._recorder.output_dir
            plot_learning_curve([run_dir], run_dir / "learning_curve.png")

    def summarise(self, *, interrupted: bool) -> dict[str, Any]:
        """`summary.json`, which says whether the run has come to its end; so it is the last file to be written."""
        return self._recorder.summary(
            {
                "run_name": self._config.logging.run_name,
                "model": self._config.model.name,
                "seed": self._config.seed,
                "interrupted": interrupted,
                "guards": self._session.learner.guards.metrics(),
                "inputs": self._inputs,
            }
        )

    @contextmanager
    def nothing_lost(self, view: View) -> Iterator[None]:
        """Whatever ends the block, a signal, an error of a reward function, a full disk: save what can be saved."""
        try:
            yield
        except BaseException as error:  # and it goes on, whatever it is
            attempts = Attempts()
            # Where one of several workers fails, the others are elsewhere: there is no step that all could save.
            can_save = self._peers.size == 1 or isinstance(error, RunInterrupted)
            is_kept = can_save and attempts.to("save a checkpoint", self.write)
            has_adapter = attempts.to("save the adapter", self.save_adapter)
            attempts.to("draw the learning curve", self.draw)
            attempts.to("write the summary", lambda: view.finish(self.summarise(interrupted=True)))
            attempts.to("copy the run", self.copy)
            if isinstance(error, RunInterrupted) and is_kept:
                error.saved(self.last)
            notes = [f"the newest checkpoint is {self.last}"] if self.last is not None else []
            if has_adapter:
                notes.append(f"interrupted: the adapter as it was is in {self._recorder.adapter_dir}")
            attempts.to("tell of it", lambda: [view.note(note) for note in [*notes, *attempts.failures]])
            raise

    @contextmanager
    def _at_hand(self, checkpoint: Path) -> Iterator[Path]:
        """The first worker's checkpoint where this one sees it: on a machine of its own, fetched for the time being."""
        manifest = self._peers.broadcast_from_main(lambda: (checkpoint / MANIFEST).read_bytes())
        here = checkpoint / MANIFEST
        if here.is_file() and here.read_bytes() == manifest:
            yield checkpoint
            return
        if self._storage is None:
            raise ValueError(f"this worker does not see {checkpoint}: give a checkpoint.storage that all nodes reach")
        with tempfile.TemporaryDirectory() as folder:
            yield self._storage.pull_checkpoint(checkpoint.name, Path(folder))

    def _open_reports(self, resume: Mapping[str, Any] | None) -> None:
        if not self._peers.is_main:
            return
        logging = self._config.logging
        reports = make_reports(
            logging.report_to,
            output_dir=logging.output_dir,
            run_name=logging.run_name,
            project=logging.project,
            config=self._config.model_dump(mode="json"),
            resume=None if resume is None else resume["reports"],
            resume_step=0 if resume is None else resume["steps"],
        )
        self._recorder.report_to(reports)
