"""Profiles steps: a trace for a viewer, and a table to read.

    with Profiling(config.logging) as profiling:                        # a callback: profiles the steps of `profile_steps`
        ...
    with profiled(Path("runs/mine/profile/step_000005.json.gz")):      # with None: no profile
        train_one_step()

`step_000005.json.gz` opens in https://ui.perfetto.dev and chrome://tracing. `step_000005.txt` lists the operations with the
most self time (without the operations that they call).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from transformers.trainer_callback import TrainerCallback, TrainerState

from ..common.files import atomic_path, atomic_write
from ..common.quiet import quiet_stderr
from ..config import LoggingConfig

SUFFIX = ".json.gz"
ROWS = 30
"""Operations in the table."""


class Profiling(TrainerCallback):
    """Profiles the steps of `logging.profile_steps`. A step that raises leaves no files."""

    def __init__(self, logging: LoggingConfig, *, rank: int = 0) -> None:
        self._logging = logging
        self._rank = rank
        self._step = ExitStack()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        path = trace_path(self._logging, state.global_step + 1, rank=self._rank)
        self._step.enter_context(profiled(path))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._step.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._step.__exit__(*error)


def trace_path(logging: LoggingConfig, step: int, *, rank: int = 0) -> Path | None:
    """The path of a worker's trace of this step, counted from 1; None if `logging.profile_steps` does not have it."""
    if step not in logging.profile_steps:
        return None
    worker = f".worker_{rank}" if rank else ""
    return logging.output_dir / "profile" / f"step_{step:06d}{worker}{SUFFIX}"


@contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Profile the block on the CPU, and on the GPU if there is one; write the trace to `path` and a table next to it.

    `path` ends in `.json.gz`; its folder is created. None: no profile. If the block raises, no files are written. Shapes and
    call stacks are not recorded, since they multiply the size of the trace and slow down the profiled step.
    """
    if path is None:
        yield
        return
    assert path.name.endswith(SUFFIX), path
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=activities, acc_events=True)
    with quiet_stderr():  # kineto logs every start and stop to stderr
        profiler.start()
    try:
        yield
    finally:
        with quiet_stderr():
            profiler.stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:  # torch compresses if the suffix is .gz
        profiler.export_chrome_trace(str(temporary))
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=80)
    atomic_write(path.with_name(path.name.removesuffix(SUFFIX) + ".txt"), table.encode())
