#!/usr/bin/env python3
"""The stability study: GRPO on the task of the quick start, over rank, scaling, learning rate and seed.

Every run is a line of a JSONL file, written when the run ends. Runs that have a line are skipped, so the study can be stopped
at any time and resumed with the same command. Consecutive runs of one rank share an engine.

    grid        rank x scaling x learning rate x seed; short runs of 64 completions per step, constant rate, no guards
    collapse    runs set up to collapse (rank 128, alpha 256, rate 2e-4 constant, 32 completions per step), without guards and
                with them
    ramp        the same adapter with a rate that rises to 1e-3: it learns, then the rate becomes too high
    defaults    the quick start as shipped, at rank 64 and 128

examples:
  scripts/study/ranks.py grid --minutes 60    the missing runs, for an hour
  scripts/study/ranks.py collapse defaults    all missing runs of these two
  scripts/study/ranks.py --list               finished and missing runs
  scripts/study/ranks.py --plot docs/study/ranks.png --table
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from common import QUICKSTART, ROOT, script_parser

if TYPE_CHECKING:
    from rankup import GRPOConfig
    from rankup.rollout.engine import RolloutEngine

RESULTS = ROOT / "docs" / "study" / "ranks.jsonl"
SCALINGS = ("alpha 32", "alpha r", "alpha 2r", "rslora 32")
RATES = (1e-4, 3e-4, 3e-5)  # the default first


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the study. `settings` are overrides of the quick start's run file."""

    experiment: str
    rank: int
    scaling: str
    learning_rate: float
    seed: int
    guards: bool
    settings: dict[str, Any] = field(hash=False)
    stop_early: bool = False

    @property
    def key(self) -> str:
        """Identifies the run in the results."""
        values = (self.experiment, self.rank, self.scaling, self.learning_rate, self.seed, self.guards)
        return " ".join(map(str, values))


def varied(run: Run) -> Run:
    """A run with the settings that its rank, scaling, learning rate and guards require, at a constant rate."""
    alpha = {"alpha 32": 32, "alpha r": run.rank, "alpha 2r": 2 * run.rank, "rslora 32": 32}[run.scaling]
    settings = {
        "lora.rank": run.rank,
        "lora.alpha": alpha,
        "lora.use_rslora": run.scaling.startswith("rslora"),
        "optim.learning_rate": run.learning_rate,
        "optim.lr_scheduler_type": "constant",
        "guards.enabled": run.guards,
    }
    return replace(run, settings=settings | run.settings)


def grid() -> Iterator[Run]:
    """Seeds in the outer loop, then rates: if time runs out, all ranks and scalings are compared at the same rates."""
    settings = {
        "optim.max_steps": 40,
        "optim.prompts_per_step": 8,
        "logging.eval_steps": 10,
        "logging.eval_before": False,
    }
    for seed, rate, rank, scaling in product((1, 2), RATES, (64, 128), SCALINGS):
        yield varied(Run("grid", rank, scaling, rate, seed, guards=False, stop_early=True, settings=settings))


def collapse() -> Iterator[Run]:
    """A high rate on noisy gradients."""
    settings = {"optim.max_steps": 80, "optim.prompts_per_step": 4, "logging.eval_steps": 10}
    for seed, guards in product((1, 2), (False, True)):
        yield varied(Run("collapse", 128, "alpha 2r", 2e-4, seed, guards, settings))


def ramp() -> Iterator[Run]:
    """A warm-up as long as the run, to a rate that is too high."""
    settings = {
        "optim.warmup_steps": 59,
        "optim.max_steps": 60,
        "optim.prompts_per_step": 8,
        "logging.eval_steps": 5,
    }
    for seed, guards in product((1, 2), (False, True)):
        yield varied(Run("ramp", 128, "alpha 2r", 1e-3, seed, guards, settings))


def defaults() -> Iterator[Run]:
    """The shipped run file; only the rank and the seed change."""
    from rankup.grpo.config import load_config

    rate = load_config(QUICKSTART).optim.learning_rate
    for seed, rank in product((1, 2), (64, 128)):
        yield Run("defaults", rank, "alpha 32", rate, seed, guards=True, settings={"lora.rank": rank})


EXPERIMENTS = {"grid": grid, "collapse": collapse, "ramp": ramp, "defaults": defaults}


# ------------------------------------------------------------------------------------------------------------- running


class CollapsedError(Exception):
    """The reward has fallen by more than half: see `has_collapsed`."""


class Watch:
    """A view that records what a run shows, and ends it when it has collapsed, if `stop_early`."""

    def __init__(self, *, stop_early: bool) -> None:
        self.stop_early = stop_early
        self.metrics: list[Mapping[str, float]] = []
        self.evaluations: list[tuple[int, float]] = []
        self.notes: list[str] = []

    def step(self, _step: int, metrics: Mapping[str, float], _seconds: Mapping[str, float]) -> None:
        self.metrics.append(metrics)
        if self.stop_early and has_collapsed([m["reward"] for m in self.metrics]):
            raise CollapsedError

    def evaluation(self, step: int, metrics: Mapping[str, float], _when: str) -> None:
        self.evaluations.append((step, metrics["eval_reward"]))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self) -> None: ...
    def stage(self, text: str) -> None: ...
    def completions(self, step: int, rows: Any) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None: ...
    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None: ...


