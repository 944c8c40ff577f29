#!/usr/bin/env python3
"""How long the training phase of a step takes and how much memory, against PEFT with full logits.

The phase goes from scored groups to updated masters: forward, backward, clipping, AdamW. SmolLM2-135M-Instruct in bf16, LoRA
of rank 64 on all seven projections with fp32 masters, DAPO without KL penalty, one update a batch. A case such as 256+64 is
2 prompts of 256 random tokens with 8 completions of 64 tokens each.

rankup is `Learner.update`. The other side is stock transformers with stock PEFT: one row a completion with its prompt, padded
on the right, logits of all positions in fp32, torch's log-softmax; attention is torch's, the adapter is in fp32, which is
PEFT's default. Before anything is timed, both must agree on the loss, on the gradient's norm and direction, and on the
log-probability of every completion token.

`speedup` is the ratio of the medians of interleaved repeats. `memory_ratio` compares `peak_bytes`: the most resident memory
of a process in its first two steps (so optimizer state, gradients, activations and what libraries set up), minus its resident
memory once model and adapter were loaded, all weights read, and freed memory handed back to the kernel. Below 1 is less
than stock.

Where the gain comes from: the stock side once more, in processes of its own and fewer repeats, with freed memory kept
(`kernels/cpu_memory.py`), asking the model for completion logits only (`logits_to_keep`), under bf16 autocast (as
transformers' Trainer runs it with bf16=True), and with all three; rankup is measured again beside each.
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

from cases import Case, add_case_argument
from common import Worker, command_line, machine, summarise, use_environment, versions, write_json

EXAMPLE = """examples:
  scripts/bench/train_step.py --json train_step.json                 both cases, about a quarter of an hour on two idle cores
  scripts/bench/train_step.py --case 128+32 --repeats 2 --main-only  a quick look at another shape
