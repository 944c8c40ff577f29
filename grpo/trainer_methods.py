"""Methods of transformers' and TRL's trainers that scripts call around the training, those that a subclass cannot override, and
what a notebook shows of a trainer.

metrics = trainer.train().metrics
trainer.log_metrics("train", metrics)
trainer.save_metrics("train", metrics)      # train_results.json in the run folder
trainer.save_state()                        # trainer_state.json
if trainer.accelerator.is_main_process:
    ...
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import trainer_pt_utils
from transformers.trainer_callback import TrainerState

from .config import GRPOConfig
from .display.run_html import RunPicture, run_html, run_text
from .display.view_text import summary_text

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGE = __name__.partition(".")[0]

CALLED_BY_USERS = frozenset(
    {"train", "generate", "save_model", "push_to_hub", "add_callback", "remove_callback", "pop_callback", "end"}
    | {"log_metrics", "save_metrics", "save_state", "is_world_process_zero", "is_local_process_zero"}
)
"""Methods that a script calls: a subclass may override them."""


class TrainerMethods:
    """See the module's docstring.

    Raises:
        ValueError: a subclass overrides methods that TRL's trainer calls while it trains, and this one never does.
    """

    log_metrics = trainer_pt_utils.log_metrics
    save_metrics = trainer_pt_utils.save_metrics
    save_state = trainer_pt_utils.save_state

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__.partition(".")[0] == PACKAGE:
            return
        overridden = [name for name, value in vars(cls).items() if callable(value) and not name.startswith("__")]
        if overridden and (without_effect := sorted(set(overridden) & set(_methods_of_trl()) - CALLED_BY_USERS)):
            raise ValueError(
                f"{cls.__name__} overrides {', '.join(without_effect)}, which rankup's trainer does not call: use reward "
                "functions, callbacks, or options such as algorithm.loss_type, which may be a function"
            )

    args: GRPOConfig
    summary: dict[str, Any]
    _is_shown: bool
    """Whether a run or an evaluation is in progress."""

    @property
    def state(self) -> TrainerState:
        """That of the run."""
        raise NotImplementedError

    @property
    def can_resume(self) -> bool:
        """Whether a checkpoint of the run exists."""
        raise NotImplementedError

    def __repr__(self) -> str:
        if not hasattr(self, "_is_shown"):  # its constructor has failed: it is in a traceback
            return super().__repr__()
        return f"<{type(self).__name__} {run_text(self._picture()).splitlines()[0]}>"

    def _repr_html_(self) -> str:
        """In a notebook: state, progress, the last metrics and the curves of the run."""
        return run_html(self._picture())

    def _picture(self) -> RunPicture:
        """What is known of the run."""
        state, logging = self.state, self.args.logging
        adapter = f"LoRA rank {self.args.lora.rank}, alpha {self.args.lora.alpha:g}"
        ends_here = self.summary.get("steps") == state.global_step
        return RunPicture(
            run_name=logging.run_name,
            status=self._status(is_complete=ends_here and not self.summary["interrupted"]),
            steps_done=state.global_step,
            max_steps=state.max_steps,
            rows=state.log_history,
            lines=[
                f"{self.args.model.name}, {adapter}",
                *(summary_text(self.summary).splitlines() if ends_here else []),
                f"output: {logging.output_dir}",
            ],
        )

    def _status(self, *, is_complete: bool) -> str:
        if self._is_shown:
            return "running"
        if self.state.global_step == 0:
            return "not trained"
        if is_complete:
            return "done"
        return "stopped, train(resume_from_checkpoint=True) continues" if self.can_resume else "stopped"

    def close(self) -> None:
        """Free the memory of engine and policy."""
        raise NotImplementedError

    @cached_property
    def accelerator(self) -> Accelerator:
        """accelerate's, for a script's `print`, `is_main_process` and the like; training does not use it."""
        from accelerate import Accelerator

        return Accelerator()

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process."""
        return self.state.is_world_process_zero

    def is_local_process_zero(self) -> bool:
        """The same: a machine's other processes run no script."""
        return self.state.is_local_process_zero

    def end(self) -> None:
        """The script needs the trainer no more: `close`, by transformers' name."""
        self.close()


def _methods_of_trl() -> Iterator[str]:
    """The methods of the trainer of transformers, and of TRL's, whose source is read: importing it takes seconds."""
    from transformers import Trainer

    yield from dir(Trainer)
    if find_spec("trl") is None:
        return
    for name in ("trl.trainer.base_trainer", "trl.trainer.grpo_trainer"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield from (each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
