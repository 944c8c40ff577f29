#!/usr/bin/env python3
"""Kills a run again and again with SIGKILL, resumes it, and compares what it ends with to a run that was left alone.

The run is made once undisturbed. Then, so many times: it is started anew, killed a random moment after a random step (every
fourth time while a checkpoint is being written), and resumed to its end. The same means: the adapter's file to the byte, all
metrics but times, speeds and memory, and all saved completions. A resumed run must also have gone on from the newest checkpoint
that was whole when it was killed. Exit status 0 only if all of them are the same.
"""

from __future__ import annotations

import argparse
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
from common import ROOT, use_environment

SAVE_STEPS = 2
WRITE_SECONDS = 0.02  # what a checkpoint of a small model takes
STEP = re.compile(r"^step +\d+/\d+ ", re.MULTILINE)
OF_ITS_OWN = ("time/", "tokens_per_second/", "memory/")  # metrics that no two runs share
EXAMPLES = """examples:
  scripts/soak.py configs/quickstart.yaml --kills 20 optim.max_steps=8 optim.prompts_per_step=4 data.eval_rows=8
  scripts/soak.py run.yaml --kills 3 --folder /tmp/soak
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run ends with, in hashes."""

    adapter: str
    metrics: str
    completions: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One kill: when it came, where the run went on, and what it ended with."""

    number: int
    moment: str
    steps_seen: int
    whole_step: int
    resumed_step: int
    outcome: Outcome


def main() -> int:
    options = _options()
    use_environment()
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        sys.exit(f"soak: {options.folder} is not empty: remove what is in it, or give another --folder")
    chance = random.Random(options.seed)
    rankup = Path(sys.executable).with_name("rankup")
    command = [str(rankup), "train", str(options.file), f"checkpoint.save_steps={SAVE_STEPS}", *options.overrides]

    undisturbed = options.folder / "undisturbed"
    output, seconds = _run_to_its_end(command, undisturbed)
    steps = len(STEP.findall(output))
    expected = outcome_of(undisturbed)
    print(f"undisturbed: {steps} steps, {seconds:.0f} s, adapter {expected.adapter[:12]}", flush=True)
    trials = []
    for number in range(1, options.kills + 1):
        folder = options.folder / f"kill_{number}"
        after_step = None if number % 4 == 0 else chance.randint(1, steps)
        trial = _kill_and_resume(command, folder, number, after_step=after_step, chance=chance)
        trials.append(trial)
        same = trial.outcome == expected and trial.resumed_step == trial.whole_step
        print(
            f"kill {number}: {trial.moment}, at step {trial.steps_seen}; resumed after step {trial.resumed_step}: "
            f"{'the same' if same else f'DIFFERENT {trial}'}",
            flush=True,
        )
        shutil.rmtree(folder)
    same = [trial for trial in trials if trial.outcome == expected]
    kept = [trial for trial in trials if trial.resumed_step == trial.whole_step]
    writing = [trial for trial in trials if trial.moment == "while a checkpoint was written"]
    shutil.rmtree(undisturbed)
    print(
        f"{len(same)} of {len(trials)} end with the same adapter, metrics and completions; "
        f"{len(kept)} of {len(trials)} went on from the newest whole checkpoint; "
        f"{len(writing)} were killed while a checkpoint was written"
    )
    return 0 if len(same) == len(kept) == len(trials) else 1


def outcome_of(run: Path) -> Outcome:
    """Hashes of a finished run's adapter, metrics and completions."""
    import pyarrow.parquet

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{name: value for name, value in row.items() if not name.startswith(OF_ITS_OWN)} for row in rows]
    tables = [pyarrow.parquet.read_table(path).to_pylist() for path in sorted((run / "completions").iterdir())]
    return Outcome(
        adapter=_hash((run / "adapter" / "adapter_model.safetensors").read_bytes()),
        metrics=_hash(json.dumps(timeless).encode()),
        completions=_hash(repr(tables).encode()),
    )


def _run_to_its_end(command: Sequence[str], folder: Path) -> tuple[str, float]:
    """Output and seconds of a run that is left alone."""
    started = time.monotonic()
    with _start(command, folder) as process:
        output = process.communicate()[0]
    if process.returncode != 0:
        raise SystemExit(f"the run failed with status {process.returncode}:\n{output}")
    return output, time.monotonic() - started


def _kill_and_resume(
    command: Sequence[str], folder: Path, number: int, *, after_step: int | None, chance: random.Random
) -> Trial:
    """Kill soon after that step, or, without one, as soon as a checkpoint is being written; then resume to the end."""
    with _start(command, folder) as process:
        output = ""
        if after_step is None:
            _wait_for_a_write(process, folder, nth=chance.randint(1, 3))
            time.sleep(chance.random() * WRITE_SECONDS)
        else:
            output, seconds_a_step = _read_until(process, after_step)
            time.sleep(chance.random() * 2 * seconds_a_step)
        process.kill()
        output += process.communicate()[0]
    is_partial = any((folder / "checkpoints").glob(".step_*.partial"))
    whole_step = _newest_whole_step(folder)
    resumed, _ = _run_to_its_end([*command, "--resume"], folder)
    match = re.search(r"^going on after step (\d+)$", resumed, re.MULTILINE)
    had_ended = "there is nothing left to do" in resumed  # it was killed on its way out
    return Trial(
        number=number,
        moment="after its end" if had_ended else "while a checkpoint was written" if is_partial else "between",
        steps_seen=len(STEP.findall(output)),
        whole_step=whole_step,
        resumed_step=int(match[1]) if match else whole_step if had_ended else 0,
        outcome=outcome_of(folder),
    )


def _read_until(process: subprocess.Popen[str], step: int) -> tuple[str, float]:
    """The output up to the line of that step, and the seconds that the last step took."""
    assert process.stdout is not None
    lines, times = [], [time.monotonic()]
    for line in process.stdout:
        lines.append(line)
        if STEP.match(line):
            times.append(time.monotonic())
            if len(times) > step:
                break
    return "".join(lines), times[-1] - times[-2] if step > 1 else 0.5


def _wait_for_a_write(process: subprocess.Popen[str], folder: Path, *, nth: int) -> None:
    """Return while the n-th checkpoint is being written, or when the process has ended."""
    seen: set[str] = set()
    while process.poll() is None:
        seen |= {path.name for path in (folder / "checkpoints").glob(".step_*.partial")}
        if len(seen) >= nth:
            return
        time.sleep(0.001)


def _newest_whole_step(folder: Path) -> int:
    """The newest checkpoint by its name: what has its name is whole."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step_??????")), default=0)


def _start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    words = [*command, f"logging.output_dir={folder}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a run file; a run of a minute will do")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="what to set differently")
    parser.add_argument("--kills", type=int, default=20, help="how often to kill and resume (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak", help="for the runs, empty or new")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