"""
CASES = ("64+64", "256+64")
SIDES = {"rankup": "rankup", "stock": "PEFT, full logits"}
WARM_UPS = 5  # steps of each side that are not measured: until a process has the memory that it works in
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "stock_with_kept_memory": ("freed memory kept", {"keep_memory": True}),
    "completion_logits": ("completion logits only", {"completion_logits": True}),
    "autocast": ("bf16 autocast", {"autocast": True}),
    "all_three": ("all three", {"keep_memory": True, "completion_logits": True, "autocast": True}),
}
LOSS_AGREES = 1e-3  # absolute; the loss is a mean of advantages of order 1
GRAD_NORM_AGREES = 0.05
COSINE_AGREES = 0.98
LOGPROBS_AGREE = 0.35  # largest mean difference that counts as rounding, as a share of the adapter's effect


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    options = _parse(arguments)
    before = machine()
    if before["load_average"] > 0.5:
        print(f"warning: the machine is not idle (load average {before['load_average']:.1f}): steps will take longer")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rankup-bench-"))
        bench = TrainStepBench(stack, Path(folder), {name: Case.parse(name) for name in options.case})
        bench.compare_with_stock(options.repeats)
        if not options.main_only:
            bench.compare_with_variants(max(1, options.repeats // 2))
        result = bench.result() | {"machine": before, "versions": versions()}
    _show(result)
    if options.json is not None:
        write_json(options.json, result)
        print(f"written to {options.json}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, EXAMPLE, repeats=5, what="measured steps of each side")
    add_case_argument(parser, CASES)
    parser.add_argument("--main-only", action="store_true", help="leave out the variants of the stock side")
    options = parser.parse_args(arguments)
    options.case = options.case or list(CASES)
    return options


class TrainStepBench:
    """The sides and what was measured with them, case by case."""

    def __init__(self, stack: ExitStack, folder: Path, cases: dict[str, Case]) -> None:
        self._stack = stack
        self._folder = folder
        self._adapter_folder = folder / "adapter"
        self.cases = cases
        self.idle_share = 0.0
        self.seconds: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
        self.speedups: dict[str, dict[str, float]] = {name: {} for name in cases}
        self.peak_bytes: dict[str, dict[str, int]] = {name: {} for name in cases}
        self.tokens: dict[str, dict[str, int]] = {name: {} for name in cases}
        self.agreement: dict[str, dict[str, dict[str, float]]] = {name: {} for name in cases}
        print(f"starting {SIDES['rankup']}", flush=True)
        worker = Worker(SIDES["rankup"], "train_sides:RankupSide", adapter_folder=self._adapter_folder)
        self.rankup = stack.enter_context(worker)
        self.about: dict[str, Any] = self.rankup.call("describe")
        for name in cases:
            self._measure_memory(name, "rankup", self.rankup)

    def compare_with_stock(self, repeats: int) -> None:
        """Memory, agreement, then times of rankup and the stock side."""
        with self._stock_side("stock", SIDES["stock"]) as stock:
            self._compare("stock", stock, repeats)

    def compare_with_variants(self, repeats: int) -> None:
        """The same for each variant of the stock side in turn."""
        for variant, (label, options) in VARIANTS.items():
            with self._stock_side(variant, label, **options) as worker:
                self._compare(variant, worker, repeats)

    def _stock_side(self, name: str, label: str, **options: bool) -> Worker:
        full = label if name == "stock" else f"{SIDES['stock']}, but: {label}"
        print(f"starting {full}", flush=True)
        return Worker(full, "train_sides:StockSide", adapter_folder=self._adapter_folder, **options)

    def _compare(self, name: str, stock: Worker, repeats: int) -> None:
        for case in self.cases:  # memory first: what a step needs is measured in a process that took none yet
            self._measure_memory(case, name, stock)
        for case in self.cases:
            self._check_agreement(case, name, stock)
            self._measure_times(case, name, stock, repeats)

    def _measure_memory(self, case: str, name: str, worker: Worker) -> None:
        worker.call("begin", self.cases[case])
        self.peak_bytes[case][name] = worker.call("peak_bytes")
        self.tokens[case][name] = worker.call("num_tokens")

    def _check_agreement(self, case: str, name: str, stock: Worker) -> None:
        """Compare loss, gradient and log-probabilities of both sides: exits if they do not train the same policy."""
        ours, theirs = (self._begun(worker, case).call("probe", self._folder) for worker in (self.rankup, stock))
        agreement = {
            "loss_difference": abs(ours["loss"] - theirs["loss"]),
            "grad_norm_ratio": ours["grad_norm"] / theirs["grad_norm"],
            "grad_cosine": theirs["grad_cosine"],
            "logprob_difference": _mean_difference(ours["logprobs"], theirs["logprobs"]),
            "adapter_effect": _mean_difference(ours["logprobs"], ours["base_logprobs"]),
        }
        if problems := disagreements(agreement):
            raise SystemExit(f"rankup and {name} do not compute the same step ({case}): {', '.join(problems)}; {agreement}")
        self.agreement[case][name] = agreement

    def _measure_times(self, case: str, name: str, stock: Worker, repeats: int) -> None:
        """Warm up, then `repeats` steps of each side, in turn first and second."""
        pair = {"rankup": self._begun(self.rankup, case), name: self._begun(stock, case)}
        for worker in pair.values():
            for _ in range(WARM_UPS):
                worker.call("seconds")
        times: dict[str, list[float]] = {side: [] for side in pair}
        for repeat in range(repeats):
            for side in list(pair) if repeat % 2 == 0 else reversed(list(pair)):
                sleepers = [worker for other, worker in pair.items() if other != side]
                times[side].append(self._seconds(pair[side], sleepers))
        self.speedups[case][name] = statistics.median(times[name]) / statistics.median(times["rankup"])
        self.seconds[case].setdefault("rankup", times["rankup"])  # beside a variant it is measured for the ratio only
        self.seconds[case][name] = times[name]
        latest = ", ".join(f"{side} {statistics.median(values):.2f} s" for side, values in times.items())
        print(f"{case}: {latest}", flush=True)

    def _begun(self, worker: Worker, case: str) -> Worker:
        worker.call("begin", self.cases[case])
        return worker

    def _seconds(self, worker: Worker, sleepers: Sequence[Worker]) -> float:
        """Seconds of one step, while the others must sleep."""
        before = sum(sleeper.cpu_seconds() for sleeper in sleepers)
        seconds: float = worker.call("seconds")
        taken = sum(sleeper.cpu_seconds() for sleeper in sleepers) - before
        self.idle_share = max(self.idle_share, taken / seconds)
        return seconds

    def result(self) -> dict[str, Any]:
        """The figures, machine and versions aside."""
        return {
            "cases": {name: self._case_result(name) for name in self.cases},
            "idle_sides_cpu_share": self.idle_share,
            "what": " ".join((__doc__ or "").split()),
            "sides": SIDES | {name: f"{SIDES['stock']}, but: {label}" for name, (label, _) in VARIANTS.items()},
            "settings": {key: value for key, value in self.about.items() if key != "model_path"},
        }

    def _case_result(self, name: str) -> dict[str, Any]:
        peak, speedups = self.peak_bytes[name], dict(self.speedups[name])
        return {
            "speedup": speedups.pop("stock"),
            "memory_ratio": peak["rankup"] / peak["stock"],
            **{f"speedup_over_{variant}": speedup for variant, speedup in speedups.items()},
            "seconds": {side: summarise(values) for side, values in self.seconds[name].items()},
            "peak_bytes": peak,
            "tokens": self.tokens[name],
            "agreement": self.agreement[name],
        }


def disagreements(agreement: dict[str, float]) -> list[str]:
    """Names of what is further apart than bf16 rounding explains."""
    holds = {
        "loss": agreement["loss_difference"] <= LOSS_AGREES,
        "gradient norm": abs(agreement["grad_norm_ratio"] - 1.0) <= GRAD_NORM_AGREES,
        "gradient": agreement["grad_cosine"] >= COSINE_AGREES,
        "log-probabilities": agreement["logprob_difference"] <= LOGPROBS_AGREE * agreement["adapter_effect"],
    }
    return [name for name, agrees in holds.items() if not agrees]


def _mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    cpu = result["machine"]
    console = Console(width=None if os.isatty(1) else 120)
    for name, case in result["cases"].items():
        table = Table(title=f"training phase of a step, {name}, {cpu['cores']} cores of {cpu['cpu']}")
        for column in ("", "seconds", "spread", "runs", "rankup is", "peak MiB", "tokens"):
            table.add_column(column, justify="left" if not column else "right")
        for side, seconds in case["seconds"].items():
            speedup = case["speedup"] if side == "stock" else case.get(f"speedup_over_{side}")
            table.add_row(
                result["sides"][side],
                f"{seconds['median']:.2f}",
                f"{seconds['min']:.2f} to {seconds['max']:.2f}",
                str(len(seconds["all"])),
                "" if speedup is None else f"{speedup:.2f} x",
                f"{case['peak_bytes'][side] / 2**20:.0f}",
                str(case["tokens"][side]),
            )
        console.print(table)
        console.print(f"{case['speedup']:.2f} times as fast, {case['memory_ratio']:.2f} of the memory\n", highlight=False)
    console.print(f"idle sides took at most {result['idle_sides_cpu_share']:.1%} of a core", highlight=False)


if __name__ == "__main__":
    use_environment()
    main()
