#!/usr/bin/env python3
"""Time and memory of the training phase of a step, against PEFT with full logits.

The phase leads from scored groups to updated fp32 master weights: forward, backward, clipping, AdamW. SmolLM2-135M-Instruct in
bf16, LoRA of rank 64 on all seven projections, DAPO without KL penalty, one update per batch. The case 256+64 is 2 prompts of
256 random tokens with 8 completions of 64 tokens each.

rankup is `Learner.update`. The other side is stock transformers with stock PEFT: one row per completion including its prompt,
padded on the right, fp32 logits of all positions, torch's log-softmax and attention, the adapter in fp32 (PEFT's default).
Before anything is timed, both must agree on the loss, on the norm and direction of the gradient, and on the log-probability of
every completion token.

`speedup` is the ratio of the medians of interleaved repeats. `memory_ratio` compares `peak_bytes`: the peak resident memory of
a process in its first two steps (optimizer state, gradients, activations, and what libraries allocate) minus its resident
memory after model and adapter were loaded, all weights read, and freed memory returned to the kernel. Below 1 rankup needs
less.

To see where the gain comes from, variants of the stock side run with fewer repeats, each against rankup: freed memory retained
(`kernels/cpu_memory.py`), logits of completions only (`logits_to_keep`), bf16 autocast (as in transformers' Trainer with
bf16=True), and all three.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import Case, add_case_argument, cases_of
from common import Result, command_line, run, summarise, use_environment
from report_tables import train_step
from workers import Turns, Worker

EXAMPLE = """examples:
  scripts/bench/train_step.py --json train_step.json                 both cases, about a quarter of an hour on two idle cores
  scripts/bench/train_step.py --case 128+32 --repeats 2 --main-only  a quick look at another shape
