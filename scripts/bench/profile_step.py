#!/usr/bin/env python3
"""Where the time of a training step goes, and the minimum that its matrix products could take on this machine.

The step is the one of `train_step.py` (`Learner.update`, rank 64 on all seven projections, SmolLM2-135M-Instruct in bf16).
Plain steps alternate with steps in which every torch operation is timed separately. Each operation belongs to a bucket:

    base products       products with a frozen weight of an adapted layer, forward and backward
    adapter products    products of activations, gradients and the adapter
    head products       logits, and the product of their gradient with the head
    attention           everything in attention except the projections
    head elementwise    everything else in the log-probabilities and the loss
    other elementwise   norms, rotary embedding, activations, casts, gathers, accumulation of gradients
    optimizer           clipping and AdamW
    python              the plain step minus all of the above: Python, autograd, launching operations

`floor_seconds` is the time of all products (multiply-adds of `operations.py`, 2 operations each) at the rate of one large bf16
product on this machine, measured between the steps.

examples:
  scripts/bench/profile_step.py --json profile.json              about two minutes on two idle cores
  scripts/bench/profile_step.py --case 512+128 --repeats 2
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cases import add_case_argument, cases_of
from common import Result, command_line, markdown, run, summarise
from operations import step_operations

BATCHED = {"bmm", "baddbmm"}
PRODUCTS = {"mm", "addmm", *BATCHED}
MEASURED = (
    "base products",
    "adapter products",
    "head products",
    "attention",
    "head elementwise",
    "other elementwise",
    "optimizer",
)
BARE_PRODUCT = (2048, 2048, 2048)  # rows, columns, inner


def bucket(operation: str, files: Sequence[str], weights: Collection[str]) -> str:
    """The bucket of an operation.

    Args:
        operation: its name, such as `addmm_`.
        files: paths of the calling Python frames, innermost first.
        weights: which frozen weights are among its operands: "base", "head".
    """
    place = next((found for found in map(_place, files) if found is not None), None)
    if place == "optimizer":
        return "optimizer"
    if place == "attention" or "attention" in operation:
        return "attention"
    if not is_product(operation):
        return "head elementwise" if place == "head" else "other elementwise"
    if place == "head" or "head" in weights:
        return "head products"
    if "base" in weights:
        return "base products"
    return "attention" if operation.removesuffix("_") in BATCHED else "adapter products"


def is_product(operation: str) -> bool:
    """Whether an operation is a matrix product, in place or not."""
    return operation.removesuffix("_") in PRODUCTS


def _place(file: str) -> str | None:
    """The part of a step that a Python file computes, if it decides the bucket."""
    name = file.rsplit("/", 1)[-1]
    if "/torch/optim/" in file or name == "clip_grad.py":
        return "optimizer"
    if "attention" in name:
        return "attention"
    return "head" if name == "logprob.py" else None


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=5, what="steps of each kind")
    add_case_argument(parser)
    run(parser.parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Profile the step of each case."""
    from profile_sides import ProfiledSide
    from train_sides import MODEL, RANK

    from rankup.grpo.memory.shapes import read_shape

    model, side = read_shape(MODEL), ProfiledSide(rank=RANK)
    cases = {}
    for name, case in cases_of(options).items():
        side.begin(case)
        print(f"{name}: {options.repeats} plain steps, {options.repeats} with every operation timed", flush=True)
        plain, timers, rates = side.measure(options.repeats)
        operations = step_operations(model, case, rank=RANK)
        check_operations(operations, timers[0].operations)
        cases[name] = case_result(plain, [timer.seconds for timer in timers], operations, rates)
        cases[name] |= {"tokens": case.tokens, "targets": case.targets}
    return {"cases": cases, "bare_product_shape": BARE_PRODUCT, "settings": side.describe()}


