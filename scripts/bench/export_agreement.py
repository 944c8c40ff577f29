#!/usr/bin/env python3
"""Compare an exported model with the policy that was trained, by greedy completions of the run's evaluation prompts.

`adapter` is rankup's engine on the base model with the run's adapter, `merged` the same engine on the output of
`rankup export --merge`, without any adapter. Both compute in fp32, so that only the order of operations differs; each engine
has a separate process, one after the other. `base` is how many of the completions the base model gives too: the score of
a lost adapter. Exits with 1 if a completion differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import Result, command_line, run, use_environment
from workers import Worker

EXAMPLES = """examples:
  scripts/bench/export_agreement.py runs/quickstart           about two minutes
  scripts/bench/export_agreement.py runs/quickstart --rows 16
"""
Completions = list[tuple[int, ...]]


class GreedySide:
    """An fp32 engine with the base model and the adapter of a run, or with a merged model (`merged`, its folder)."""

    def __init__(self, *, run: Path, merged: Path | None, rows: int | None) -> None:
        from rankup.grpo.common.quiet import quiet_stderr
        from rankup.grpo.config import load_config
        from rankup.grpo.data.run_inputs import load_run_inputs
        from rankup.grpo.model.policy import Policy
        from rankup.grpo.run.records import CONFIG_FILE
        from rankup.grpo.update.session import engine_settings
        from rankup.rollout.engine import RolloutEngine

        config = load_config(run / CONFIG_FILE, ["model.dtype=float32", f"data.eval_rows={rows or 'null'}"])
        inputs = load_run_inputs(config)
        assert inputs.eval_prompts is not None, "the run has no evaluation data"
        self._prompts = [list(row.token_ids) for row in inputs.eval_prompts.rows]
        self._sampling = config.rollout.greedy()
        self._use_adapter = merged is None
        settings = engine_settings(config, inputs.model_path)
        with quiet_stderr():
            self._engine = RolloutEngine(dataclasses.replace(settings, model=str(merged or inputs.model_path)))
            if merged is None:
                policy = Policy(inputs.model_path, lora=config.lora, dtype="float32", device=self._engine.device)
                policy.load_adapter(run / "adapter")
                policy.attach(self._engine.slots)
                self._engine.publish(policy.write_slots)

    def completions(self, *, of_base: bool = False) -> Completions:
        """Token ids of the greedy completion of each prompt, in the order of the prompts. `of_base`: without the adapter."""
        groups = self._engine.rollout(self._prompts, self._sampling, use_adapter=self._use_adapter and not of_base)
        return [group.completions[0].token_ids for group in sorted(groups, key=lambda group: group.index)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print the counts and write the JSON file."""
    parser = command_line(__doc__, EXAMPLES, repeats=1, what="rollouts of each engine; all must agree")
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint of one")
    parser.add_argument("--rows", type=int, metavar="N", help="prompts to compare (default: all of the evaluation data)")
    result = run(parser.parse_args(arguments), measure, report)
    sys.exit(0 if result["equal"] == result["total"] else 1)


def measure(options: argparse.Namespace) -> Result:
    """Export, sample from both, and count equal completions."""
    from rankup.grpo.cli.export.export import export_merged
    from rankup.grpo.cli.export.model_card import read_run
    from rankup.grpo.common.quiet import quiet_loggers

    quiet_loggers()
    completions: dict[str, Completions] = {}
    with tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder:
        merged = Path(folder) / "merged"
        export_merged(read_run(options.run), merged, dtype="float32")
        for name, model in (("adapter", None), ("merged", merged)):
            side_of = {"run": options.run, "merged": model, "rows": options.rows}
            with Worker(name, "export_agreement:GreedySide", **side_of) as side:
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
    use_environment()
    main()
