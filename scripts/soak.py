#!/usr/bin/env python3
"""Kill a run repeatedly with SIGKILL, resume it, and compare its results with those of an uninterrupted run.

First the run is made without interruption. Then, `--kills` times: a new run is killed a random time after a random step (every
fourth time while a checkpoint is being written) and resumed to its end. The results must be equal: the adapter's file byte for
byte, all metrics except times, speeds and memory, and all saved completions. A resumed run must also have continued from the
newest complete checkpoint. The exit status is 0 only if this holds for every kill.

examples:
  scripts/soak.py configs/quickstart.yaml --kills 20 optim.max_steps=8 optim.prompts_per_step=4 data.eval_rows=8
  scripts/soak.py run.yaml --kills 3 --folder /tmp/soak
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from common import ROOT, script_parser

SAVE_STEPS = 2
WRITE_SECONDS = 0.02  # about the time to write a checkpoint of a small model
STEP = re.compile(r"^step +(\d+)/\d+ ", re.MULTILINE)
NOT_REPRODUCIBLE = ("time/", "tokens_per_second/", "memory/", "eval_runtime", "eval_samples_per_second")
"""Metrics that differ between any two runs."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One kill: when, the newest complete checkpoint then, the step from which the run was resumed, and its results."""

    moment: str
    steps_seen: int
    saved_step: int
    resumed_step: int
    outcome: dict[str, str]


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("file", type=Path, help="a run file; a run of a minute is enough")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="override a setting")
    parser.add_argument("--kills", type=int, default=20, help="how often to kill and resume (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak", help="for the runs, empty or new")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        sys.exit(f"soak: {options.folder} is not empty: remove its contents, or choose another --folder")
    chance = random.Random(options.seed)
    rankup = Path(sys.executable).with_name("rankup")
    command = [str(rankup), "train", str(options.file), f"checkpoint.save_steps={SAVE_STEPS}", *options.overrides]

    uninterrupted = options.folder / "uninterrupted"
    started = time.monotonic()
    steps = len(STEP.findall(_run(command, uninterrupted)))
    expected = outcome_of(uninterrupted)
    print(f"uninterrupted: {steps} steps, {time.monotonic() - started:.0f} s, adapter {expected['adapter'][:12]}", flush=True)
    trials = []
    for number in range(1, options.kills + 1):
        folder = options.folder / f"kill_{number}"
        after_step = None if number % 4 == 0 else chance.randint(1, steps)
        trial = _kill_and_resume(command, folder, after_step=after_step, chance=chance)
        trials.append(trial)
        equal = trial.outcome == expected and trial.resumed_step == trial.saved_step
        verdict = "equal" if equal else f"DIFFERENT {trial}"
        where = f"at step {trial.steps_seen}; resumed after step {trial.resumed_step}"
        print(f"kill {number}: {trial.moment}, {where}: {verdict}", flush=True)
        shutil.rmtree(folder)
    shutil.rmtree(uninterrupted)
    equal = sum(trial.outcome == expected for trial in trials)
    continued = sum(trial.resumed_step == trial.saved_step for trial in trials)
    writing = sum(trial.moment == "while a checkpoint was written" for trial in trials)
    print(
        f"{equal} of {len(trials)} end with the same adapter, metrics and completions; "
        f"{continued} of {len(trials)} continued from the newest complete checkpoint; "
        f"{writing} were killed while a checkpoint was written"
    )
    return 0 if equal == continued == len(trials) else 1


def outcome_of(run: Path) -> dict[str, str]:
    """Hashes of the adapter, metrics and completions of a finished run."""
    import pyarrow.parquet

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in row.items() if not name.startswith(NOT_REPRODUCIBLE)} for row in rows]
    tables = [pyarrow.parquet.read_table(path).to_pylist() for path in sorted((run / "completions").iterdir())]
    results = {
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": json.dumps(metrics).encode(),
        "completions": repr(tables).encode(),
    }
    return {name: hashlib.sha256(data).hexdigest() for name, data in results.items()}


def _run(command: Sequence[str], folder: Path) -> str:
    """The output of a run that is not killed."""
    with _start(command, folder) as process:
        output = process.communicate()[0]
    if process.returncode != 0:
        raise SystemExit(f"the run failed with status {process.returncode}:\n{output}")
    return output


def _start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    words = [*command, f"logging.output_dir={folder}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _kill_and_resume(command: Sequence[str], folder: Path, *, after_step: int | None, chance: random.Random) -> Trial:
    """Kill soon after a step, or, if it is None, while a checkpoint is being written; then resume to the end."""
    checkpoints = folder / "checkpoints"
    with _start(command, folder) as process:
        output = ""
        if after_step is None:
            _wait_for_write(process, checkpoints, nth=chance.randint(1, 3))
            time.sleep(chance.random() * WRITE_SECONDS)
        else:
            output, seconds_per_step = _read_until(process, after_step)
            time.sleep(chance.random() * 2 * seconds_per_step)
        process.kill()
        output += process.communicate()[0]
    is_partial = any(checkpoints.glob(".step_*.partial"))
    # A folder gets its final name only when it is complete.
    saved_step = max((int(path.name[5:]) for path in checkpoints.glob("step_??????")), default=0)
    first_step = STEP.search(_run([*command, "--resume"], folder))  # None: killed after its last checkpoint
    return Trial(
        moment="after its end" if first_step is None else "while a checkpoint was written" if is_partial else "between",
        steps_seen=len(STEP.findall(output)),
        saved_step=saved_step,
        resumed_step=saved_step if first_step is None else int(first_step[1]) - 1,
        outcome=outcome_of(folder),
    )


def _read_until(process: subprocess.Popen[str], step: int) -> tuple[str, float]:
    """The output up to the line of a step, and the seconds that the last step took."""
    assert process.stdout is not None
    lines, times = [], [time.monotonic()]
    for line in process.stdout:
        lines.append(line)
        if STEP.match(line):
            times.append(time.monotonic())
            if len(times) > step:
                break
    return "".join(lines), times[-1] - times[-2] if step > 1 else 0.5


def _wait_for_write(process: subprocess.Popen[str], checkpoints: Path, *, nth: int) -> None:
    """Return while the n-th checkpoint is being written, or when the process has ended."""
    seen: set[str] = set()
    while process.poll() is None:
        seen |= {path.name for path in checkpoints.glob(".step_*.partial")}
        if len(seen) >= nth:
            return
        time.sleep(0.001)


if __name__ == "__main__":
    sys.exit(main())
