#!/usr/bin/env python3
"""Time and memory of the training phase of a step, against PEFT with full logits.

The phase leads from scored groups to updated fp32 master weights: forward, backward, clipping, AdamW. SmolLM2-135M-Instruct in
bf16 (in fp32 on a CPU that would emulate bf16), LoRA of rank 64 on all seven projections, DAPO without KL penalty, one update
per batch. The case 256+64 is 2 prompts of 256 random tokens with 8 completions of 64 tokens each.

rankup is `Learner.update`. The other side is stock transformers with stock PEFT: one row per completion including its prompt,
fp32 logits of all positions, torch's log-softmax and attention, the adapter in fp32 (PEFT's default). Before anything is timed,
both must agree on the loss, on the norm and direction of the gradient, and on the log-probability of every completion token.

`speedup` is the ratio of the medians of interleaved repeats. `memory_ratio` compares `peak_bytes`: the peak resident memory of
a process in its first two steps (optimizer state, gradients, activations, and what libraries allocate) minus its resident
memory after model and adapter were loaded, all weights read, and freed memory returned to the kernel. Below 1 rankup needs
less.

To see where the gain comes from, variants of the stock side run with fewer repeats, each against rankup: freed memory retained
(`kernels/cpu_memory.py`), logits of completions only (`logits_to_keep`), bf16 autocast (as in transformers' Trainer with
bf16=True), and all three.

examples:
  scripts/bench/train_step.py --json train_step.json                 both cases, about a quarter of an hour on two idle cores
  scripts/bench/train_step.py --case 128+32 --repeats 2 --main-only  a quick look at another shape
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cases import Case, add_case_argument, cases_of
from common import Result, command_line, markdown, run, seconds_with_spread, summarise
from workers import Turns, Worker

WARM_UPS = 5  # steps before measuring, until a process has allocated its working memory
STOCK_SIDES: dict[str, tuple[str, dict[str, bool]]] = {
    "stock": ("PEFT, full logits", {}),
    "stock_with_kept_memory": ("with freed memory kept", {"keep_memory": True}),
    "completion_logits": ("with completion logits only", {"completion_logits": True}),
    "autocast": ("under bf16 autocast", {"autocast": True}),
    "all_three": ("with all three", {"keep_memory": True, "completion_logits": True, "autocast": True}),
}
LABELS = {"rankup": "rankup"} | {name: label for name, (label, _) in STOCK_SIDES.items()}
MAX_LOSS_DIFFERENCE = 1e-3  # absolute; the loss is a mean of advantages of order 1
MAX_GRAD_NORM_DIFFERENCE = 0.05  # relative
MIN_COSINE = 0.98
MAX_LOGPROB_DIFFERENCE = 0.35  # mean difference that rounding explains, as a share of the adapter's effect


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=5, what="measured steps of each side")
    add_case_argument(parser)
    parser.add_argument("--main-only", action="store_true", help="leave out the variants of the stock side")
    run(parser.parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Compare rankup with the stock side, then with its variants."""
    cases, turns = cases_of(options), Turns()
    results: dict[str, Result] = {name: {"seconds": {}, "peak_bytes": {}, "tokens": {}, "agreement": {}} for name in cases}
    sides = {"stock": STOCK_SIDES["stock"]} if options.main_only else STOCK_SIDES
    with (
        tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder,
        Worker("rankup", "train_sides:RankupSide", adapter_folder=Path(folder, "adapter")) as rankup,
    ):
        _measure_memory(results, cases, "rankup", rankup)
        for name, (label, changes) in sides.items():
            with Worker(label, "train_sides:StockSide", adapter_folder=Path(folder, "adapter"), **changes) as stock:
                _measure_memory(results, cases, name, stock)
                repeats = options.repeats if name == "stock" else max(1, options.repeats // 2)
                _compare(results, cases, {"rankup": rankup, name: stock}, turns, repeats)
        settings = rankup.call("describe")
    for result in results.values():
        result["memory_ratio"] = result["peak_bytes"]["rankup"] / result["peak_bytes"]["stock"]
    return {"cases": results, "idle_sides_cpu_share": turns.idle_share, "settings": settings}


def _measure_memory(results: dict[str, Result], cases: Mapping[str, Case], name: str, worker: Worker) -> None:
    """Comes first: the peak is that of a process that has allocated nothing yet."""
    for case_name, case in cases.items():
        worker.call("begin", case)
        results[case_name]["peak_bytes"][name] = worker.call("peak_bytes")
        results[case_name]["tokens"][name] = worker.call("num_tokens")


def _compare(
    results: dict[str, Result], cases: Mapping[str, Case], pair: Mapping[str, Worker], turns: Turns, repeats: int
) -> None:
    """Agreement and times of rankup and a stock side in every case."""
    _, name = pair
    for case_name, case in cases.items():
        result = results[case_name]
        result["agreement"][name] = _check_agreement(case, pair)
        times = _measure_times(case, pair, turns, repeats)
        ours, theirs = (statistics.median(values) for values in times.values())
        result["speedup" if name == "stock" else f"speedup_over_{name}"] = theirs / ours
        result["seconds"].setdefault("rankup", summarise(times["rankup"]))  # with a variant only for the ratio
        result["seconds"][name] = summarise(times[name])
        print(f"{case_name}: rankup {ours:.2f} s, {name} {theirs:.2f} s", flush=True)


def _check_agreement(case: Case, pair: Mapping[str, Worker]) -> dict[str, float]:
    """Compare loss, gradient and log-probabilities. Exits if the sides do not compute the same step."""
    for worker in pair.values():
        worker.call("begin", case)
    with tempfile.TemporaryDirectory(prefix="rankup-bench-") as folder:  # for the gradients
        ours, theirs = (worker.call("probe", Path(folder)) for worker in pair.values())
    agreement = {
        "loss_difference": abs(ours["loss"] - theirs["loss"]),
        "grad_norm_ratio": ours["grad_norm"] / theirs["grad_norm"],
        "grad_cosine": theirs["grad_cosine"],
        "logprob_difference": _mean_difference(ours["logprobs"], theirs["logprobs"]),
        "adapter_effect": _mean_difference(ours["logprobs"], ours["base_logprobs"]),
    }
    if problems := disagreements(agreement):
        raise SystemExit(f"{' and '.join(pair)} do not compute the same step: {', '.join(problems)}; {case}, {agreement}")
    return agreement


def _measure_times(case: Case, pair: Mapping[str, Worker], turns: Turns, repeats: int) -> dict[str, list[float]]:
    """Seconds of steps of both sides, after the warm-up."""
    for worker in pair.values():
        worker.call("begin", case)
        for _ in range(WARM_UPS):
            worker.call("seconds")
    return turns.interleave(pair, repeats, lambda side: pair[side].call("seconds"))


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


# -------------------------------------------------------------------------------------------------------------- report


def report(result: Result) -> str:
    """The table, the main ratios, and how quiet the idle sides were."""
    ratios = [f"- {n}: {c['speedup']:.2f} x as fast, {c['memory_ratio']:.2f} x the memory" for n, c in result["cases"].items()]
    idle = f"- idle sides used at most {result['idle_sides_cpu_share']:.1%} of a core"
    return "\n".join([table(result), "", *ratios, idle])


def table(result: Result) -> str:
    """A row per case and side: seconds, speed of rankup relative to it, memory, tokens."""
    rows = []
    for name, case in result["cases"].items():
        peak = case["peak_bytes"]
        for side, seconds in case["seconds"].items():
            is_ours = side == "rankup"
            rows.append(
                [
                    name if is_ours else "",
                    LABELS[side],
                    seconds_with_spread(seconds),
                    "" if is_ours else f"{_speedup(case, side):.2f} ×",
                    f"{peak[side] / 2**20:,.0f}",
                    "" if is_ours else f"{peak['rankup'] / peak[side]:.2f}",
                    f"{case['tokens'][side]:,}",
                ]
            )
    heads = ["prompt + completion", "side", "seconds", "rankup's speed", "peak MiB", "rankup's memory", "tokens"]
    return markdown(heads, rows, left=2)


def _speedup(case: Result, side: str) -> float:
    return case["speedup" if side == "stock" else f"speedup_over_{side}"]


def draw(result: Result, out: Path) -> None:
    """Seconds of the training phase by side, a panel per case; memory in the texts."""
    from plots import OURS, SUBTITLE, THEIRS, bars, measured

    title, cases = "Training phase of a step: time, and memory above the loaded model", result["cases"]
    with measured(out, title, result, panels=len(cases)) as panels:
        for panel, (name, case) in zip(panels, cases.items(), strict=True):
            texts = [f"{one['median']:.2f} s" for one in case["seconds"].values()]
            for index, side in enumerate(case["seconds"]):
                texts[index] += "" if side == "rankup" else f", {_speedup(case, side):.1f} × rankup's"
                texts[index] += f"\n{case['peak_bytes'][side] / 2**30:.1f} GiB"
            labels = [LABELS[side] if panel is panels[0] else "" for side in case["seconds"]]
            colours = [OURS if side == "rankup" else THEIRS for side in case["seconds"]]
            bars(panel, labels, list(case["seconds"].values()), texts, color=colours)
            prompt, completion = name.split("+")
            panel.set_title(f"prompts of {prompt}, completions of {completion}", **SUBTITLE)
            panel.set_xlabel("seconds")


if __name__ == "__main__":
    main()
