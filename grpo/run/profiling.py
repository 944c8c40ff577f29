"""Records what a block spends its time on: a trace for a viewer, and a table to read.

    with profiled(Path("runs/mine/profile/step_000005.json.gz")):      # with None: nothing is recorded
        train_one_step()

`step_000005.json.gz` opens in https://ui.perfetto.dev and chrome://tracing. `step_000005.txt` beside it lists the operations
that take most time themselves, without what they call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.files import atomic_path, atomic_write
from ..common.quiet import quiet_stderr
from ..config import LoggingConfig

SUFFIX = ".json.gz"
ROWS = 30
"""Operations in the table."""


def trace_path(logging: LoggingConfig, step: int, *, rank: int = 0) -> Path | None:
    """Where a worker's trace of the step (from 1) goes; None where none is asked for."""
    if step not in logging.profile_steps:
        return None
    worker = f".worker_{rank}" if rank else ""
    return logging.output_dir / "profile" / f"step_{step:06d}{worker}{SUFFIX}"


@contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Profile the block on the CPU, and on the GPU where there is one; write the trace to `path` and a table beside it.

    path: ends in `.json.gz`; its folder is created. None: the block runs as it is. A block that raises leaves no files.

    Shapes and call stacks are not recorded: they multiply the trace's size and slow down the very step that is looked at.
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
    with quiet_stderr():  # its library reports every start and stop there
        profiler.start()
    try:
        yield
    finally:
        with quiet_stderr():
            profiler.stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:  # torch compresses by the suffix
        profiler.export_chrome_trace(str(temporary))
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=80)
    atomic_write(path.with_name(path.name.removesuffix(SUFFIX) + ".txt"), table.encode())
