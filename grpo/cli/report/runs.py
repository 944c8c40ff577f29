"""What a run folder holds, for its page: facts, configuration, metrics and completions files.

    run = RunFolder(Path("runs/quickstart"))
    run.read_rows()             # the rows of metrics.jsonl that are new since the last call
    run.headline()              # {"before": 0.12, "after": 0.88, "steps": 130, ...}
    run.completions_files()     # {10: Path("runs/quickstart/completions/step_000010.parquet"), ...}

The folder is only read, and never locked: the run may go on meanwhile. A half-written last line waits for its end, and a file
that vanishes is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...config import GRPOConfig, dump_config, load_config
from ...config.functions import text_of
from ...display.view_text import duration
from ...run.records import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE

Row = Mapping[str, Any]
GUARDS = ("alarms", "skipped_steps", "halvings", "restores")


class RestartedError(Exception):
    """Another run has replaced the rows that were read: everything must be read again."""


@dataclass(slots=True)
class RunFolder:
    """A run folder that is read, perhaps while the run goes on.

    Attributes:
        config: None if the configuration is missing, or of another version; `config_error` says which.
        rows: of `metrics.jsonl`, as far as they were read.

    Raises:
        ValueError: the folder holds no run.
    """

    folder: Path
    rows: list[Row] = field(default_factory=list)
    config: GRPOConfig | None = None
    config_error: str | None = None
    _offset: int = 0
    _inode: int | None = None

    def __post_init__(self) -> None:
        if not any((self.folder / name).is_file() for name in (METRICS_FILE, CONFIG_FILE)):
            raise ValueError(f"{self.folder} is not a run folder: it has neither {METRICS_FILE} nor {CONFIG_FILE}")
        try:
            self.config = load_config(self.folder / CONFIG_FILE)
        except (ValueError, OSError) as error:
            self.config_error = f"{self.folder / CONFIG_FILE}: {error}"

    def read_rows(self) -> list[Row]:
        """The complete new lines of `metrics.jsonl`; none if there are none, or no file yet.

        Raises:
            RestartedError: the file is shorter than before, or another one.
        """
        try:
            with (self.folder / METRICS_FILE).open("rb") as file:
                self._check_same(os.fstat(file.fileno()))
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        lines = text.split(b"\n")
        complete = lines[:-1]
        self._offset += sum(len(line) + 1 for line in complete)
        try:
            rows = [json.loads(line) for line in complete if line.strip()]
        except ValueError as error:
            if not self.rows:
                raise ValueError(f"a line of {self.folder / METRICS_FILE} is no JSON: {error}") from error
            raise RestartedError(str(self.folder)) from error  # shortened and longer again since the last call
        self.rows += rows
        return rows

    def _check_same(self, status: os.stat_result) -> None:
        """Raise RestartedError if this is not the file that was read before, or it is shorter."""
        if self._inode is not None and (status.st_ino != self._inode or status.st_size < self._offset):
            raise RestartedError(str(self.folder))
        self._inode = status.st_ino

    def summary(self) -> Mapping[str, Any]:
        """The content of `summary.json`; empty before the end of the run."""
        try:
            return json.loads((self.folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def completions_files(self) -> dict[int, Path]:
        """The completions files by step, in order."""
        found = {}
        for path in (self.folder / "completions").glob("step_*.parquet"):
            if match := re.fullmatch(r"step_(\d+)", path.stem):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    # --------------------------------------------------------------------------------------------- what the page shows

    def headline(self) -> dict[str, Any]:
        """The numbers at the top of the page. Rewards are those of evaluations; unknown values are None."""
        summary = self.summary()
        evaluations = [row["eval_reward"] for row in self.rows if "eval_reward" in row]
        latest = evaluations[-1] if len(evaluations) > 1 else None
        steps = [row for row in self.rows if "reward" in row]
        of_summary = summary.get("evaluation", {})
        before = of_summary.get("before", {}).get("reward")
        last = steps[-1] if steps else {}
        guards = {name: last.get(f"guards/{name}") or 0 for name in GUARDS}
        return {
            "before": evaluations[0] if before is None and evaluations and self.rows[0].get("step") == 0 else before,
            "after": of_summary.get("after", {}).get("reward") if summary else latest,
            "steps": last.get("step", 0),
            "max_steps": self.config.optim.max_steps if self.config else None,
            "seconds": summary.get("seconds", {}).get("total") or _seconds(steps),
            "peak_memory_bytes": summary.get("peak_memory_bytes") or _memory(steps),
            "guards": {name: count for name, count in guards.items() if count},
            "state": "not finished" if not summary else "interrupted" if summary.get("interrupted") else "finished",
        }

    def facts(self) -> list[tuple[str, str]]:
        """Label and text of the lines that describe the run."""
        if self.config is None:
            return [("configuration", self.config_error or "missing")]
        from ...update.ranks import step_factor

        config, lora, rollout, optim = self.config, self.config.lora, self.config.rollout, self.config.optim
        targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
        formula = "α/√rank" if lora.use_rslora else "α/rank"
        by_phase = {name: s for name, s in self.summary().get("seconds", {}).items() if name != "total" and s >= 1}
        facts = [
            ("model", config.model.name + (f" ({config.model.load_in})" if config.model.load_in else "")),
            ("adapter", f"rank {lora.rank} on {targets}"),
            ("scale", f"{lora.scaling:.4g} ({formula}, α = {lora.alpha:g})"),
            ("effective step", f"{step_factor(lora, optim):.3g} × reference (α 32, 1e-4)"),
            ("started from", lora.start_from or ""),
            ("objective", text_of(config.algorithm.loss_type)),
            ("KL coefficient", f"{config.algorithm.beta:g}" if config.algorithm.beta else ""),
            ("learning rate", f"{optim.learning_rate:g}, {optim.lr_scheduler_type}"),
            ("a step", f"{optim.prompts_per_step} prompts × {rollout.num_generations} completions"),
            ("completions", f"up to {rollout.max_completion_length} tokens, temperature {rollout.temperature:g}"),
            ("seed", str(config.seed)),
            ("time by phase", ", ".join(f"{name} {duration(s)}" for name, s in by_phase.items())),
            ("folder", str(self.folder)),
        ]
        return [(label, text) for label, text in facts if text]

    def options(self) -> list[tuple[str, str, bool]]:
        """Key, value and whether it differs from the default, of every option."""
        if self.config is None:
            try:
                raw = yaml.safe_load((self.folder / CONFIG_FILE).read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError):
                return []
            return [(key, text, False) for key, text in _flat(raw if isinstance(raw, dict) else {}).items()]
        defaults = _flat(yaml.safe_load(dump_config(GRPOConfig())))
        options = _flat(yaml.safe_load(dump_config(self.config)))
        return [(key, text, defaults.get(key) != text) for key, text in options.items()]


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each of these different folders: its last part, with as many more as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    names = [part[-1] for part in parts]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) if names.count(name) > 1 else name for name, part in zip(names, parts, strict=True)]
    return names


def columns_of(rows: Sequence[Row]) -> dict[str, tuple[list[int], list[float | None]]]:
    """Every metric of these rows by its name: steps, and values of six digits. What is no number is left out."""
    columns: dict[str, tuple[list[int], list[float | None]]] = {}
    for row in rows:
        for name, value in row.items():
            if name == "step" or isinstance(value, str | list | dict):
                continue
            steps, values = columns.setdefault(name, ([], []))
            steps.append(int(row.get("step", 0)))
            values.append(None if value is None else float(f"{value:.6g}"))
    return columns


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Options by their dotted names, with their values as text in one line."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return flat


def _seconds(steps: Sequence[Row]) -> float | None:
    """Of all steps, by their phases, if the run has no summary yet."""
    total = sum(value or 0.0 for row in steps for name, value in row.items() if name.startswith("time/"))
    return total or None


def _memory(steps: Sequence[Row]) -> float | None:
    """Peak resident memory of the steps in bytes."""
    return max((row.get("memory/resident_mib") or 0.0 for row in steps), default=0.0) * 2**20 or None
