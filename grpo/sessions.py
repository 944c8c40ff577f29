"""The engine and the policy of a trainer, which stay open between its calls.

    sessions = Sessions(setup)
    with sessions.for_run() as session:         # a new policy; the session stays open afterwards, unless the run fails
        ...
    with sessions.scoring() as session:         # the same one; opened again, with the run's adapter, if it was closed
        evaluate(session.engine, setup.scorer, ...)
    sessions.close()                            # gives the memory back

A process has at most one open session, since vLLM's state is global and two models rarely fit on a device: opening one closes
that of another trainer, which opens its own again when it is needed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch

from ..kernels.cpu_memory import return_freed_memory
from ..rollout.engine import RolloutEngine
from ..rollout.vllm_compat import vllm_version
from .common.log import logger
from .memory.decide import decide_memory
from .run.run_folder import SavedAdapter
from .setup import RunSetup
from .update.session import Session, open_session

__all__ = ["Session", "Sessions"]

LARGE_BYTES = 2**26
"""Base weights whose memory is worth the half second that collecting garbage takes."""


def start_text(*, starts_vllm: bool, compiles: bool) -> str:
    """What the start of a session does, and what is slow about it: vLLM is silent meanwhile."""
    if not starts_vllm:
        return "loading the model"
    slow = "; vLLM compiles the model and captures CUDA graphs, which takes minutes the first time"
    return f"starting vLLM and loading the model{slow if compiles else ''}"


class _OpenSession:
    """A session and what closes it, without a reference to `Sessions`: it is closed when those are garbage."""

    def __init__(self, setup: RunSetup, engine: RolloutEngine | None) -> None:
        self.engine = engine
        self.has_run = False
        self._callbacks = setup.callbacks
        self._stack = ExitStack()
        config, budget = setup.config, None
        if engine is None:  # a user's engine has its memory already
            config, budget = decide_memory(config, setup.inputs.model_path, world=setup.world)
        self._session: Session | None = self._stack.enter_context(
            open_session(
                config,
                setup.inputs.model_path,
                pad_token_id=cast(int, setup.inputs.tokenizer.pad_token_id or 0),
                engine=engine,
                world=setup.world,
                has_episodes=setup.episodes is not None,
                planned_bytes=None if budget is None else budget.training_peak,
            )
        )

    @property
    def session(self) -> Session:
        assert self._session is not None, "the session is open"
        return self._session

    def close(self) -> None:
        base = self.session.policy.base
        is_large = base.unshared_bytes + base.shared_bytes > LARGE_BYTES
        del base
        self._session = None
        self._callbacks.release()
        self._stack.close()
        if is_large:
            return_freed_memory()


class Sessions:
    """See the module's docstring."""

    _of_process: weakref.ref[Sessions] | None = None
    """Those that opened a session last."""

    def __init__(self, setup: RunSetup) -> None:
        self._setup = setup
        self._open: _OpenSession | None = None
        self._close_as_garbage: weakref.finalize | None = None
        self._saved_adapter: SavedAdapter | None = None
        self._is_in_use = False
        self._closes_after_use = False

    @property
    def is_in_use(self) -> bool:
        """Whether a run or an evaluation is in progress."""
        return self._is_in_use

    @contextmanager
    def for_run(self, engine: RolloutEngine | None = None) -> Iterator[Session]:
        """A session with the initial policy, and the started reward functions, for a run. An error in the block closes it.

        Args:
            engine: a user-supplied one, which is not closed here; None: one for this session.

        Raises:
            ValueError: vLLM is not installed; or see `open_session`.
        """
        found = self._usable()
        if found is None or found.has_run or found.engine is not engine:
            self.close()
            found = None
        with self._scorer_started(starts_session=found is None, engine=engine):
            found = found or self._open_new(engine)
            found.has_run = True
            found.session.publish()  # a user may have changed the weights of `trainer.model`
            found.session.engine.policy_version = 0  # a run counts its policies from the initial adapter
            try:
                with self._in_use():
                    yield found.session
            except BaseException:  # raised again
                del found
                self.close()
                raise

    @contextmanager
    def scoring(self) -> Iterator[Session]:
        """The session with the current policy, and the started reward functions; those of the run if there is one.

        Raises:
            ValueError: see `for_run`.
        """
        if self._is_in_use:
            yield self.current()
            return
        with self._scorer_started(starts_session=self._usable() is None, engine=None):
            session = self.current()
            with self._in_use():
                yield session

    def current(self) -> Session:
        """The open session; if there is none, a new one with the adapter that the last run saved. Its engine samples with the
        policy as it is now.

        Raises:
            ValueError: see `for_run`.
        """
        found = self._usable()
        if found is None:
            adapter = None if self._saved_adapter is None else self._saved_adapter.find()
            found = self._open_new(None)
            if adapter is not None:
                found.session.policy.load_adapter(adapter)
                found.has_run = True
        if not self._is_in_use:
            found.session.publish()
        return found.session

    def take_finished_run(self) -> None:
        """From now on the current policy, and the state, are those of the finished run in the run folder."""
        self.close()
        self._setup.callbacks.read(self._setup.config.logging.output_dir)
        self.adapter_saved()

    def adapter_saved(self) -> None:
        """The run has saved its adapter: from now on a new session has that one."""
        self._saved_adapter = SavedAdapter.of(self._setup.config.logging.output_dir)

    def written(self, folder: Path) -> None:
        """The current adapter was written to `folder`, which may be that of the run's adapter."""
        if self._saved_adapter is not None and folder.resolve() == self._saved_adapter.folder:
            self.adapter_saved()

    def close(self) -> None:
        """Close the engine and free its memory and the policy's. Does nothing if no session is open; if it is in use, it is
        closed at the end of that use."""
        if self._is_in_use:
            self._closes_after_use = True
        elif self._close_as_garbage is not None:
            self._open = None
            self._close_as_garbage()
            self._close_as_garbage = None
            return_freed_memory()

    def _usable(self) -> _OpenSession | None:
        """The open session. A user's engine may have been closed meanwhile: then there is none."""
        if self._open is not None and not self._open.session.engine.slots:
            self.close()
        return self._open

    def _open_new(self, engine: RolloutEngine | None) -> _OpenSession:
        other = None if Sessions._of_process is None else Sessions._of_process()
        if other is not None and other is not self and other._open is not None:
            if other._is_in_use:
                raise ValueError("another trainer is in the middle of a run in this process: it must end first")
            if other._open.engine is None:  # a user's engine stays open
                logger.info("closing the engine of another trainer of this process: one fits on a device")
            other.close()
        self.close()
        starts_vllm = engine is None and self._setup.config.rollout.engine == "vllm"
        compiles = torch.cuda.is_available() and not self._setup.config.rollout.enforce_eager
        self._setup.stage(start_text(starts_vllm=starts_vllm, compiles=compiles))
        self._open = _OpenSession(self._setup, engine)
        self._close_as_garbage = weakref.finalize(self, self._open.close)
        Sessions._of_process = weakref.ref(self)
        return self._open

    @contextmanager
    def _scorer_started(self, *, starts_session: bool, engine: RolloutEngine | None) -> Iterator[None]:
        """Reward processes load their functions while vLLM starts."""
        if starts_session and engine is None and self._setup.config.rollout.engine == "vllm":
            vllm_version()  # before anything is started
        with ExitStack() as stack:
            for scorer in (self._setup.scorer, *self._setup.set_scorers.values()):
                stack.callback(scorer.close)
            if self._setup.episodes is not None:
                stack.callback(self._setup.episodes.close)
            self._setup.scorer.start()  # those of evaluation sets start when they are needed
            yield

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        self._is_in_use = True
        try:
            yield
        finally:
            self._is_in_use = False
            if self._closes_after_use:
                self._closes_after_use = False
                self.close()
