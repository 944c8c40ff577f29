#!/usr/bin/env python3
"""How fast completions are sampled with a rank-64 adapter, against stock vLLM with the same adapter and without LoRA.

`ratio_to_stock` and `ratio_to_base` compare tokens per second of whole rollouts of the quick start: 128 sequences (8
prompts x 16 completions of 24 tokens), prompts computed anew, temperature 1, the log-probability of every sampled token.
They go without seeds, because vLLM 0.32 on CPU fails where a request with a seed has its prompt computed in two parts.
Stock vLLM takes minutes for one, so it is measured once.

`decoding` is the other half of the truth: one-token prompts, so that a run is decoding and nothing else, and no side
gains or loses by how it computes prompts. There the base model has the advantage of vLLM's compiled graph, which vLLM
switches off on CPU as soon as LoRA is on.

Repeats are interleaved. Each engine sits in a process of its own that sleeps while another is measured; how much
processor time the sleepers took is in the result. Before measuring, rankup and stock vLLM must agree on the
log-probabilities that the adapter gives, and differ from the base model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import Worker, command_line, machine, summarise, use_environment, versions, write_json

EXAMPLE = """examples:
  scripts/bench/rollout.py --json rollout.json            about six minutes on two idle cores
  scripts/bench/rollout.py --repeats 1 --tokens 8         a quick look
