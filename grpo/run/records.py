"""The run folder: everything that a run writes, while it runs.

    recorder = RunRecorder(Path("runs/quickstart"), config_yaml=text)
    recorder.evaluation(0, {"eval_reward": 0.11, "eval_rewards/exact/mean": 0.11}, when="before")
    recorder.step(1, {"reward": 0.12, "time/rollout": 3.1})
    recorder.completions(10, {"prompt": ["1 + 1?"], "completion": ["2"]}, rewards={"exact": [1.0]})
    recorder.summary({"run_name": "quickstart"})
    recorder.close()

    config.yaml                         the resolved configuration
    metrics.jsonl                       one JSON object per step or evaluation, with TRL's metric names
    completions/step_000010.parquet     sampled completions with their rewards
    evaluations/step_000010.json        an evaluation with the results of each prompt (written by `RunOutput`)
    adapter/                            the trained adapter in PEFT's format (written by the trainer)
    checkpoints/                        to resume from (written by the trainer)
    summary.json                        evaluation before and after, seconds by phase, peak memory

`metrics.jsonl` is appended line by line, so a killed run keeps every finished step; all other files are written atomically.
JSON is strict: a value that is not finite becomes null. A full disk raises the system's OSError. The process holds a lock on
the folder, which ends with the process.
"""

import json
import math
import os
import resource
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from ..common.exact_json import strict
from ..common.files import atomic_write
from ..display.view_text import When, evaluation_rewards
from .completions import write_completions
from .evaluation_files import remove_after
from .reporting import Report
from .run_folder import ADAPTER_DIR, CONFIG_FILE, METRICS_FILE, locked_folder, move_aside

SUMMARY_FILE = "summary.json"
PHASES = ("rollout", "reward", "train", "publish", "checkpoint")
RECENT_STEPS = 10  # their mean reward ranks a checkpoint if the run does not evaluate