"""
CASES = ("64+64", "256+64")
WARM_UPS = 5  # steps before measuring, until a process has allocated its working memory
STOCK = "PEFT, full logits"
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "stock_with_kept_memory": ("freed memory kept", {"keep_memory": True}),
    "completion_logits": ("completion logits only", {"completion_logits": True}),
    "autocast": ("bf16 autocast", {"autocast": True}),
    "all_three": ("all three", {"keep_memory": True, "completion_logits": True, "autocast": True}),
}
MAX_LOSS_DIFFERENCE = 1e-3  # absolute; the loss is a mean of advantages of order 1
MAX_GRAD_NORM_DIFFERENCE = 0.05  # relative
MIN_COSINE = 0.98
MAX_LOGPROB_DIFFERENCE = 0.35  # mean difference that rounding explains, as a share of the adapter's effect


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, EXAMPLE, repeats=5, what="measured steps of each side")
    add_case_argument(parser, CASES)
    parser.add_argument("--main-only", action="store_true", help="leave out the variants of the stock side")
    run(parser.parse_args(arguments), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Compare rankup with the stock side, then with its variants."""
    with tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder:
        adapter_folder = Path(folder) / "adapter"
        with Worker("rankup", "train_sides:RankupSide", adapter_folder=adapter_folder) as rankup:
            bench = TrainStepBench(rankup, Path(folder), cases_of(options))
            sides: dict[str, tuple[str, dict[str, bool]]] = {"stock": (STOCK, {})}
            if not options.main_only:
                sides |= {name: (f"{STOCK}, but: {label}", changes) for name, (label, changes) in VARIANTS.items()}
            for name, (label, changes) in sides.items():
                repeats = options.repeats if name == "stock" else max(1, options.repeats // 2)
                with Worker(label, "train_sides:StockSide", adapter_folder=adapter_folder, **changes) as stock:
                    bench.compare(name, stock, repeats)
            settings = rankup.call("describe")
            settings.pop("model_path")  # a path of this machine
    return {
        "cases": {name: with_memory_ratio(case) for name, case in bench.results.items()},
        "idle_sides_cpu_share": bench.turns.idle_share,
        "sides": {"rankup": "rankup"} | {name: label for name, (label, _) in sides.items()},
        "settings": settings,
    }


class TrainStepBench:
    """rankup's side against one stock side after another. `results` holds the figures of each case."""

    def __init__(self, rankup: Worker, folder: Path, cases: Mapping[str, Case]) -> None:
        self._rankup = rankup
        self._folder = folder
        self._cases = cases
        self.turns = Turns()
        self.results: dict[str, Result] = {
            name: {"seconds": {}, "peak_bytes": {}, "tokens": {}, "agreement": {}} for name in cases
        }
        self._measure_memory("rankup", rankup)

    def compare(self, name: str, stock: Worker, repeats: int) -> None:
        """Memory, agreement and times of a stock side."""
        self._measure_memory(name, stock)
        for case_name, case in self._cases.items():
            result = self.results[case_name]
            result["agreement"][name] = self._check_agreement(case, f"{name}, {case_name}", stock)
            times = self._measure_times(case, name, stock, repeats)
            ours, theirs = (statistics.median(times[side]) for side in ("rankup", name))
            result["speedup" if name == "stock" else f"speedup_over_{name}"] = theirs / ours
            result["seconds"].setdefault("rankup", summarise(times["rankup"]))  # with a variant only for the ratio
            result["seconds"][name] = summarise(times[name])
            print(f"{case_name}: rankup {ours:.2f} s, {name} {theirs:.2f} s", flush=True)

    def _measure_memory(self, name: str, worker: Worker) -> None:
        """Comes first: the peak is that of a process that has allocated nothing yet."""
        for case_name, case in self._cases.items():
            worker.call("begin", case)
            self.results[case_name]["peak_bytes"][name] = worker.call("peak_bytes")
            self.results[case_name]["tokens"][name] = worker.call("num_tokens")

    def _check_agreement(self, case: Case, name: str, stock: Worker) -> dict[str, float]:
        """Compare loss, gradient and log-probabilities. Exits if the sides do not compute the same step."""
        for worker in (self._rankup, stock):
            worker.call("begin", case)
        ours, theirs = (worker.call("probe", self._folder) for worker in (self._rankup, stock))
        agreement = {
            "loss_difference": abs(ours["loss"] - theirs["loss"]),
            "grad_norm_ratio": ours["grad_norm"] / theirs["grad_norm"],
            "grad_cosine": theirs["grad_cosine"],
            "logprob_difference": _mean_difference(ours["logprobs"], theirs["logprobs"]),
            "adapter_effect": _mean_difference(ours["logprobs"], ours["base_logprobs"]),
        }
        if problems := disagreements(agreement):
            raise SystemExit(f"rankup and {name} do not compute the same step: {', '.join(problems)}; {agreement}")
        return agreement

    def _measure_times(self, case: Case, name: str, stock: Worker, repeats: int) -> dict[str, list[float]]:
        """Seconds of steps of both sides, after the warm-up."""
        pair = {"rankup": self._rankup, name: stock}
        for worker in pair.values():
            worker.call("begin", case)
            for _ in range(WARM_UPS):
                worker.call("seconds")
        return self.turns.interleave(pair, repeats, lambda side: pair[side].call("seconds"))


def with_memory_ratio(case: Result) -> Result:
    """A case with rankup's peak memory over that of the stock side."""
    peak = case["peak_bytes"]
    return {"speedup": case["speedup"], "memory_ratio": peak["rankup"] / peak["stock"], **case}


def disagreements(agreement: Mapping[str, float]) -> list[str]:
    """Names of the quantities that differ by more than bf16 rounding explains."""
    agrees = {
        "loss": agreement["loss_difference"] <= MAX_LOSS_DIFFERENCE,
        "gradient norm": abs(agreement["grad_norm_ratio"] - 1.0) <= MAX_GRAD_NORM_DIFFERENCE,
        "gradient": agreement["grad_cosine"] >= MIN_COSINE,
        "log-probabilities": agreement["logprob_difference"] <= MAX_LOGPROB_DIFFERENCE * agreement["adapter_effect"],
    }
    return [name for name, is_equal in agrees.items() if not is_equal]


def _mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def report(result: Result) -> str:
    """The table, the main ratios, and how quiet the idle sides were."""
    cases: dict[str, Any] = result["cases"]
    ratios = [f"- {name}: {c['speedup']:.2f} x as fast, {c['memory_ratio']:.2f} x the memory" for name, c in cases.items()]
    idle = f"- idle sides used at most {result['idle_sides_cpu_share']:.1%} of a core"
    return "\n".join([train_step(result), "", *ratios, idle])


if __name__ == "__main__":
    use_environment()
    main()