"""
PROMPTS, COMPLETIONS, RANK = 8, 16, 64
PUBLISHES = 20
STOCK_SHARE = 8  # stock vLLM with the adapter samples this many times fewer tokens a run, in every other repeat
AGREE = 0.35  # largest difference of rankup and stock that counts as rounding, as a share of the adapter's effect
SIDES = {
    "rankup": "rankup, rank-64 adapter",
    "base": "vLLM, base model without LoRA",
    "stock": "vLLM, the same adapter",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    options = _parse(arguments)
    before = machine()
    if before["load_average"] > 0.5:
        print(f"warning: the machine is not idle (load average {before['load_average']:.1f}): figures will be low")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rankup-bench-"))
        bench = RolloutBench(stack, Path(folder) / "adapter")
        bench.check_agreement()
        bench.measure(options.repeats, tokens=options.tokens)
        result = bench.result() | {"machine": before, "versions": versions()}
    _show(result)
    if options.json is not None:
        write_json(options.json, result)
        print(f"written to {options.json}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, EXAMPLE, repeats=5, what="measured runs of each engine")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="tokens of a completion (default 24)")
    options = parser.parse_args(arguments)
    if not 1 <= options.tokens <= 64:
        parser.error("--tokens must be from 1 to 64")
    return options


class RolloutBench:
    """The three engines and what was measured with them."""

    def __init__(self, stack: ExitStack, adapter_folder: Path) -> None:
        self._stack = stack
        self.workers: dict[str, Worker] = {}
        self._start("rankup", "RankupSide", rank=RANK, adapter_folder=adapter_folder)
        self.about = self.workers["rankup"].call("describe")
        stock = {"model_path": self.about["model_path"], "kv_cache_bytes": self.about["kv_cache_bytes"], "rank": RANK}
        self._start("base", "StockSide", adapter_folder=None, **stock)
        self._start("stock", "StockSide", adapter_folder=adapter_folder, **stock)
        self.prompts: list[list[int]] = self.workers["rankup"].call("quickstart_prompts", PROMPTS)
        self.decoding: dict[str, list[float]] = {name: [] for name in SIDES}
        self.with_prompts: dict[str, list[float]] = {name: [] for name in SIDES}
        self.idle_share = 0.0
        self.samples = 0

    def _start(self, name: str, side: str, **options: Any) -> None:
        print(f"starting {SIDES[name]}", flush=True)
        self.workers[name] = self._stack.enter_context(Worker(SIDES[name], f"rollout_sides:{side}", **options))

    def check_agreement(self) -> None:
        """Compare log-probabilities of a prompt: exits if rankup and stock vLLM do not sample from the same policy."""
        logprobs = {name: worker.call("prompt_logprobs", self.prompts[0]) for name, worker in self.workers.items()}

        def difference(one: str, other: str) -> float:
            return statistics.fmean(abs(a - b) for a, b in zip(logprobs[one], logprobs[other], strict=True))

        self.agreement = {
            "rankup_to_stock": difference("rankup", "stock"),
            "rankup_to_base": difference("rankup", "base"),
        }
        if self.agreement["rankup_to_stock"] > AGREE * self.agreement["rankup_to_base"]:
            raise SystemExit(f"rankup and stock vLLM do not compute the same policy: {self.agreement}")

    def measure(self, repeats: int, *, tokens: int) -> None:
        """Warm up, then measure `repeats` rounds; every other one includes what takes long."""
        self.tokens = {"rankup": tokens, "base": tokens, "stock": max(1, tokens // STOCK_SHARE)}
        print("warming up", flush=True)
        for name in SIDES:
            self._sample(name, _single_tokens(), max(1, self.tokens[name] // 4))
        for repeat in range(repeats):
            is_long = repeat % 2 == 0
            names = [name for name in SIDES if name != "stock" or is_long]
            for name in names if is_long else reversed(names):
                self.decoding[name].append(self._sample(name, _single_tokens(), self.tokens[name]))
                if is_long and not (name == "stock" and self.with_prompts["stock"]):
                    self.workers[name].call("forget_prompts")
                    rate = self._sample(name, self.prompts, self.about["completion_length"], seeded=False)
                    self.with_prompts[name].append(rate)
            latest = ", ".join(f"{name} {self.decoding[name][-1]:.1f}" for name in names)
            print(f"repeat {repeat + 1} of {repeats}: {latest} tokens/s", flush=True)
        self.publish_ms, self.files_opened = self.workers["rankup"].call("publish", PUBLISHES)

    def _sample(self, name: str, prompts: list[list[int]], tokens: int, *, seeded: bool = True) -> float:
        """Tokens per second of one run, while the other engines must sleep."""
        from rankup.rollout.config import SamplingConfig

        sampling = SamplingConfig(num_generations=COMPLETIONS, max_completion_length=tokens, temperature=1.0)
        sleepers = [worker for other, worker in self.workers.items() if other != name]
        before = sum(worker.cpu_seconds() for worker in sleepers)
        self.samples += 1
        first = self.samples * PROMPTS * COMPLETIONS  # a completion's seed is its prompt's plus its own number
        seeds = [first + index * COMPLETIONS for index in range(len(prompts))] if seeded else None
        sampled, seconds = self.workers[name].call("sample", prompts, sampling, seeds)
        self.idle_share = max(self.idle_share, (sum(worker.cpu_seconds() for worker in sleepers) - before) / seconds)
        assert sampled == len(prompts) * COMPLETIONS * tokens, "every completion has the full length"
        return sampled / seconds

    def result(self) -> dict[str, Any]:
        """The figures, machine and versions aside."""
        decoding = {name: summarise(rates) for name, rates in self.decoding.items()}
        with_prompts = {name: summarise(rates) for name, rates in self.with_prompts.items()}
        publish = summarise(self.publish_ms)
        return {
            "ratio_to_stock": with_prompts["rankup"]["median"] / with_prompts["stock"]["median"],
            "ratio_to_base": with_prompts["rankup"]["median"] / with_prompts["base"]["median"],
            "publish_ms": publish["median"],
            "files_opened": len(self.files_opened),
            "what": " ".join((__doc__ or "").split()),
            "tokens_per_second": with_prompts,
            "decoding": decoding
            | {
                "ratio_to_stock": decoding["rankup"]["median"] / decoding["stock"]["median"],
                "ratio_to_base": decoding["rankup"]["median"] / decoding["base"]["median"],
            },
            "publish": publish,
            "agreement": self.agreement,
            "idle_engines_cpu_share": self.idle_share,
            "settings": {
                "sequences": PROMPTS * COMPLETIONS,
                "prompts": PROMPTS,
                "completions_per_prompt": COMPLETIONS,
                "rank": RANK,
                "tokens_per_completion": self.tokens,
                "rollouts": {
                    "prompt_lengths": [len(ids) for ids in self.prompts],
                    "tokens_per_completion": self.about["completion_length"],
                },
                "sampling": "temperature 1, logprobs=0, a seed a prompt when decoding alone, ignore_eos; same on all sides",
                "processes": "in-process engine, all cores; freed memory kept by rankup and base",
                "rankup": {key: value for key, value in self.about.items() if key != "model_path"},
                "base": self.workers["base"].call("describe"),
                "stock": self.workers["stock"].call("describe"),
            },
        }


def _single_tokens() -> list[list[int]]:
    """Distinct prompts of one token each: any will do."""
    return [[1000 + index] for index in range(PROMPTS)]


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    cpu = result["machine"]
    sequences = result["settings"]["sequences"]
    table = Table(title=f"tokens per second, {sequences} sequences, {cpu['cores']} cores of {cpu['cpu']}")
    for column in ("", "rollouts", "spread", "runs", "decoding alone"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in SIDES.items():
        rate, decoding = result["tokens_per_second"][name], result["decoding"][name]
        spread = f"{rate['min']:.1f} to {rate['max']:.1f}"
        table.add_row(label, f"{rate['median']:.1f}", spread, str(len(rate["all"])), f"{decoding['median']:.1f}")
    console = Console(width=None if os.isatty(1) else 110)
    console.print(table)
    publish, decoding = result["publish"], result["decoding"]
    console.print(
        f"{result['ratio_to_stock']:.1f} times stock vLLM with the same adapter; {decoding['ratio_to_stock']:.1f} decoding\n"
        f"{result['ratio_to_base']:.2f} times the base model; {decoding['ratio_to_base']:.2f} decoding\n"
        f"publish: {publish['median']:.1f} ms ({publish['min']:.1f} to {publish['max']:.1f}), "
        f"{result['files_opened']} files opened\n"
        f"idle engines took at most {result['idle_engines_cpu_share']:.1%} of a core while another was measured",
        highlight=False,
    )


if __name__ == "__main__":
    use_environment()
    main()