def check_operations(expected: Mapping[str, int], counted: Mapping[str, int]) -> None:
    """Compare the multiply-adds counted in a step with those computed from the shapes. Exits if they differ.

    This finds products in the wrong bucket, and formulas that no longer match the kernels. Attention is not compared: how much
    padding and how many future tokens are computed depends on its kernel.
    """
    for kind in ("base", "adapter", "head"):
        count = counted.get(f"{kind} products", 0)
        if count != expected[kind]:
            raise SystemExit(f"{kind} products: {count} multiply-adds in a step, but {expected[kind]} from the shapes")


def case_result(
    plain: Sequence[float],
    profiled: Sequence[Mapping[str, float]],
    operations: Mapping[str, int],
    rates: Sequence[float],
) -> Result:
    """The figures of a case.

    Args:
        plain: seconds of plain steps.
        profiled: for each profiled step, seconds in each bucket.
        operations: multiply-adds of the products by kind.
        rates: operations per second of a large product, two for each multiply-add.
    """
    seconds = {name: statistics.median(step.get(name, 0.0) for step in profiled) for name in MEASURED}
    total = statistics.median(plain)
    floor = {kind: 2 * count / statistics.median(rates) for kind, count in operations.items()}
    return {
        "step_seconds": summarise(plain),
        # Below 0 timing has slowed down the operations themselves, and the time of Python is unknown.
        "seconds": seconds | {"python": max(0.0, total - sum(seconds.values()))},
        "operations": operations,
        "bare_product_operations_per_second": summarise(rates),
        "floor_seconds": sum(floor.values()),
        "floor_seconds_by_kind": floor,
        "floor_share": sum(floor.values()) / total,
    }


# -------------------------------------------------------------------------------------------------------------- report


def report(result: Result) -> str:
    """The table, and the rate of a bare product in each case."""
    lines = [table(result), ""]
    for name, case in result["cases"].items():
        low, median, high = (case["bare_product_operations_per_second"][key] / 1e9 for key in ("min", "median", "max"))
        lines.append(f"- {name}: a bare bf16 product ran at {median:.0f} GFLOP/s ({low:.0f} to {high:.0f})")
    return "\n".join(lines)


def table(result: Result) -> str:
    """A row per bucket: seconds and share of the step in each case; the step; the floor of its products."""
    cases = result["cases"].values()
    steps = [case["step_seconds"]["median"] for case in cases]

    def row(name: str, parts: Sequence[float]) -> list[str]:
        return [name, *(f"{part:.3f} ({part / step:.0%})" for part, step in zip(parts, steps, strict=True))]

    rows = [row(name, [case["seconds"][name] for case in cases]) for name in (*MEASURED, "python")]
    rows.append(["**the step**", *(f"**{step:.3f}**" for step in steps)])
    rows.append(row("floor: its products at the rate of a bare one", [case["floor_seconds"] for case in cases]))
    return markdown(["seconds", *result["cases"]], rows, left=1)


def draw(result: Result, out: Path) -> None:
    """Where the time of a step goes, a bar per case, and the floor of its products as a line across it."""
    from plots import BAR_HEIGHT, bars, legend_below, measured, stack

    cases = result["cases"].values()
    steps = [case["step_seconds"] for case in cases]
    with measured(out, "Where the time of a training step goes", result) as (axes,):
        bars(axes, list(result["cases"]), steps, [f"{step['median']:.2f} s" for step in steps], color="none")
        for row, case in enumerate(cases):
            label = "floor: products at a bare one's rate" if row == 0 else None
            ends = [row - BAR_HEIGHT * 0.62, row + BAR_HEIGHT * 0.62]
            axes.plot([case["floor_seconds"]] * 2, ends, color="black", linestyle=(0, (4, 2)), linewidth=1.6, label=label)
        stack(axes, {name: [case["seconds"][name] for case in cases] for name in (*MEASURED, "python")})
        legend_below(axes)
        axes.set_xlim(0, max(step["max"] for step in steps) * 1.1)
        axes.set_xlabel("seconds")


if __name__ == "__main__":
    main()
