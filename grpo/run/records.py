"""The run folder: everything that a run leaves behind, written as it happens.

    recorder = RunRecorder(Path("runs/quickstart"), config_yaml=text)
    recorder.evaluation(0, 0.11, when="before")
    recorder.step(1, {"reward": 0.12, "time/rollout": 3.1})
    recorder.completions(10, {"prompt": [...], "completion": [...], "reward": [...]}, rewards={"exact": [...]})
    recorder.summary({"run_name": "quickstart"})
    recorder.close()

    config.yaml                         the resolved configuration
    metrics.jsonl                       one JSON object a step or evaluation, with TRL's metric names
    completions/step_000010.parquet     sampled completions with their rewards
    adapter/                            the trained adapter in PEFT's format (written by the trainer)
    checkpoints/                        what the run can go on from (written by the trainer)
    summary.json                        evaluation before and after, seconds by phase, peak memory

`metrics.jsonl` grows line by line, so a run that was killed keeps every finished step; every other file appears under
its name only when it is complete. JSON is strict: a value that is not finite is written as null. A full disk surfaces
as the OSError that the system gave. One process at a time owns the folder, by a lock that ends with it.
"""

import io
import json
import math
import os
import resource
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral
from pathlib import Path
from typing import Any, Self

from ..common.files import atomic_write
from ..display.view_text import When
from .reporting import Report
from .run_folder import CONFIG_FILE, METRICS_FILE, locked_folder, move_aside

SUMMARY_FILE = "summary.json"
COLUMN_NAMES = "rankup.columns"  # key in the metadata of a completions file
PHASES = ("rollout", "reward", "train", "publish", "checkpoint")
RECENT_STEPS = 10  # whose mean reward ranks a checkpoint where the run does not evaluate