class RunRecorder:
    """Writes one run folder. Construct it after the inputs of the run were validated: it creates the folder and `config.yaml`.

    A folder that already holds a run is renamed to `<name>.1` (or the next free number); `moved_aside` is its new path, else
    None. With `resume`, the result of `state_dict`, the run in the folder is resumed instead, and the folder does not change
    before `resume()`.

    Raises:
        ValueError: `output_dir` is a file, the process works inside it, or another process writes to it.
    """

    def __init__(self, output_dir: Path, *, config_yaml: str, resume: Mapping[str, Any] | None = None) -> None:
        self.output_dir = Path(output_dir)
        self._config_yaml = config_yaml
        self._lock = ExitStack()
        self._steps = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._evaluation: dict[str, Mapping[str, Any] | None] = {"before": None, "after": None}
        self._recent_rewards: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_evaluation: tuple[int, float] | None = None
        self._started = time.monotonic()
        self._peak_memory = 0
        self._peak_gpu_mib = 0.0
        self._reports: list[Report] = []
        self._metrics_bytes = 0
        self.moved_aside = None
        with ExitStack() as lock:
            lock.enter_context(locked_folder(self.output_dir))
            if resume is None:
                self.moved_aside = move_aside(self.output_dir)
                # Resolved, since the target of a link was just moved aside.
                self.output_dir.resolve().mkdir(parents=True, exist_ok=True)
                lock.enter_context(locked_folder(self.output_dir))
                atomic_write(self.output_dir / CONFIG_FILE, config_yaml.encode())
            else:
                self._restore(resume)
            self._lock = lock.pop_all()

    @property
    def adapter_dir(self) -> Path:
        """The folder for the adapter in PEFT's format. Not created here."""
        return self.output_dir / ADAPTER_DIR

    def report_to(self, reports: Sequence[Report]) -> None:
        """Also send all further rows to these trackers; `close` closes them."""
        self._reports += reports

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step to `metrics.jsonl`; `time/<phase>` (seconds) is also summed for the summary."""
        self._append({"step": step, **metrics})
        self._steps += 1
        reward = float(metrics.get("reward_without_failures", metrics.get("reward", math.nan)))
        if math.isfinite(reward):  # no reward says nothing about the policy
            self._recent_rewards.append(reward)
        self._peak_gpu_mib = max(self._peak_gpu_mib, float(metrics.get("memory/gpu_reserved_mib", 0.0)))
        for name, value in metrics.items():
            if name.startswith("time/"):
                self._seconds[name.removeprefix("time/")] += float(value)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append a row of a user's metrics after `step` steps."""
        self._append({"step": step, **metrics})

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add time outside of steps, such as that of a checkpoint, to the seconds in the summary."""
        self._seconds[phase] += seconds

    def evaluation(self, step: int, metrics: Mapping[str, float], *, when: When, is_complete: bool = True) -> None:
        """Append an evaluation after `step` steps; `metrics` are those of `Evaluation.metrics`, at least `eval_reward`.

        is_complete: False if a reward function failed: it ranks no checkpoint.
        """
        self._append({"step": step, **metrics})
        self._last_evaluation = (step, float(metrics["eval_reward"])) if is_complete else None
        if when != "during":
            self._evaluation[when] = evaluation_rewards(metrics)

    def end_with(self, metrics: Mapping[str, float]) -> None:
        """The evaluation with these metrics, which has its row already, is that after training."""
        self._evaluation["after"] = evaluation_rewards(metrics)

    def completions(
        self,
        step: int,
        table: Mapping[str, Sequence],
        *,
        rewards: Mapping[str, Sequence[float | None]] | None = None,
        extras: Mapping[str, Sequence] | None = None,
        data: Mapping[str, Sequence] | None = None,
    ) -> Path:
        """Write the completions of a step to a Parquet file and return its path. See `completions.write_completions`."""
        path = self.output_dir / "completions" / f"step_{step:06d}.parquet"
        write_completions(path, step, table, rewards=rewards or {}, extras=extras or {}, data=data or {})
        return path

    def summary(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write `summary.json` and return its content.

        The recorder adds the evaluations (each in the form of `evaluation_rewards`), seconds by phase (summed over the steps),
        steps, and peak memory in bytes: resident, and reserved on the GPU if there is one.
        `values` (run_name, model, ...) has priority; its `seconds` are merged. `seconds.total` is the time of the run, also
        before it was resumed, unless `values` has it.
        """
        measured = {**dict.fromkeys(PHASES, 0.0), **self._seconds, "total": time.monotonic() - self._started}
        summary = {
            "evaluation": {when: rewards or {"reward": None, "rewards": {}} for when, rewards in self._evaluation.items()},
            "steps": self._steps,
            "peak_memory_bytes": self._peak(),
            **({"peak_gpu_memory_bytes": int(self._peak_gpu_mib * 2**20)} if self._peak_gpu_mib else {}),
            **values,
            "seconds": measured | dict(values.get("seconds", {})),
        }
        summary = strict(summary)
        atomic_write(self.output_dir / SUMMARY_FILE, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
        return summary

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; none if it does not exist yet."""
        return read_metrics(self.output_dir) if (self.output_dir / METRICS_FILE).is_file() else []

    # ------------------------------------------------------------------------------------------- checkpoints and resuming

    def reward_at(self, step: int, *, by_evaluation: bool) -> float | None:
        """The value that ranks a checkpoint after `step` steps: its evaluation, or the mean reward of the last steps with one.

        None if that is not known.
        """
        if by_evaluation:
            reward = self._last_evaluation[1] if self._last_evaluation and self._last_evaluation[0] == step else math.nan
        else:
            reward = sum(self._recent_rewards) / len(self._recent_rewards) if self._recent_rewards else math.nan
        return reward if math.isfinite(reward) else None

    def state_dict(self) -> dict[str, Any]:
        """The length of the records and all sums, as plain data."""
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
            "peak_gpu_mib": self._peak_gpu_mib,
            "reports": {report.name: report.state_dict() for report in self._reports},
        }

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        path = self.output_dir / METRICS_FILE
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self, *, failed: bool = False) -> None:
        """Close the trackers and unlock the folder. `failed`: the run did not finish."""
        with self._lock:
            for report in self._reports:
                report.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None and not issubclass(kind, SystemExit))  # a signal is not a failure

    def resume(self) -> bool:
        """Start to write to the folder: remove the records after the checkpoint, and write the configuration.

        Returns whether all records until the checkpoint exist.
        """
        (self.output_dir / SUMMARY_FILE).unlink(missing_ok=True)  # it may be of an earlier end of the run
        metrics = self.output_dir / METRICS_FILE
        num_bytes = metrics.stat().st_size if metrics.is_file() else 0
        if num_bytes > self._metrics_bytes:
            os.truncate(metrics, self._metrics_bytes)
        for path in (self.output_dir / "completions").glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > self._steps:
                path.unlink()
        remove_after(self.output_dir, self._steps)
        atomic_write(self.output_dir / CONFIG_FILE, self._config_yaml.encode())
        return num_bytes >= self._metrics_bytes

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]
        self._seconds.update(state["seconds"])
        for when, rewards in state["evaluation"].items():  # a number in checkpoints of earlier versions
            self._evaluation[when] = {"reward": rewards, "rewards": {}} if isinstance(rewards, float) else rewards
        self._recent_rewards.extend(state["recent_rewards"])
        self._last_evaluation = state["last_evaluation"] and tuple(state["last_evaluation"])
        self._started -= state["elapsed"]
        self._peak_memory = state["peak_memory"]
        self._peak_gpu_mib = state.get("peak_gpu_mib", 0.0)  # not in checkpoints of earlier versions
        self._metrics_bytes = state["metrics_bytes"]

    def _peak(self) -> int:
        """Peak resident memory in bytes, also of earlier processes of this run."""
        return max(self._peak_memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(strict(row), allow_nan=False) + "\n"
        with (self.output_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(line)
        for report in self._reports:
            report.log(row)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` in order, without an incomplete last line (of a killed run, or a full disk).

    Raises:
        ValueError: the folder has no metrics, or a line other than the last is no JSON.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {METRICS_FILE}")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the rest is empty or incomplete
    return [json.loads(line) for line in lines]


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The content of a run's `summary.json`; None if it does not exist yet."""
    path = Path(run_dir) / SUMMARY_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
