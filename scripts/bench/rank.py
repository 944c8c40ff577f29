#!/usr/bin/env python3
"""How the training phase of a step slows down as the rank grows, compared with the growth of its operations.

The phase is the one of `train_step.py` (`Learner.update`: forward, backward, clipping, AdamW), SmolLM2-135M-Instruct in bf16,
adapters on all seven projections, alpha 32, ranks from 8 to 128. Two cases: "64+64", 2 prompts of 64 tokens with 8 completions
of 64 tokens each, and "quickstart", the shape of the quick start: 16 prompts of 40 tokens with 8 completions of 16.

Operations are the multiply-adds of all matrix products, counted from the shapes (`operations.py`). In `64_to_128`,
`time_over_operations` is the growth in time divided by the growth in operations: 1 if time grows as fast as operations, below
1 if a product costs less per operation at the larger rank. The work of the optimizer grows with the rank too, and is included
in the time only.

All ranks are in one process and take turns, in both directions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import report_tables
from cases import Case
from common import Result, command_line, interleave, run, summarise, use_environment
from operations import ModelShape, num_tokens, step_operations
from workers import Worker

EXAMPLE = """examples:
  scripts/bench/rank.py --json rank.json                 about five minutes on two idle cores
  scripts/bench/rank.py --repeats 2 --rank 64 --rank 128
"""
RANKS = (8, 16, 32, 64, 96, 128)
CASES = {"64+64": Case(64, 64), "quickstart": Case(40, 16, prompts=16)}
COMPARED = ("64", "128")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, EXAMPLE, repeats=7, what="measured steps at each rank")
    rank_help = f"a rank; may be repeated (default {', '.join(map(str, RANKS))})"
    parser.add_argument("--rank", type=int, action="append", metavar="R", help=rank_help)
    options = parser.parse_args(arguments)
    options.rank = sorted(set(options.rank or RANKS))
    if not all(1 <= rank <= 128 for rank in options.rank):
        parser.error("--rank must be from 1 to 128")
    run(options, measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Seconds and operations at each rank in each case."""
    cases = {}
    with Worker(f"rankup at {len(options.rank)} ranks", "train_sides:RankSide", ranks=options.rank) as worker:
        settings = worker.call("describe")
        settings["lora"].pop("rank")
        model = ModelShape.read(Path(settings.pop("model_path")))
        for name, case in CASES.items():
            print(f"{name}: {options.repeats} repeats after a warm-up", flush=True)
            worker.call("begin", case)
            for rank in options.rank:
                worker.call("seconds", rank)
            seconds = interleave(options.rank, options.repeats, lambda rank: worker.call("seconds", rank))
            cases[name] = case_result(model, case, seconds)
    return {"cases": cases, "settings": settings}


def case_result(model: ModelShape, case: Case, seconds: Mapping[int, Sequence[float]]) -> Result:
    """The figures of a case from the seconds of its repeats at each rank."""
    tokens, targets = num_tokens(case.shapes())
    ranks = {}
    for rank, values in seconds.items():
        operations = step_operations(model, case.shapes(), rank=rank)
        ranks[str(rank)] = {"seconds": summarise(values), "operations": operations | {"total": sum(operations.values())}}
    result: Result = {"ranks": ranks, "tokens": tokens, "targets": targets}
    low, high = map(ranks.get, COMPARED)
    if low is not None and high is not None:
        time_ratio = high["seconds"]["median"] / low["seconds"]["median"]
        operations_ratio = high["operations"]["total"] / low["operations"]["total"]
        result["64_to_128"] = {
            "time_ratio": time_ratio,
            "operations_ratio": operations_ratio,
            "time_over_operations": time_ratio / operations_ratio,
        }
    return result


def report(result: Result) -> str:
    """The table; for each case, its tokens, its spread, and the growth from rank 64 to 128 in time over operations."""
    lines = [report_tables.rank(result), ""]
    for name, case in result["cases"].items():
        spreads = [one["seconds"]["max"] / one["seconds"]["min"] - 1 for one in case["ranks"].values()]
        line = f"- {name}, {case['tokens']} tokens: repeats differ by at most {max(spreads):.0%}"
        if growth := case.get("64_to_128"):
            line += f"; from rank 64 to 128 time over operations grows {growth['time_over_operations']:.2f} x"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    use_environment()
    main()