class RunRecorder:
    """Owns one run folder. Make it once the run's inputs are known to be good: it creates the folder and `config.yaml`.

    A folder that already holds a run is renamed to `<name>.1` (or the next free number), and `moved_aside` is its new
    path, else None. With `resume`, what `state_dict` returned, the run in the folder goes on instead, and nothing of it
    changes until `go_on`.

    Raises ValueError where `output_dir` cannot become a run folder: it is a file, the process works inside it, or another
    process writes to it.
    """

    def __init__(self, output_dir: Path, *, config_yaml: str, resume: Mapping[str, Any] | None = None) -> None:
        self.output_dir = Path(output_dir)
        self._config_yaml = config_yaml
        self._lock = ExitStack()
        self._steps = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._evaluation: dict[str, float | None] = {"before": None, "after": None}
        self._recent_rewards: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_evaluation: tuple[int, float] | None = None
        self._started = time.monotonic()
        self._peak_memory = 0
        self._reports: list[Report] = []
        self._kept_bytes = 0
        self.moved_aside = None
        with ExitStack() as lock:
            lock.enter_context(locked_folder(self.output_dir))
            if resume is None:
                self.moved_aside = move_aside(self.output_dir)
                # Resolved: a link's target was just moved aside.
                self.output_dir.resolve().mkdir(parents=True, exist_ok=True)
                lock.enter_context(locked_folder(self.output_dir))
                atomic_write(self.output_dir / CONFIG_FILE, config_yaml.encode())
            else:
                self._take_over(resume)
            self._lock = lock.pop_all()

    @property
    def adapter_dir(self) -> Path:
        """Where the adapter belongs, in PEFT's format. Not created here."""
        return self.output_dir / "adapter"

    def report_to(self, reports: Sequence[Report]) -> None:
        """Send what is recorded from now on to these as well; `close` closes them."""
        self._reports += reports

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one optimizer step to `metrics.jsonl`; `time/<phase>` (seconds) is also added up for the summary."""
        self._append({"step": step, **metrics})
        self._steps += 1
        self._recent_rewards.append(float(metrics.get("reward", math.nan)))
        for name, value in metrics.items():
            if name.startswith("time/"):
                self._seconds[name.removeprefix("time/")] += float(value)

    def spent(self, phase: str, seconds: float) -> None:
        """Add time that is no part of a step, such as that of a checkpoint, to the summary's seconds."""
        self._seconds[phase] += seconds

    def evaluation(self, step: int, reward: float, *, when: When, metrics: Mapping[str, float] | None = None) -> None:
        """Appends an evaluation as `eval_reward`, every further metric as `eval_<name>`.

        step: the number of steps done so far, 0 before training.
        """
        others = {f"eval_{name}": value for name, value in (metrics or {}).items()}
        self._append({"step": step, "eval_reward": reward, **others})
        self._last_evaluation = (step, float(reward))
        if when != "during":
            self._evaluation[when] = float(reward)

    def completions(
        self,
        step: int,
        table: Mapping[str, Sequence],
        *,
        rewards: Mapping[str, Sequence[float | None]] | None = None,
        extras: Mapping[str, Sequence] | None = None,
        data: Mapping[str, Sequence] | None = None,
    ) -> Path:
        """Writes one parquet file with a row for each completion; all columns have the same length N. Returns its path.

        table: prompt, completion, completion_ids, advantage, reward, finish_reason, num_tokens (or a part of them); `step` is
        added.
        rewards: one column for each reward function, None where it did not apply.
        extras: what reward functions logged. data: the data set's columns, which `read_completions` gives back as they were.
        A reward, extra or column whose name is taken becomes `rewards/<name>`, `extras/<name>` or `data/<name>`, so that none
        hides another.
        """
        import pyarrow
        import pyarrow.parquet

        num_rows = len(next(iter(table.values())))
        columns = {name: _arrow_column(name, values) for name, values in {"step": [step] * num_rows, **table}.items()}
        for name, values in (rewards or {}).items():
            numbers = [None if value is None else float(value) for value in values]
            columns[f"rewards/{name}" if name in columns else name] = pyarrow.array(numbers, pyarrow.float64())
        for name, values in (extras or {}).items():
            columns[f"extras/{name}" if name in columns else name] = _arrow_column(name, values)
        names: dict[str, dict[str, Any]] = {"rewards": {}, "data": {}}
        for name in rewards or {}:
            names["rewards"][name] = f"rewards/{name}" if f"rewards/{name}" in columns else name
        for name, values in (data or {}).items():
            column = f"data/{name}" if name in columns else name
            columns[column], is_json = _data_column(values)
            names["data"][name] = {"column": column, "json": is_json}
        lengths = {name: len(column) for name, column in columns.items()}
        assert set(lengths.values()) == {num_rows}, f"columns of different lengths: {lengths}"

        buffer = io.BytesIO()
        with_names = pyarrow.table(columns).replace_schema_metadata({COLUMN_NAMES: json.dumps(names)})
        pyarrow.parquet.write_table(with_names, buffer)
        path = self.output_dir / "completions" / f"step_{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, buffer.getvalue())
        return path

    def summary(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `summary.json` and returns what it says.

        Known here: evaluation, seconds by phase (added up over the steps), steps, peak resident memory in bytes.
        `values` adds to it (run_name, model, ...) and wins where it names the same key; its `seconds` are merged.
        `seconds.total` is the time since the recorder was made unless given.
        """
        measured = {**dict.fromkeys(PHASES, 0.0), **self._seconds, "total": time.monotonic() - self._started}
        summary = {
            "evaluation": {when: {"reward": reward} for when, reward in self._evaluation.items()},
            "steps": self._steps,
            "peak_memory_bytes": self._peak(),
            **values,
            "seconds": measured | dict(values.get("seconds", {})),
        }
        summary = _strict(summary)
        atomic_write(self.output_dir / SUMMARY_FILE, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
        return summary

    def rows(self) -> list[dict[str, Any]]:
        """What `metrics.jsonl` holds; nothing where there is none yet."""
        return read_metrics(self.output_dir) if (self.output_dir / METRICS_FILE).is_file() else []

    # ------------------------------------------------------------------------------------------- going on later

    def reward_at(self, step: int, *, by_evaluation: bool) -> float | None:
        """What a checkpoint after `step` steps is ranked by: its evaluation's reward, or the mean of the last steps' rewards.

        None where that is not known.
        """
        if by_evaluation:
            reward = self._last_evaluation[1] if self._last_evaluation and self._last_evaluation[0] == step else math.nan
        else:
            reward = sum(self._recent_rewards) / len(self._recent_rewards) if self._recent_rewards else math.nan
        return reward if math.isfinite(reward) else None

    def state_dict(self) -> dict[str, Any]:
        """How far the records are, as plain data."""
        path = self.output_dir / METRICS_FILE
        return {
            "metrics_bytes": path.stat().st_size if path.is_file() else 0,
            "steps": self._steps,
            "seconds": dict(self._seconds),
            "evaluation": dict(self._evaluation),
            "recent_rewards": list(self._recent_rewards),
            "last_evaluation": self._last_evaluation,
            "elapsed": time.monotonic() - self._started,
            "peak_memory": self._peak(),
            "reports": {report.name: report.state_dict() for report in self._reports},
        }

    def sync(self) -> None:
        """Wait until what was recorded so far is on the disk."""
        path = self.output_dir / METRICS_FILE
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self, *, failed: bool = False) -> None:
        """Close the reports, and give the folder free for other processes. `failed`: the run did not come to its end."""
        with self._lock:
            for report in self._reports:
                report.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None and not issubclass(kind, SystemExit))  # a run that a signal ended has not failed

    def go_on(self) -> bool:
        """From here on the folder is this run's: what was recorded after `resume` is removed, the configuration is written.

        Returns whether all that had been recorded until then is still there.
        """
        (self.output_dir / SUMMARY_FILE).unlink(missing_ok=True)  # it may be of a run that had ended here
        metrics = self.output_dir / METRICS_FILE
        num_bytes = metrics.stat().st_size if metrics.is_file() else 0
        if num_bytes > self._kept_bytes:
            os.truncate(metrics, self._kept_bytes)
        for path in (self.output_dir / "completions").glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > self._steps:
                path.unlink()
        atomic_write(self.output_dir / CONFIG_FILE, self._config_yaml.encode())
        return num_bytes >= self._kept_bytes

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """Counts of the run that goes on."""
        self._steps = state["steps"]
        self._seconds.update(state["seconds"])
        self._evaluation = dict(state["evaluation"])
        self._recent_rewards.extend(state["recent_rewards"])
        self._last_evaluation = state["last_evaluation"] and tuple(state["last_evaluation"])
        self._started -= state["elapsed"]
        self._peak_memory = state["peak_memory"]
        self._kept_bytes = state["metrics_bytes"]

    def _peak(self) -> int:
        """Peak resident memory in bytes, of earlier processes of this run too."""
        return max(self._peak_memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(_strict(row), allow_nan=False) + "\n"
        with (self.output_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(line)
        for report in self._reports:
            report.log(row)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` in order; a last line that was cut off by a kill or a full disk is left out.

    Raises ValueError where the folder holds no metrics, or where a line other than the last is broken.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {METRICS_FILE}")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the rest was cut off, or is empty
    return [json.loads(line) for line in lines]


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """What a run's `summary.json` says; None where it has none yet."""
    path = Path(run_dir) / SUMMARY_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Rows of a completions file: its own columns (`prompt`, `completion`, ...), and the mappings `rewards` and `data`.

    `rewards` are by function. The data set's columns have the values that they had, whatever their type.

    Raises ValueError where the file holds no completions of a run.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    metadata = (table.schema.metadata or {}).get(COLUMN_NAMES.encode())
    if metadata is None:
        raise ValueError(f"{path} holds no completions that a run has saved")
    names = json.loads(metadata)
    rows = []
    for row in table.to_pylist():
        data = {name: (row.pop(one["column"]), one["json"]) for name, one in names["data"].items()}
        rewards = {name: row.pop(column) for name, column in names["rewards"].items()}
        decoded = {name: json.loads(v) if is_json and v is not None else v for name, (v, is_json) in data.items()}
        rows.append({**row, "rewards": rewards, "data": decoded})
    return rows


def _strict(value: Any) -> Any:
    """`value` in JSON's types: scalars of any library become Python's, what is not finite becomes None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _data_column(values: Sequence) -> tuple[Any, bool]:
    """A parquet column that holds the values exactly, and whether it holds them as JSON."""
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    types = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind in types and (kind is not int or all(value is None or -(2**63) <= value < 2**63 for value in values)):
        return pyarrow.array(values, types[kind]), False
    texts = [None if value is None else json.dumps(value, default=str) for value in values]
    return pyarrow.array(texts, pyarrow.string()), True


def _arrow_column(name: str, values: Sequence) -> Any:
    """A typed parquet column. Only the kind of value decides the type, so files of all steps can be read as one table.

    Counts are integers, other numbers (and columns without any value) doubles; what is not text or number becomes JSON.
    """
    import pyarrow

    present = [value for value in values if value is not None]
    if name == "completion_ids":
        return pyarrow.array(values, pyarrow.list_(pyarrow.int32()))
    if name in ("step", "num_tokens"):
        return pyarrow.array(values, pyarrow.int64())
    if all(isinstance(value, str) for value in present) and present:
        return pyarrow.array(values, pyarrow.string())
    if all(isinstance(value, bool) for value in present) and present:
        return pyarrow.array(values, pyarrow.bool_())
    if all(hasattr(value, "__float__") for value in present):
        return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())
    return pyarrow.array(
        [None if value is None else json.dumps(value, default=str) for value in values], pyarrow.string()
    )
