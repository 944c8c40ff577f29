#!/usr/bin/env python3
"""What it costs to release vLLM's KV cache while training, and how much memory it returns.

Steps of the quick start's model in one process: 8 prompts x 16 completions of exactly 24 tokens, an update, a publish. Steps
that suspend the engine before the update take turns with steps that do not. `suspend` is the time of that call; what the
kernel does when sampling writes the pages again is in the time of the step. The first two steps of each are not measured.

examples:
  scripts/bench/release.py --json release.json          about five minutes on two idle cores
  scripts/bench/release.py --repeats 3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

from common import Result, command_line, interleave, markdown, run, summarise

WARM_UP = 2
SIDES = {"released": True, "kept": False}


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    run(command_line(__doc__, repeats=9, what="measured steps of each kind").parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Seconds of steps and of suspending, and resident memory after the rollout and before the update."""
    from process_memory import resident_bytes
    from rollout_sides import TrainingSide

    side = TrainingSide(overrides=[])

    def step(name: str) -> dict[str, float]:
        sampled = side.sample(8, 16, 24)
        before = resident_bytes("VmRSS")
        started = time.perf_counter()
        if SIDES[name]:
            side.engine.suspend()
        suspended = time.perf_counter() - started
        returned = before - resident_bytes("VmRSS")
        return {"step": sampled + suspended + side.train(), "suspend": suspended, "returned": returned / 2**20}

    found = interleave(SIDES, options.repeats + WARM_UP, step)
    steps = {name: summarise([one["step"] for one in all_of[WARM_UP:]]) for name, all_of in found.items()}
    released = found["released"]
    return {
        "steps": steps,
        "overhead": steps["released"]["median"] / steps["kept"]["median"] - 1,
        "suspend_seconds": summarise([one["suspend"] for one in released[WARM_UP:]]),
        "returned_mib": {"first": released[0]["returned"], "later": summarise([one["returned"] for one in released[1:]])},
    }


def report(result: Mapping[str, Result]) -> str:
    """Markdown."""
    rows = [[name, f"{times['median']:.3f} s", f"{times['min']:.3f} s"] for name, times in result["steps"].items()]
    returned, suspending = result["returned_mib"], result["suspend_seconds"]["median"]
    return (
        f"{markdown(['KV cache while training', 'step, median', 'fastest'], rows, left=1)}\n\n"
        f"Overhead {100 * result['overhead']:.1f} %. Suspending takes {1e3 * suspending:.0f} ms and returns "  # type: ignore[operator]
        f"{returned['first']:.0f} MiB the first time, {returned['later']['median']:.0f} MiB later."
    )


if __name__ == "__main__":
    main()
