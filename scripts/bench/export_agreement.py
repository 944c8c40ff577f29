#!/usr/bin/env python3
"""Whether an exported model is the policy that was trained: greedy completions of the run's evaluation prompts, two ways.

`adapter` is rankup's engine on the base model with the run's adapter, `merged` the same engine on what `rankup export --merge`
writes, without any adapter. Both compute in fp32, so that only the order of operations differs; each engine sits in a process
of its own, one after the other. `base` is the base model's share of the same completions: what an adapter that was lost would
give. Exits with 1 where a completion differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import Worker, command_line, machine, use_environment, versions, write_json

EXAMPLES = """examples:
  scripts/bench/export_agreement.py runs/quickstart           about two minutes
  scripts/bench/export_agreement.py runs/quickstart --rows 16
"""


def main() -> None:
    parser = command_line(__doc__, EXAMPLES, repeats=1, what="rollouts of each engine; all must agree")
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint of one")
    parser.add_argument("--rows", type=int, metavar="N", help="prompts to compare (default: all of the evaluation data)")
    options = parser.parse_args()
    from rankup.grpo.cli.export.export import export_merged
    from rankup.grpo.cli.export.model_card import read_run
    from rankup.grpo.common.quiet import quiet_loggers

    quiet_loggers()
    with tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder:
        merged = Path(folder) / "merged"
        export_merged(read_run(options.run), merged, dtype="float32")
        completions: dict[str, list[tuple[int, ...]]] = {}
        for name, model in (("adapter", None), ("merged", merged)):
            print(f"sampling from {name}", flush=True)
            with Worker(name, "export_sides:GreedySide", run=options.run, merged=model, rows=options.rows) as side:
                rollouts = [side.call("completions") for _ in range(options.repeats)]
                if model is None:
                    completions["base"] = side.call("completions", of_base=True)
            assert all(rollout == rollouts[0] for rollout in rollouts), f"{name} does not repeat itself"
            completions[name] = rollouts[0]
    total = len(completions["adapter"])
    equal, of_base = (_equal(completions["adapter"], completions[name]) for name in ("merged", "base"))
    tokens = sum(map(len, completions["adapter"]))
    print(f"equal completions: {equal}/{total}, {tokens} tokens (base model: {of_base}/{total})")
    if options.json:
        what = " ".join((__doc__ or "").split())
        counts = {"equal": equal, "of_base": of_base, "total": total, "tokens": tokens}
        write_json(options.json, {"what": what, "machine": machine(), "versions": versions(), **counts})
    sys.exit(0 if equal == total else 1)


def _equal(some: list[tuple[int, ...]], others: list[tuple[int, ...]]) -> int:
    return sum(one == other for one, other in zip(some, others, strict=True))


if __name__ == "__main__":
    use_environment()
    main()