def has_collapsed(rewards: list[float]) -> bool:
    """Whether the mean of the last ten steps is below half of the best earlier mean of five, which must be at least 0.3."""
    if len(rewards) < 15:
        return False
    best = max(statistics.fmean(rewards[i : i + 5]) for i in range(len(rewards) - 14))
    return best >= 0.3 and statistics.fmean(rewards[-10:]) < best / 2


def perform(run: Run, engine: RolloutEngine | None, folder: Path) -> tuple[dict[str, Any], RolloutEngine]:
    """Do one run. Returns its row, and the engine for the next run."""
    from rankup import GRPOTrainer
    from rankup.grpo.common.model_files import resolve_model
    from rankup.grpo.common.quiet import quiet_stderr
    from rankup.grpo.config import load_config
    from rankup.grpo.update.resolve import engine_settings
    from rankup.rollout.engine import RolloutEngine

    overrides = {"seed": run.seed, "logging.output_dir": str(folder / run.key.replace(" ", "_")), **run.settings}
    config: GRPOConfig = load_config(QUICKSTART, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    settings = engine_settings(config, resolve_model(config.model.name))
    if engine is not None and replace(engine.settings, seed=settings.seed) != settings:
        engine.close()
        engine = None
    if engine is None:
        with quiet_stderr():
            engine = RolloutEngine(settings)
    watch = Watch(stop_early=run.stop_early)
    started = time.monotonic()
    stopped = None
    try:
        GRPOTrainer(args=config, view=watch).train(engine=engine)  # type: ignore[arg-type]
    except CollapsedError:
        stopped = "collapsed"
    gc.collect()
    return row_of(run, config, watch, stopped, minutes=(time.monotonic() - started) / 60), engine


def row_of(run: Run, config: GRPOConfig, watch: Watch, stopped: str | None, *, minutes: float) -> dict[str, Any]:
    from rankup.grpo.update.ranks import step_factor

    last = watch.metrics[-1] if watch.metrics else {}
    evaluations = [reward for step, reward in watch.evaluations if step > 0]
    return {
        **asdict(run),
        "key": run.key,
        "scale": config.lora.scaling,
        "step_factor": step_factor(config.lora, config.optim),
        "steps": len(watch.metrics),
        "stopped": stopped,
        "best_evaluation": max(evaluations, default=None),
        "last_evaluation": evaluations[-1] if evaluations and stopped is None else None,
        "evaluations": watch.evaluations,
        **{
            name: [round(m[key], 4) for m in watch.metrics if key in m]
            for name, key in (("rewards", "reward"), ("entropies", "entropy"), ("grad_norms", "grad_norm"))
        },
        "guard_actions": {name: value for name, value in last.items() if name.startswith("guards/")},
        # Not those with the path of the run folder: results are published.
        "notes": [note for note in watch.notes if str(config.logging.output_dir) not in note],
        "minutes": round(minutes, 2),
    }


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by key."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["key"]: row for row in rows}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSONL file (default docs/study/ranks.jsonl)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study", help="parent of the run folders")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--list", action="store_true", help="list finished and missing runs")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the results")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown tables")
    options = parser.parse_args()
    unknown = set(options.experiments) - set(EXPERIMENTS)
    if unknown:
        parser.error(f"unknown experiment {', '.join(sorted(unknown))}; choose from {', '.join(EXPERIMENTS)}")
    done = read_results(options.results)
    if options.list:
        for run in (run for experiment in EXPERIMENTS.values() for run in experiment()):
            print("done   " if run.key in done else "missing", run.key)
    if options.plot or options.table:
        from study_report import plot, tables

        if options.plot:
            plot(list(done.values()), options.plot)
        if options.table:
            print(tables(list(done.values())))
    runs = [run for name in options.experiments for run in EXPERIMENTS[name]()]
    if runs:
        do_missing(runs, done, options)


def do_missing(runs: Iterable[Run], done: Collection[str], options: argparse.Namespace) -> None:
    """Do the runs whose keys are not in `done`, and append their rows to the results."""
    from rankup.grpo.common.quiet import quiet_loggers

    quiet_loggers()
    started = time.monotonic()
    engine: RolloutEngine | None = None
    for run in runs:
        if run.key in done or time.monotonic() - started > options.minutes * 60:
            continue
        row, engine = perform(run, engine, options.runs)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        result = f"best {row['best_evaluation']}, last {row['last_evaluation']}, {row['stopped'] or 'complete'}"
        print(f"{run.key}: {result}, {row['minutes']} min", flush=True)
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    main()
