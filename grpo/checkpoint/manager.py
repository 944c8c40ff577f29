"""The position of a run (steps done, pending evaluation) and its checkpoints: saved when due, resumed later.

    manager = CheckpointManager(config, session, store, output=output, callbacks=callbacks, inputs=inputs)
    manager.resume(resumption)                      # or manager.start(evaluation_pending=True) for a new run
    manager.leave_position()
    ... the update, publish, metrics ...
    manager.set_position(1, evaluation_pending=False)
    manager.save()
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.log import logger
from ..common.random_states import random_states, set_random_states
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig, dump_config
from ..run.callbacks import Callbacks
from ..run.output import RunOutput
from ..run.records import METRICS_FILE, RunRecorder
from ..update.session import Session
from .resume import Resumption, software_changes
from .state import Position, load_state, write_state
from .storage import Storage, StorageError
from .store import MANIFEST, CheckpointError, CheckpointStore


class CheckpointManager:
    """See the module's docstring. Every worker calls `resume`, `save` and `write`, which contain collectives; the main process
    writes.

    Args:
        output: the main process's; None on the others.
        inputs: the inputs of the run besides its configuration, as plain data.

    Attributes:
        position: of the run between two steps, as the next checkpoint records it.
        num_tokens: tokens sampled so far; the loop counts them.
        last: the newest checkpoint, written or resumed from; None if there is none. Workers that are not the main process know
            only the one that they resumed from.
    """

    position: Position

    def __init__(
        self,
        config: GRPOConfig,
        session: Session,
        store: CheckpointStore,
        *,
        output: RunOutput | None,
        callbacks: Callbacks,
        inputs: Mapping[str, Any],
        world: World = SINGLE_PROCESS,
        storage: Storage | None = None,
    ) -> None:
        self.num_tokens = 0
        self.last: Path | None = None
        self._config = config
        self._session = session
        self._store = store
        self._output = output
        self._callbacks = callbacks
        self._callback_states: dict[str, Any] = {}
        self._inputs = inputs
        self._world = world
        self._storage = storage
        self._run_id = uuid.uuid4().hex
        self._is_between_steps = True
        self._saved: tuple[int, bool] | None = None  # steps_done and evaluation_pending of `last`
        self._records: dict[str, Any] = {}

    def start(self, *, evaluation_pending: bool) -> None:
        """Open the trackers of a new run, and set its position to step 0."""
        if self._output is not None:
            self._output.open_trackers(None)
        self.set_position(0, evaluation_pending=evaluation_pending)

    def leave_position(self) -> None:
        """From here to `set_position` weights, optimizer and guards are those of no complete step: nothing can be saved."""
        self._is_between_steps = False

    def set_position(self, steps_done: int, *, evaluation_pending: bool) -> None:
        """The run is between two steps: checkpoints hold this position until `leave_position`.

        evaluation_pending: whether an evaluation is due here and not done yet.
        """
        self._is_between_steps = True
        self.position = Position(
            steps_done=steps_done,
            evaluation_pending=evaluation_pending,
            num_tokens=self.num_tokens,
            random_states=[random_states()],
        )
        self._records = {} if self._output is None else self._output.recorder.state_dict()
        self._callback_states = self._callbacks.states()

    def resume(self, resumption: Resumption) -> None:
        """Restore everything from a checkpoint. Checkpoints of later steps are set aside."""
        checkpoint, state = resumption.checkpoint, resumption.state
        # Steps that can fail come first: nothing in the folder changes before the run is known to resume.
        self._run_id = checkpoint.run or self._run_id
        with self._local_copy(checkpoint.path) as path:
            has_optimizer_state = load_state(path, state, self._session)
        if not has_optimizer_state:
            optimizer = self._config.optim.optimizer
            logger.info(f"optim.optimizer={optimizer} starts from scratch: the checkpoint has the state of another optimizer")
        if self._output is not None:
            self._output.open_trackers(state.recorder)
            self._resume_records(self._output.recorder, checkpoint.step)
        for change in software_changes(state, self._session.policy.device):
            logger.info(f"results may differ in the last bits from an uninterrupted run: {change}")
        self._callbacks.restore_states(state.callbacks)
        self.num_tokens, self.last = state.position.num_tokens, checkpoint.path
        self._saved = (state.position.steps_done, state.position.evaluation_pending)
        states = state.position.random_states  # of all workers of the interrupted run
        set_random_states(states[self._world.rank % len(states)])
        self.set_position(state.position.steps_done, evaluation_pending=state.position.evaluation_pending)

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint of `position`, or no step to save yet."""
        position = self.position
        return position.steps_done == 0 or self._saved == (position.steps_done, position.evaluation_pending)

    def save(self) -> None:
        """Write a checkpoint. A failure is reported and the run continues: the next one may succeed."""
        try:
            self.write()
        except CheckpointError as error:
            logger.warning(f"{error}; the run continues, and earlier checkpoints are intact")

    def write(self) -> Path | None:
        """Write the checkpoint of `position` unless it exists; returns its folder.

        None if there is nothing to resume from: before the first step, and during an update.

        Raises:
            CheckpointError: it could not be written.
        """
        position = self.position
        if position.steps_done == 0:
            return None
        if self.is_saved:
            return self.last
        if not self._is_between_steps:
            return None

        position = dataclasses.replace(position, random_states=self._world.gather(position.random_states))
        error: CheckpointError | None = None
        if self._output is not None:
            try:
                self._write(position, self._output.recorder)
            except CheckpointError as failure:
                error = failure
        if self._world.broadcast_from_main(lambda: error is None):  # so that all workers skip or repeat it together
            self._saved = (position.steps_done, position.evaluation_pending)
        if error is not None:
            raise error
        return self.last

    def upload(self) -> None:
        """Update the copy of the run in `checkpoint.storage`. A failure is reported: the next upload makes up for it."""
        if self._storage is not None and self._world.is_main:
            try:
                self._storage.push()
            except StorageError as error:
                logger.warning(f"{error}; the run continues")

    def _write(self, position: Position, recorder: RunRecorder) -> None:
        def fill(folder: Path) -> None:
            write_state(
                folder,
                position,
                self._session,
                config_yaml=dump_config(self._config),
                recorder=self._records,
                inputs=self._inputs,
                callbacks=self._callback_states,
            )

        reward = recorder.reward_at(position.steps_done, by_evaluation=self._config.logging.eval_steps > 0)
        started = time.perf_counter()
        try:
            recorder.sync()
        except OSError as error:
            raise CheckpointError(f"{METRICS_FILE} could not be synced to the disk: {error}") from error
        self.last = self._store.write(position.steps_done, fill, reward=reward, run=self._run_id)
        self.upload()
        recorder.add_seconds("checkpoint", time.perf_counter() - started)

    def _resume_records(self, recorder: RunRecorder, step: int) -> None:
        for path in self._store.set_aside_after(step):
            logger.info(f"renamed a checkpoint of a later step to {path}")
        if not recorder.resume():
            logger.warning(f"{METRICS_FILE} is shorter than it was at step {step}: some rows are lost")

    @contextmanager
    def _local_copy(self, checkpoint: Path) -> Iterator[Path]:
        """The main process's checkpoint as this worker sees it; on another machine, a temporary copy from the storage."""
        manifest = self._world.broadcast_from_main(lambda: (checkpoint / MANIFEST).read_bytes())
        local = checkpoint / MANIFEST
        if local.is_file() and local.read_bytes() == manifest:
            yield checkpoint
            return
        if self._storage is None:
            raise ValueError(
                f"checkpoint {checkpoint} is not readable on this node: put logging.output_dir on a shared disk, or set "
                "checkpoint.storage"
            )
        with tempfile.TemporaryDirectory() as folder:
            yield self._storage.pull_checkpoint(checkpoint.name, Path(folder))
