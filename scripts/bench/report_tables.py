"""A Markdown table for each benchmark's result, for the page (`report.py`) and the terminal. Plain Python.

    TABLES["train_step"](json.loads(text))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Figure = Mapping[str, Any]  # the result of a benchmark

PHASES = {"rollout": "rollout", "reward": "reward", "train": "training", "publish": "weights to vLLM", "other": "other"}
SIDES: dict[str, dict[str, str]] = {
    "train_step": {
        "rankup": "rankup",
        "stock": "PEFT, full logits",
        "stock_with_kept_memory": "with freed memory kept",
        "completion_logits": "with completion logits only",
        "autocast": "under bf16 autocast",
        "all_three": "with all three",
    },
    "vs_trl": {"rankup": "rankup", "trl": "TRL, its defaults", "trl_tuned": "TRL, tuned"},
    "rollout": {
        "rankup": "rankup, rank-64 adapter",
        "base": "vLLM, base model without LoRA",
        "stock": "stock vLLM, the same adapter",
    },
}


def train_step(figure: Figure) -> str:
    """A row per case and side: seconds, speed of rankup relative to it, memory, tokens."""
    rows = []
    for name, case in figure["cases"].items():
        for side, seconds in case["seconds"].items():
            speedup, peak = train_step_speedup(case, side), case["peak_bytes"]
            rows.append(
                [
                    name if side == "rankup" else "",
                    SIDES["train_step"].get(side, side),
                    seconds_with_spread(seconds),
                    "" if speedup is None else f"{speedup:.2f} ×",
                    f"{peak[side] / 2**20:,.0f}",
                    "" if side == "rankup" else f"{peak['rankup'] / peak[side]:.2f}",
                    f"{case['tokens'][side]:,}",
                ]
            )
    heads = ["prompt + completion", "side", "seconds", "rankup's speed", "peak MiB", "rankup's memory", "tokens"]
    return markdown(heads, rows, left=2)


def train_step_speedup(case: Figure, side: str) -> float | None:
    """The speed of rankup relative to a side of `train_step.py`; None for rankup itself."""
    return case["speedup"] if side == "stock" else case.get(f"speedup_over_{side}")


def rank(figure: Figure) -> str:
    """A row per rank: seconds and operations of each case, both also relative to rank 64."""
    cases: Figure = figure["cases"]
    heads, columns = ["rank"], [list(next(iter(cases.values()))["ranks"])]
    for name, case in cases.items():
        ranks, reference = case["ranks"].values(), case["ranks"].get("64")
        heads += [f"{name}: seconds", "operations"]
        columns.append([_relative(one, reference, ("seconds", "median"), "{:.3f}", 1.0) for one in ranks])
        columns.append([_relative(one, reference, ("operations", "total"), "{:.0f} G", 1e9) for one in ranks])
    growths = [case.get("64_to_128") for case in cases.values()]
    if all(growths):
        columns[0].append("64 to 128")
        for index, growth in enumerate(growths):
            columns[1 + 2 * index].append(f"**× {growth['time_ratio']:.2f}**")
            columns[2 + 2 * index].append(f"× {growth['operations_ratio']:.2f}")
    return markdown(heads, [list(row) for row in zip(*columns, strict=True)], left=0)


def _relative(one: Figure, reference: Figure | None, keys: tuple[str, str], form: str, unit: float) -> str:
    value = one[keys[0]][keys[1]]
    text = form.format(value / unit)
    return text if reference is None else f"{text} (× {value / reference[keys[0]][keys[1]]:.2f})"


def vs_trl(figure: Figure) -> str:
    """A row per side: seconds of a step, their spread, speed of rankup relative to it, and the phases if the result has any."""
    rows_of = trl_sides(figure)
    phases = {name: figure.get("phases", {}).get(name, {}) for name in rows_of}
    shown = [phase for phase in PHASES if any(phase in parts for parts in phases.values())]
    rows = []
    for name, (seconds, speedup) in rows_of.items():
        parts = [f"{phases[name][phase]['median']:.2f}" if phase in phases[name] else "" for phase in shown]
        row = [SIDES["vs_trl"].get(name, name), seconds_with_spread(seconds)]
        rows.append([*row, "" if speedup is None else f"{speedup:.2f} ×", *parts])
    return markdown(["side", "seconds a step", "rankup's speed", *(PHASES[phase] for phase in shown)], rows, left=1)


def trl_sides(figure: Figure) -> dict[str, tuple[Figure, float | None]]:
    """Seconds of a step and speed of rankup relative to it for each side, the tuned one included if it was measured."""
    sides: dict[str, tuple[Figure, float | None]] = {
        name: (seconds, figure["speedup"] if name == "trl" else None) for name, seconds in figure["step_seconds"].items()
    }
    if tuned := figure.get("trl_tuned"):
        sides["trl_tuned"] = (tuned["step_seconds"], tuned["speedup"])
    return sides


def rollout(figure: Figure) -> str:
    """A row per engine: tokens per second of full rollouts and of decoding alone, and speed of rankup relative to it."""
    rates, decoding = figure["tokens_per_second"], figure["decoding"]
    rows = []
    for name, label in SIDES["rollout"].items():
        ratios = ["" if name == "rankup" else f"{times[f'ratio_to_{name}']:.2f} ×" for times in (figure, decoding)]
        full, alone = (rate_text(rate[name]["median"]) for rate in (rates, decoding))
        rows.append([label, full, ratios[0], alone, ratios[1]])
    return markdown(["", "rollouts, tokens/s", "rankup's speed", "decoding alone", "rankup's speed"], rows, left=1)


def profile(figure: Figure) -> str:
    """A row per bucket: seconds and share of the step in each case; the step; the floor of its products."""
    cases: Figure = figure["cases"]
    steps = [case["step_seconds"]["median"] for case in cases.values()]
    rows = []
    for name in next(iter(cases.values()))["seconds"]:
        parts = [case["seconds"][name] for case in cases.values()]
        rows.append([name, *(_with_share(part, step) for part, step in zip(parts, steps, strict=True))])
    rows.append(["**the step**", *(f"**{step:.3f}**" for step in steps)])
    floors = [case["floor_seconds"] for case in cases.values()]
    pairs = zip(floors, steps, strict=True)
    rows.append(["floor: its products at the rate of a bare one", *(_with_share(floor, step) for floor, step in pairs)])
    return markdown(["seconds", *cases], rows, left=1)


def _with_share(part: float, total: float) -> str:
    return f"{part:.3f} ({part / total:.0%})"


TABLES: dict[str, Callable[[Figure], str]] = {
    "train_step": train_step,
    "rank": rank,
    "vs_trl": vs_trl,
    "rollout": rollout,
    "profile": profile,
}


def seconds_with_spread(summary: Figure) -> str:
    """`**0.82** (0.81 to 0.85)`: median, minimum and maximum."""
    return f"**{summary['median']:.2f}** ({summary['min']:.2f} to {summary['max']:.2f})"


def rate_text(rate: float) -> str:
    """Three digits, or all before the decimal point: 795, 55.8."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    assert all(len(row) == len(heads) for row in rows)
    rule = ["---" if index < left else "---:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))
