#!/usr/bin/env python3
"""How the training phase of a step slows down as the rank grows, beside how many more operations it has to do.

The phase is the one of `train_step.py` (`Learner.update`: forward, backward, clipping, AdamW), SmolLM2-135M-Instruct in bf16,
adapters on all seven projections, alpha 32, at ranks from 8 to 128. Two cases: "64+64", 2 prompts of 64 tokens with 8
completions of 64 tokens each, and "quickstart", the quick start's shape: 16 prompts of 40 tokens with 8 completions of 16.

Operations are the multiply-adds of all matrix products, counted from the shapes (`operations.py`). In `64_to_128`,
`time_over_operations` is the growth in time over the growth in operations: 1 where time grows as the operations do, below 1
where the larger rank is the cheaper one a product. The optimizer's work grows with the rank too, and is in the time only.

All ranks sit in one process and take turns, in both directions.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import Case
from common import Worker, command_line, machine, summarise, use_environment, versions, write_json
from operations import ModelShape, num_tokens, step_operations

EXAMPLE = """examples:
  scripts/bench/rank.py --json rank.json                 about five minutes on two idle cores
  scripts/bench/rank.py --repeats 2 --rank 64 --rank 128
"""
RANKS = (8, 16, 32, 64, 96, 128)
CASES = {"64+64": Case(64, 64), "quickstart": Case(40, 16, prompts=16)}
COMPARED = (64, 128)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    options = _parse(arguments)
    before = machine()
    if before["load_average"] > 0.5:
        print(f"warning: the machine is not idle (load average {before['load_average']:.1f}): steps will take longer")
    print(f"starting rankup at {len(options.rank)} ranks", flush=True)
    with Worker("rankup", "train_sides:RankSide", ranks=options.rank) as worker:
        about = worker.call("describe")
        model = ModelShape.read(Path(about.pop("model_path")))
        cases = {}
        for name, case in CASES.items():
            print(f"{name}: warming up, then {options.repeats} repeats", flush=True)
            cases[name] = case_result(model, case, _measure(worker, case, options.rank, options.repeats))
    result = {
        "cases": cases,
        "what": " ".join((__doc__ or "").split()),
        "settings": about,
        "machine": before,
        "versions": versions(),
    }
    _show(result)
    if options.json is not None:
        write_json(options.json, result)
        print(f"written to {options.json}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, EXAMPLE, repeats=7, what="measured steps at each rank")
    rank_help = f"a rank; may be given several times (default {', '.join(map(str, RANKS))})"
    parser.add_argument("--rank", type=int, action="append", metavar="R", help=rank_help)
    options = parser.parse_args(arguments)
    options.rank = sorted(set(options.rank or RANKS))
    if not all(1 <= rank <= 128 for rank in options.rank):
        parser.error("--rank must be from 1 to 128")
    return options


def _measure(worker: Worker, case: Case, ranks: Sequence[int], repeats: int) -> dict[int, list[float]]:
    """Seconds of the repeats at each rank."""
    worker.call("begin", case)
    for rank in ranks:
        worker.call("seconds", rank)
    seconds: dict[int, list[float]] = {rank: [] for rank in ranks}
    for repeat in range(repeats):
        for rank in ranks if repeat % 2 == 0 else reversed(ranks):
            seconds[rank].append(worker.call("seconds", rank))
    return seconds


def case_result(model: ModelShape, case: Case, seconds: dict[int, list[float]]) -> dict[str, Any]:
    """The figures of a case from the seconds of its repeats at each rank."""
    tokens, targets = num_tokens(case.shapes())
    ranks = {}
    for rank, values in seconds.items():
        operations = step_operations(model, case.shapes(), rank=rank)
        ranks[str(rank)] = {"seconds": summarise(values), "operations": operations | {"total": sum(operations.values())}}
    result: dict[str, Any] = {"ranks": ranks, "tokens": tokens, "targets": targets}
    low, high = (ranks.get(str(rank)) for rank in COMPARED)
    if low is not None and high is not None:
        time_ratio = high["seconds"]["median"] / low["seconds"]["median"]
        operations_ratio = high["operations"]["total"] / low["operations"]["total"]
        result["64_to_128"] = {
            "time_ratio": time_ratio,
            "operations_ratio": operations_ratio,
            "time_over_operations": time_ratio / operations_ratio,
        }
    return result


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    cpu = result["machine"]
    console = Console(width=None if os.isatty(1) else 110)
    for name, case in result["cases"].items():
        title = f"training phase of a step by rank, {name}, {case['tokens']} tokens"
        table = Table(title=f"{title}, {cpu['cores']} cores of {cpu['cpu']}")
        for column in ("rank", "seconds", "spread", "operations", "of these the adapter's"):
            table.add_column(column, justify="right")
        for rank, figures in case["ranks"].items():
            seconds, operations = figures["seconds"], figures["operations"]
            table.add_row(
                rank,
                f"{seconds['median']:.2f}",
                f"{seconds['min']:.2f} to {seconds['max']:.2f}",
                f"{operations['total'] / 1e9:.0f} G",
                f"{operations['adapter'] / operations['total']:.0%}",
            )
        console.print(table)
        if growth := case.get("64_to_128"):
            console.print(
                f"from rank 64 to 128: {growth['time_ratio']:.2f} times the time for {growth['operations_ratio']:.2f} times "
                f"the operations ({growth['time_over_operations']:.2f})\n",
                highlight=False,
            )


if __name__ == "__main__":
    use_environment()
    main()
