#!/usr/bin/env python3
"""How long `rankup chat` takes to switch to another checkpoint of a run: when it is read, and later from memory.

examples:
  scripts/bench/chat_switch.py runs/quickstart
  scripts/bench/chat_switch.py runs/quickstart model.dtype=float32 --json chat_switch.json
"""

from __future__ import annotations

import argparse
import time

from common import Result, command_line, markdown, run, summarise


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=20, what="switches from memory, of each checkpoint")
    parser.add_argument("run", help="a run folder with an adapter or checkpoints")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="override a setting")
    run(parser.parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Seconds from the name of a checkpoint until the engine samples with it."""
    from rankup.grpo.cli.chat.session import ChatSession, open_chat
    from rankup.grpo.cli.chat.target import find_target
    from rankup.kernels.cpu_memory import keep_freed_memory

    def switch(session: ChatSession, name: str) -> float:
        started = time.perf_counter()
        session.select(name)
        return time.perf_counter() - started

    keep_freed_memory()
    target = find_target(options.run, options.overrides, context=None)
    assert target.adapters is not None, "it is a run"
    names = [one.name for one in target.adapters.listed()]
    with open_chat(target) as session:  # which reads the first one
        first = {name: switch(session, name) for name in names if name != target.first}
        later = [switch(session, name) for _ in range(options.repeats) for name in names]
    lora = target.config.lora
    return {
        "model": target.config.model.name,
        "dtype": target.config.model.dtype,
        "rank": lora.rank,
        "checkpoints": names,
        "first_seconds": summarise(list(first.values())) if first else None,
        "later_seconds": summarise(later),
    }


def report(result: Result) -> str:
    """Markdown."""
    rows = [
        [what, f"{1e3 * times['median']:.1f} ms", f"{1e3 * times['min']:.1f} to {1e3 * times['max']:.1f} ms"]
        for what, times in (("first, from disk", result["first_seconds"]), ("later, from memory", result["later_seconds"]))
        if times is not None
    ]
    title = f"{result['model']} in {result['dtype']}, rank {result['rank']}, {len(result['checkpoints'])} checkpoints"
    return f"{title}\n\n{markdown(['switch', 'median', 'range'], rows, left=1)}"


if __name__ == "__main__":
    main()
