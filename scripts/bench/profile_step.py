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
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cases import add_case_argument, cases_of
from common import Result, command_line, run, summarise, use_environment
from operations import ModelShape, num_tokens, step_operations
from report_tables import profile
from workers import Worker

EXAMPLE = """examples:
  scripts/bench/profile_step.py --json profile.json              about two minutes on two idle cores
  scripts/bench/profile_step.py --case 512+128 --repeats 2
"""
CASES = ("64+64", "256+64")
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, EXAMPLE, repeats=5, what="steps of each kind")
    add_case_argument(parser, CASES)
    run(parser.parse_args(arguments), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Profile the step of each case."""
    cases = {}
    with Worker("rankup", "profile_sides:ProfiledSide") as worker:
        settings = worker.call("describe")
        model = ModelShape.read(Path(settings.pop("model_path")))
        for name, case in cases_of(options).items():
            worker.call("begin", case)
            print(f"{name}: {options.repeats} plain steps, {options.repeats} with every operation timed", flush=True)
            measured = worker.call("measure", options.repeats)
            operations = step_operations(model, case.shapes(), rank=settings["lora"]["rank"])
            check_operations(operations, measured["operations"])
            cases[name] = case_result(measured["plain"], measured["profiled"], operations, measured["rates"])
            cases[name]["tokens"], cases[name]["targets"] = num_tokens(case.shapes())
    return {"cases": cases, "bare_product_shape": BARE_PRODUCT, "settings": settings}


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


def report(result: Result) -> str:
    """The table, and the rate of a bare product in each case."""
    lines = [profile(result), ""]
    for name, case in result["cases"].items():
        rate = {key: value / 1e9 for key, value in case["bare_product_operations_per_second"].items() if key != "all"}
        spread = f"{rate['min']:.0f} to {rate['max']:.0f}"
        lines.append(f"- {name}: a bare bf16 product ran at {rate['median']:.0f} GFLOP/s ({spread})")
    return "\n".join(lines)


if __name__ == "__main__":
    use_environment()
    main()
