#!/usr/bin/env python3
"""Compare an exported model with the policy that was trained, by greedy completions of the run's evaluation prompts.

`adapter` is rankup's engine on the base model with the run's adapter, `merged` the same engine on the output of
`rankup export --merge`, without any adapter. Both compute in fp32, so that only the order of operations differs; each engine
has a separate process, one after the other. `base` is how many of the completions the base model gives too: the score of
a lost adapter. Exits with 1 if a completion differs.

examples:
  scripts/bench/export_agreement.py runs/quickstart           about two minutes
  scripts/bench/export_agreement.py runs/quickstart --rows 16
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import Result, command_line, run
from workers import Worker

Completions = list[tuple[int, ...]]


def main() -> None:
    """Run the comparison, print the counts and write the JSON file."""
    parser = command_line(__doc__, repeats=1, what="rollouts of each engine; all must agree")
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint of one")
    parser.add_argument("--rows", type=int, metavar="N", help="prompts to compare (default: all of the evaluation data)")
    result = run(parser.parse_args(), measure, report)
    sys.exit(0 if result["equal"] == result["total"] else 1)


def measure(options: argparse.Namespace) -> Result:
    """Export, sample from both, and count equal completions."""
    from rankup.grpo.cli.export.export import export_merged
    from rankup.grpo.cli.export.model_card import read_run

    completions: dict[str, Completions] = {}
    with tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder:
        merged = Path(folder) / "merged"
        export_merged(read_run(options.run), merged, dtype="float32")
        for name, model in (("adapter", None), ("merged", merged)):
            side_of = {"run": options.run, "merged": model, "rows": options.rows}
            with Worker(name, "rollout_sides:GreedySide", **side_of) as side:
                rollouts = [side.call("completions") for _ in range(options.repeats)]
                if model is None:
                    completions["base"] = side.call("completions", of_base=True)
            assert all(rollout == rollouts[0] for rollout in rollouts), f"{name} is not deterministic"
            completions[name] = rollouts[0]

    def equal_to(name: str) -> int:
        return sum(one == other for one, other in zip(completions["adapter"], completions[name], strict=True))

    tokens = sum(map(len, completions["adapter"]))
    return {"equal": equal_to("merged"), "of_base": equal_to("base"), "total": len(completions["adapter"]), "tokens": tokens}


def report(result: Result) -> str:
    """The counts in a line."""
    total = result["total"]
    return f"equal completions: {result['equal']}/{total}, {result['tokens']} tokens (base model: {result['of_base']}/{total})"


if __name__ == "__main__":
    main()
