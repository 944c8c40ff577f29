#!/usr/bin/env python3
"""Where the time of a training step goes, and the least that its matrix products could take on this machine.

The step is the one of `train_step.py` (`Learner.update`, rank 64 on all seven projections, SmolLM2-135M-Instruct in bf16).
Undisturbed steps take turns with steps in which every operation of torch is timed by itself; each operation counts for one of
the buckets:

    base products       products with a frozen weight of an adapted layer, forward and backward
    adapter products    products of activations, gradients and the adapter
    head products       logits, and their gradient's product with the head
    attention           everything within attention but the projections
    head elementwise    everything else within the log-probabilities and the loss
    other elementwise   norms, rotary embedding, activations, casts, gathers, accumulation of gradients
    optimizer           clipping and AdamW
    python              the undisturbed step minus all of these: Python, autograd, launching operations

`floor_seconds` are the multiply-adds of all products (`operations.py`), 2 operations each, at the rate that one large bf16
product reaches on this machine, measured between the steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cases import Case, add_case_argument
from common import Worker, command_line, machine, summarise, use_environment, versions, write_json
from operations import ModelShape, num_tokens, step_operations

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
        files: paths of the Python frames that led to it, innermost first.
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
    """What a Python file computes, as far as it decides the bucket."""
    name = file.rsplit("/", 1)[-1]
    if "/torch/optim/" in file or name == "clip_grad.py":
        return "optimizer"
    if "attention" in name:
        return "attention"
    return "head" if name == "logprob.py" else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the JSON file."""
    options = _parse(arguments)
    before = machine()
    if before["load_average"] > 0.5:
        print(f"warning: the machine is not idle (load average {before['load_average']:.1f}): steps will take longer")
    print("starting rankup", flush=True)
    with Worker("rankup", "profile_sides:ProfiledSide") as worker:
        about = worker.call("describe")
        model = ModelShape.read(Path(about.pop("model_path")))
        cases = {}
        for name in options.case:
            case = Case.parse(name)
            worker.call("begin", case)
            print(f"{name}: {options.repeats} steps undisturbed, {options.repeats} with every operation timed", flush=True)
            measured = worker.call("measure", options.repeats)
            operations = step_operations(model, case.shapes(), rank=about["rank"])
            check_operations(operations, measured["operations"])
            cases[name] = case_result(measured["undisturbed"], measured["profiled"], operations, measured["rates"])
            cases[name]["tokens"], cases[name]["targets"] = num_tokens(case.shapes())
    result = {
        "cases": cases,
        "bare_product_shape": BARE_PRODUCT,
        "what": " ".join((__doc__ or "").split()),
        "settings": about,
        "machine": before,
        "versions": versions(),
    }
    _show(result)
    if options.json is not None:
        write_json(options.json, result)
        print(f"written to {options.json}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, EXAMPLE, repeats=5, what="steps of each kind")
    add_case_argument(parser, CASES)
    options = parser.parse_args(arguments)
    options.case = options.case or list(CASES)
    return options


def check_operations(expected: dict[str, int], counted: dict[str, int]) -> None:
    """Compare the multiply-adds that were met in a step with what the shapes say: exits where they are not the same.

    It finds products in the wrong bucket, and a count that the kernels have outgrown. Attention is left out: how much padding
    and how many future tokens are computed is its kernel's own affair.
    """
    for kind in ("base", "adapter", "head"):
        met = counted.get(f"{kind} products", 0)
        if met != expected[kind]:
            raise SystemExit(f"{kind} products: {met} multiply-adds in a step, but its shapes say {expected[kind]}")


def case_result(
    undisturbed: Sequence[float],
    profiled: Sequence[dict[str, float]],
    operations: dict[str, int],
    rates: Sequence[float],
) -> dict[str, Any]:
    """The figures of a case.

    Args:
        undisturbed: seconds of steps.
        profiled: of each profiled step, seconds in each bucket.
        operations: multiply-adds of the products by kind.
        rates: operations a second of a large product, two for each multiply-add.
    """
    seconds = {name: statistics.median(step.get(name, 0.0) for step in profiled) for name in MEASURED}
    whole = statistics.median(undisturbed)
    floor = {kind: 2 * count / statistics.median(rates) for kind, count in operations.items()}
    return {
        "step_seconds": summarise(undisturbed),
        # Below 0 would say that timing slowed the operations themselves down; then there is no telling how much Python took.
        "seconds": seconds | {"python": max(0.0, whole - sum(seconds.values()))},
        "operations": operations,
        "bare_product_operations_per_second": summarise(rates),
        "floor_seconds": sum(floor.values()),
        "floor_seconds_by_kind": floor,
        "floor_share": sum(floor.values()) / whole,
    }


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    cpu, cases = result["machine"], result["cases"]
    table = Table(title=f"seconds of a training step, {cpu['cores']} cores of {cpu['cpu']}")
    table.add_column("")
    for name in cases:
        table.add_column(name, justify="right")
        table.add_column("share", justify="right")
    for name in (*MEASURED, "python"):
        cells = [(case["seconds"][name], case["step_seconds"]["median"]) for case in cases.values()]
        table.add_row(name, *(text for part, whole in cells for text in (f"{part:.3f}", f"{part / whole:.0%}")))
    steps = [case["step_seconds"]["median"] for case in cases.values()]
    table.add_row("step", *(text for whole in steps for text in (f"{whole:.3f}", "")), style="bold")
    floors = [(case["floor_seconds"], case["floor_share"]) for case in cases.values()]
    table.add_row("floor of the products", *(text for part, share in floors for text in (f"{part:.3f}", f"{share:.0%}")))
    console = Console(width=None if os.isatty(1) else 110)
    console.print(table)
    for name, case in cases.items():
        rate = case["bare_product_operations_per_second"]
        spread = f"{rate['min'] / 1e9:.0f} to {rate['max'] / 1e9:.0f}"
        text = f"{name}: a bare bf16 product beside it ran at {rate['median'] / 1e9:.0f} GFLOP/s ({spread})"
        console.print(text, highlight=False)


if __name__ == "__main__":
    use_environment()
    main()
