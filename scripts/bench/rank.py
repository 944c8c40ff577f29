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

examples:
  scripts/bench/rank.py --json rank.json                 about five minutes on two idle cores
  scripts/bench/rank.py --repeats 2 --rank 64 --rank 128
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cases import Case
from common import Result, command_line, interleave, markdown, run, summarise
from operations import step_operations

if TYPE_CHECKING:
    from rankup.grpo.memory.shapes import ModelShape

RANKS = (8, 16, 32, 64, 96, 128)
CASES = {"64+64": Case(64, 64), "quickstart": Case(40, 16, prompts=16)}


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=7, what="measured steps at each rank")
    rank_help = f"a rank; may be repeated (default {', '.join(map(str, RANKS))})"
    parser.add_argument("--rank", type=int, action="append", metavar="R", help=rank_help)
    options = parser.parse_args()
    options.rank = sorted(set(options.rank or RANKS))
    if not all(1 <= rank <= 128 for rank in options.rank):
        parser.error("--rank must be from 1 to 128")
    run(options, measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Seconds and operations at each rank in each case."""
    from train_sides import MODEL, RankupSide

    from rankup.grpo.memory.shapes import read_shape

    model = read_shape(MODEL)
    sides = {rank: RankupSide(rank=rank) for rank in options.rank}
    cases = {}
    for name, case in CASES.items():
        print(f"{name}: {options.repeats} repeats after a warm-up", flush=True)
        for side in sides.values():
            side.begin(case)
            side.seconds()
        seconds = interleave(options.rank, options.repeats, lambda rank: sides[rank].seconds())
        cases[name] = case_result(model, case, seconds)
    return {"cases": cases, "settings": sides[options.rank[0]].describe()}


def case_result(model: ModelShape, case: Case, seconds: Mapping[int, Sequence[float]]) -> Result:
    """The figures of a case from the seconds of its repeats at each rank."""
    ranks = {}
    for rank, values in seconds.items():
        operations = step_operations(model, case, rank=rank)
        ranks[str(rank)] = {"seconds": summarise(values), "operations": operations | {"total": sum(operations.values())}}
    result: Result = {"ranks": ranks, "tokens": case.tokens, "targets": case.targets}
    if {"64", "128"} <= ranks.keys():
        time_ratio = ranks["128"]["seconds"]["median"] / ranks["64"]["seconds"]["median"]
        operations_ratio = ranks["128"]["operations"]["total"] / ranks["64"]["operations"]["total"]
        result["64_to_128"] = {
            "time_ratio": time_ratio,
            "operations_ratio": operations_ratio,
            "time_over_operations": time_ratio / operations_ratio,
        }
    return result


# -------------------------------------------------------------------------------------------------------------- report


def report(result: Result) -> str:
    """The table; for each case, its tokens, its spread, and the growth from rank 64 to 128 in time over operations."""
    lines = [table(result), ""]
    for name, case in result["cases"].items():
        spreads = [one["seconds"]["max"] / one["seconds"]["min"] - 1 for one in case["ranks"].values()]
        line = f"- {name}, {case['tokens']} tokens: repeats differ by at most {max(spreads):.0%}"
        if growth := case.get("64_to_128"):
            line += f"; from rank 64 to 128 time over operations grows {growth['time_over_operations']:.2f} x"
        lines.append(line)
    return "\n".join(lines)


def table(result: Result) -> str:
    """A row per rank: seconds and operations of each case, both also relative to rank 64."""
    cases = result["cases"]
    heads, columns = ["rank"], [list(next(iter(cases.values()))["ranks"])]
    for name, case in cases.items():
        heads += [f"{name}: seconds", "operations"]
        reference = case["ranks"].get("64")
        for key, value, form, unit in (("seconds", "median", "{:.3f}", 1.0), ("operations", "total", "{:.0f} G", 1e9)):
            values = [one[key][value] for one in case["ranks"].values()]
            growth = [f" (× {one / reference[key][value]:.2f})" if reference else "" for one in values]
            columns.append([form.format(one / unit) + also for one, also in zip(values, growth, strict=True)])
    if all("64_to_128" in case for case in cases.values()):
        columns[0].append("64 to 128")
        for index, case in enumerate(cases.values()):
            columns[1 + 2 * index].append(f"**× {case['64_to_128']['time_ratio']:.2f}**")
            columns[2 + 2 * index].append(f"× {case['64_to_128']['operations_ratio']:.2f}")
    return markdown(heads, [list(row) for row in zip(*columns, strict=True)], left=0)


def draw(result: Result, out: Path) -> None:
    """Time and operations by rank, relative to the smallest one, a panel per case."""
    from plots import COLOURS, LEGEND, OURS, SUBTITLE, measured

    from rankup.grpo.run.plots import STRONG

    cases = result["cases"]
    with measured(out, "Time and operations of a step, as the rank grows", result, panels=len(cases)) as panels:
        for panel, (name, case) in zip(panels, cases.items(), strict=True):
            ranks = [int(rank) for rank in case["ranks"]]
            operations = [one["operations"]["total"] for one in case["ranks"].values()]
            first = case["ranks"][str(ranks[0])]["seconds"]["median"]
            low, median, high = (
                [one["seconds"][key] / first for one in case["ranks"].values()] for key in ("min", "median", "max")
            )
            panel.plot(ranks, [count / operations[0] for count in operations], color=COLOURS[1], label="operations", **STRONG)
            panel.fill_between(ranks, low, high, color=OURS, alpha=0.15)
            panel.plot(ranks, median, color=OURS, marker="o", markerfacecolor="white", label="time", **STRONG)
            panel.set_xticks(ranks)
            panel.set_ylim(bottom=0)
            panel.grid(axis="y")
            panel.set_xlabel("rank")
            panel.set_ylabel(f"relative to rank {ranks[0]}")
            panel.set_title(f"{name}, {case['tokens']:,} tokens", **SUBTITLE)
            panel.legend(loc="lower right", **LEGEND)


if __name__ == "__main__":
    main()
