"""The results of an evaluation as a table in plain text.

    print(results_text("runs/quickstart/adapter", record))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...algorithm.estimates import Estimate
from ...display.view_text import decimal
from ...run.evaluation_files import EvaluationRecord, SetResult


def results_text(name: str, record: EvaluationRecord) -> str:
    """What was evaluated, and a row for each number: of all prompts, and of each set."""
    sampling = record.settings["sampling"]
    count, temperature, top_p = sampling["num_generations"], sampling["temperature"], sampling["top_p"]
    how = "greedy" if temperature == 0 else f"{count} completion{'s' if count > 1 else ''} each at temperature {temperature:g}"
    how += f", top_p {top_p:g}" if top_p < 1 else ""
    columns = record.sets if len(record.sets) == 1 else {"all": record.all, **record.sets}
    rows = [["", *columns]] if record.sets else []
    rows += [["prompts", *(str(one.prompts) for one in columns.values())]]
    names = list(dict.fromkeys(name for one in columns.values() for name in one.estimates))
    functions = list(dict.fromkeys(name for one in columns.values() for name in one.functions))
    rows += [[name, *(estimate_text(one.estimates.get(name)) for one in columns.values())] for name in names]
    if len(functions) > 1:
        rows += [[f"  {name}", *(_function_text(one, name) for one in columns.values())] for name in functions]
    prompts = f"{record.all.prompts} prompt{'s' if record.all.prompts != 1 else ''}"
    return "\n".join([f"{name}: {prompts}, {how}", *aligned(rows)])


def estimate_text(estimate: Estimate | None) -> str:
    """`0.412 [0.371, 0.455]`; a dash for what is not known, and nothing for what does not exist."""
    if estimate is None:
        return ""
    if math.isnan(estimate.mean):
        return "-"
    return f"{decimal(estimate.mean, 3)} [{decimal(estimate.low, 3)}, {decimal(estimate.high, 3)}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which the columns begin below each other."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _function_text(result: SetResult, name: str) -> str:
    return decimal(result.functions[name], 3) if name in result.functions else ""
