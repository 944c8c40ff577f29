#!/usr/bin/env python3
"""What `rankup report --serve` costs a run that goes on.

Start the run first. A server of its page runs beside it; in turns of some steps it is asked for news every two seconds, as an
open page does, or left alone. Steps of the two kinds are compared, from the moment of the call until the run ends; besides
them the seconds of CPU that the server took for a step in which it was asked, which bound the cost from above.

examples:
  scripts/bench/report_serve.py runs/quickstart --json report_serve.json
  scripts/bench/report_serve.py runs/quickstart --skip 40      without the steps before the 40th, whose completions are longer
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import psutil
from common import Result, command_line, markdown, run, summarise

SECONDS = 2.0  # how often a page asks: ASK_AGAIN in grpo/cli/report/page/live.js


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=4, what="steps in which the server is asked, and then is not")
    parser.add_argument("run", type=Path, help="the folder of a run that goes on")
    parser.add_argument("--skip", type=int, default=0, metavar="STEP", help="leave out the steps before this one")
    run(parser.parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Seconds of steps with and without a page that asks, and the server's seconds of CPU for a step."""
    command = [Path(sys.executable).with_name("rankup"), "report", options.run, "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = _address(server.stdout.readline())
            _ask(address)  # the page itself
            return _watch(options, address, psutil.Process(server.pid))
        finally:
            server.terminate()


def _watch(options: argparse.Namespace, address: str, server: psutil.Process) -> Result:
    """Ask in every second turn until the run has ended."""
    starts: dict[int, float] = {}  # when a step's row was written
    cpu: dict[int, float] = {}
    asked: dict[int, bool] = {}
    seen, is_asked, next_question = "0.0", True, 0.0
    while not (options.run / "summary.json").exists():
        last = _last_step(options.run / "metrics.jsonl")
        if last not in starts:
            starts[last], cpu[last] = time.monotonic(), sum(server.cpu_times()[:2])
            is_asked = (last // options.repeats) % 2 == 0
            asked[last + 1] = is_asked
        if is_asked and time.monotonic() >= next_question:
            news = json.loads(_ask(f"{address}new?seen={seen}"))
            seen, next_question = news["runs"][0]["seen"], time.monotonic() + SECONDS
        time.sleep(0.02)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    of_server: dict[bool, list[float]] = {True: [], False: []}
    for one, other in pairwise(sorted(starts)):
        if other == one + 1 and other >= options.skip:
            seconds[asked[other]].append(starts[other] - starts[one])
            of_server[asked[other]].append(cpu[other] - cpu[one])
    return {
        "steps": {name: summarise(seconds[kind]) for name, kind in (("asked", True), ("left alone", False))},
        "counts": {"asked": len(seconds[True]), "left alone": len(seconds[False])},
        "cpu_seconds_per_step": summarise(of_server[True]),
        "cpu_share": sum(of_server[True]) / sum(seconds[True]),
        "overhead": summarise(seconds[True])["median"] / summarise(seconds[False])["median"] - 1,
    }


def _address(line: str) -> str:
    found = re.search(r"http://\S+/", line)
    assert found is not None, f"no address in {line!r}"
    return found.group()


def _ask(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def _last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines[-3:] if line.endswith("}")), default=0)


def report(result: Result) -> str:
    """Markdown."""
    rows = [
        [name, str(result["counts"][name]), f"{times['median']:.2f} s", f"{times['min']:.2f} s"]
        for name, times in result["steps"].items()
    ]
    table = markdown(["server", "steps", "median", "fastest"], rows, left=1)
    return (
        f"{table}\n\nMedians differ by {100 * result['overhead']:+.1f} %. "
        f"The server takes {1e3 * result['cpu_seconds_per_step']['median']:.0f} ms of CPU for a step, "
        f"{100 * result['cpu_share']:.2f} % of one core."
    )


if __name__ == "__main__":
    main()
