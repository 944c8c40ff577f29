#!/usr/bin/env python3
"""The self-test of the kernels on torch's device, in bf16, fp16 and fp32: errors against fp64, beside those of plain torch.

Needs torch, and Triton on CUDA; NF4 needs bitsandbytes. Exit status 1 if a kernel is wrong or fails.

examples:
  scripts/bench/self_test.py --json self_test.json
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback

from common import Result, command_line, markdown, run

DTYPES = ("bfloat16", "float16", "float32")


def main() -> None:
    """Run the tests, print the table and write the JSON file."""
    result = run(command_line(__doc__).parse_args(), measure, report)
    sys.exit(1 if failures(result) else 0)


def measure(options: argparse.Namespace) -> Result:
    """Error and bound of each kernel in each dtype; the error message of one that fails."""
    import torch

    from rankup.kernels.self_test import CASES, self_test

    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_nf4 = importlib.util.find_spec("bitsandbytes") is not None
    tested: Result = {}
    for kernel in CASES:
        for dtype in DTYPES if kernel != "NF4" or has_nf4 else ():
            name = f"{kernel}, {dtype}"
            try:
                one = self_test(kernel, getattr(torch, dtype), device)
                tested[name] = {"error": one.error, "bound": one.bound, "seconds": one.seconds, "passed": one.passed}
            except Exception as error:  # a kernel that does not compile is a result too
                traceback.print_exc()
                tested[name] = {"passed": False, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"tested": tested, "device": device, "left_out": [] if has_nf4 else ["NF4: bitsandbytes is not installed"]}


def failures(result: Result) -> list[str]:
    """Names of the tests that failed."""
    return [name for name, one in result["tested"].items() if not one["passed"]]


def report(result: Result) -> str:
    """A row per kernel, a column per dtype: the error, and the bound that it must not exceed."""
    kernels = list(dict.fromkeys(name.rpartition(", ")[0] for name in result["tested"]))
    rows = [[kernel, *(_cell(result["tested"][f"{kernel}, {dtype}"]) for dtype in DTYPES)] for kernel in kernels]
    failed = failures(result)
    passed = len(result["tested"]) - len(failed)
    lines = [
        markdown(["kernel", *DTYPES], rows, left=1),
        "",
        f"- on {result['device']}: {passed} of {len(result['tested'])} pass; relative error against fp64, and its bound",
        *(f"- **wrong or failed**: {name}" for name in failed),
        *(f"- not tested: {one}" for one in result["left_out"]),
    ]
    return "\n".join(lines)


def _cell(one: Result) -> str:
    if "failed" in one:
        return f"**failed**: {one['failed']}"
    numbers = f"{one['error']:.1e} ({one['bound']:.1e})"
    return numbers if one["passed"] else f"**{numbers}**"


if __name__ == "__main__":
    main()
