"""A run as HTML, for notebooks: progress, the last metrics, curves, evaluations, completions, notes.

    run_html(RunPicture(run_name="sums", status="training", steps_done=12, max_steps=80, rows=trainer.state.log_history))

Pure functions of what is known. The HTML has no script, no style sheet and no address. Texts of models, data and users stay
text, dollars too: notebooks typeset mathematics, except in the classes named below. Colours are those of the page and mid
tones, so it reads on light and on dark pages.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chart_html import COLOURS, FAINT, Line, chart_html
from .view import SampleRow
from .view_text import (
    Prompt,
    as_number,
    decimal,
    dialogue,
    escaped,
    guards_text,
    last_message,
    no_update_text,
    seconds_text,
    significant,
    whole,
    workers_text,
)

MOST_EVALUATIONS = 6
MOST_EVALUATION_METRICS = 20
MOST_SAMPLES = 6
MOST_NOTES = 20
MOST_OF_A_PROMPT, MOST_OF_A_COMPLETION, MOST_OF_A_NOTE = 300, 600, 250
"""Characters."""
MOST_LINES = 10
"""Of a prompt or a completion."""

TIMES = re.compile(r"(runtime|per_second|seconds)$")
"""Metrics of evaluations that say nothing about the policy."""

NOT_DRAWN = re.compile(r"/|_std$|_low$|_high$|^reward$|runtime|per_second")
"""Metrics of evaluations, without `eval_`, that the chart of evaluations leaves out."""

RULE = "rgba(128,128,128,0.3)"
GOOD, BAD = COLOURS[2], COLOURS[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPicture:
    """What is known of a run.

    Attributes:
        status: what it does, or how it ended: "training", "done".
        rows: steps and evaluations, as in `metrics.jsonl` and `state.log_history`; others are left out.
        times: elapsed and remaining time, or another remark beside the status.
        samples_step: the step that `samples` are of.
        lines: at the end: the summary, the output folder.
    """

    run_name: str
    status: str
    steps_done: int
    max_steps: int
    rows: Sequence[Mapping[str, Any]] = ()
    times: str = ""
    samples_step: int = 0
    samples: Sequence[SampleRow] = ()
    notes: Sequence[str] = ()
    lines: Sequence[str] = ()

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The rows of steps."""
        return [row for row in self.rows if "reward" in row]

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """The rows of evaluations."""
        return [row for row in self.rows if "eval_reward" in row]


def run_html(picture: RunPicture) -> str:
    """A `div` with everything that is known."""
    parts = [
        _head(picture),
        _figures(picture),
        "".join(_charts(picture)),
        _evaluation_table(picture.evaluations),
        _samples_table(picture),
        _notes(picture.notes),
        *(f'<div style="overflow-wrap:anywhere">{escaped(line, 300)}</div>' for line in picture.lines),
    ]
    # The classes that MathJax of all versions leaves alone.
    style = "max-width:1000px;font-size:13px;line-height:1.45"
    return f'<div class="rankup tex2jax_ignore mathjax_ignore" style="{style}">{"".join(parts)}</div>'


def run_text(picture: RunPicture) -> str:
    """The same in a line or more of plain text, for what shows no HTML."""
    rewards = [as_number(row["reward"]) for row in picture.steps[-1:]]
    parts = [f"{picture.run_name}: {picture.status}", f"step {picture.steps_done}/{picture.max_steps}"]
    return "\n".join([", ".join([*parts, *(f"reward {decimal(reward)}" for reward in rewards)]), *picture.lines])


def _head(picture: RunPicture) -> str:
    """Name, status and progress."""
    share = min(1.0, picture.steps_done / picture.max_steps) if picture.max_steps > 0 else 0.0
    texts = [picture.status, f"step {picture.steps_done} of {picture.max_steps}", picture.times]
    return (
        f'<div><b style="font-size:14px;margin-right:10px">{escaped(picture.run_name, 80)}</b> '
        f"{' · '.join(escaped(text, 200) for text in texts if text)}</div>"
        '<div style="height:5px;margin:5px 0 12px;border-radius:3px;background:rgba(128,128,128,0.25)">'
        f'<div style="height:5px;border-radius:3px;width:{share:.1%};background:{COLOURS[0]}"></div></div>'
    )


# ------------------------------------------------------------------------------------------------------ the last step


def _figures(picture: RunPicture) -> str:
    """The numbers of the last step, and the course of the evaluation."""
    figures: list[tuple[str, str]] = []
    evaluations = [as_number(row["eval_reward"]) for row in picture.evaluations]
    if evaluations:
        first_and_last = evaluations[:1] + evaluations[1:][-1:]
        figures.append(("evaluation", " → ".join(decimal(reward, 3) for reward in first_and_last)))
    if picture.steps:
        figures += _step_figures(picture.steps[-1])
    cells = [
        f'<div style="display:inline-block;vertical-align:top;margin:0 26px 10px 0"><div style="font-size:11px;{FAINT}">'
        f'{escaped(label, 40)} </div><div style="font-size:15px">{escaped(value, 160)} </div></div>'
        for label, value in figures
    ]
    return f"<div>{''.join(cells)}</div>" if cells else ""


def _step_figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    step = f"reward of step {row['step']} {no_update_text(row)}" if "step" in row else "reward"
    figures = [(step.strip(), decimal(row["reward"], 3))]
    length, clipped = row.get("completions/mean_length"), as_number(row.get("completions/clipped_ratio"))
    if length is not None:
        figures.append(("tokens", decimal(length, 1) + (f", {clipped:.0%} cut off" if 0 < clipped <= 1 else "")))
    labels = (("entropy", "entropy"), ("gradient norm", "grad_norm"), ("learning rate", "learning_rate"))
    figures += [(label, significant(row[name])) for label, name in labels if name in row]
    phases = {name.removeprefix("time/"): as_number(value) for name, value in row.items() if name.startswith("time/")}
    phases = {name: value for name, value in phases.items() if math.isfinite(value)}
    if phases:
        total = phases.pop("total", sum(phases.values()))
        longest = ", ".join(f"{name} {seconds_text(value)}" for name, value in phases.items() if value >= 0.05 * total)
        figures.append(("seconds", f"{seconds_text(total)} ({longest})" if longest else seconds_text(total)))
    if (rate := row.get("tokens_per_second/rollout")) is not None:
        figures.append(("tokens/s rollout", workers_text(row) or whole(rate)))
    factor = row.get("guards/learning_rate_factor", 1.0)
    guards = [guards_text(row), f"learning rate x {factor:g}" if factor not in (None, 1.0) else ""]
    if any(guards):
        figures.append(("guards", ", ".join(filter(None, guards))))
    return figures


# ------------------------------------------------------------------------------------------------------------- curves


def _charts(picture: RunPicture) -> list[str]:
    """Reward with evaluations, each reward function, further values of evaluations, lengths, entropy, gradient norm."""
    steps, evaluations = picture.steps, picture.evaluations
    functions = _matching(steps, re.compile(r"rewards/(.*)/mean"))
    others = _matching(evaluations, re.compile(r"eval_(.*)"))
    others = {name: label for name, label in others.items() if not NOT_DRAWN.search(label)}
    length = "completions/mean_length"
    return [
        chart_html("reward", [_line(steps, "reward", "training"), _points(evaluations, "eval_reward", "evaluation")]),
        chart_html("reward functions", [_line(steps, name, label) for name, label in functions.items()])
        if len(functions) > 1
        else "",
        chart_html("evaluation", [_points(evaluations, name, label) for name, label in others.items()])
        if len(evaluations) > 1
        else "",
        chart_html("tokens", [_line(steps, length, "training"), _points(evaluations, f"eval_{length}", "evaluation")]),
        chart_html("entropy", [_line(steps, "entropy", "")]),
        chart_html("gradient norm", [_line(steps, "grad_norm", "")]),
    ]


def _matching(rows: Sequence[Mapping[str, Any]], pattern: re.Pattern[str]) -> dict[str, str]:
    """The names of metrics that the pattern fits, with what its group found, in the order in which they came."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: match[1] for name in names if (match := pattern.fullmatch(name))}


def _line(rows: Sequence[Mapping[str, Any]], name: str, label: str) -> Line:
    return Line(label, _steps(rows), [as_number(row.get(name)) for row in rows])


def _points(rows: Sequence[Mapping[str, Any]], name: str, label: str) -> Line:
    return Line(label, _steps(rows), [as_number(row.get(name)) for row in rows], is_points=True)


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [as_number(row.get("step", place + 1)) for place, row in enumerate(rows)]


# -------------------------------------------------------------------------------------------------------- evaluations


def _evaluation_table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """A row for each metric, a column for each evaluation: the first, the last, and some between them."""
    names = [name for name in _matching(evaluations, re.compile("(eval_.*)")) if not TIMES.search(name)]
    if not names:
        return ""
    last = len(evaluations) - 1
    places = [n * last // (MOST_EVALUATIONS - 1) for n in range(MOST_EVALUATIONS)]
    shown = [evaluations[place] for place in dict.fromkeys(places)] if last >= MOST_EVALUATIONS else evaluations
    heads = [_cell("evaluation", "th"), *(_cell(f"step {row.get('step', '?')}", "th", "text-align:right") for row in shown)]
    intervals = {name for name in names if name.removesuffix("_low").removesuffix("_high") in {*names} - {name}}
    names = [name for name in names if name not in intervals]
    rows = [
        [_cell(name.removeprefix("eval_"), limit=60), *map(_number, _with_intervals(name, shown))]
        for name in names[:MOST_EVALUATION_METRICS]
    ]
    more = len(names) - MOST_EVALUATION_METRICS
    return _table(heads, rows, f"and {more} more metrics" if more > 0 else "")


def _with_intervals(name: str, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A metric of each evaluation, with its 95 % interval if it has one."""
    means, lows, highs = (_alike([row.get(f"{name}{end}") for row in evaluations]) for end in ("", "_low", "_high"))
    has_interval = [f"{name}_low" in row for row in evaluations]
    parts = zip(means, lows, highs, has_interval, strict=True)
    return [f"{mean} [{low}, {high}]" if has else mean for mean, low, high, has in parts]


def _alike(values: Sequence[float | None]) -> list[str]:
    """Numbers with as many decimal places for all of them as the largest one needs."""
    largest = max((abs(number) for number in map(as_number, values) if math.isfinite(number)), default=0.0)
    if largest >= 1000 or 0 < largest < 0.01:
        return [significant(value) for value in values]
    return [decimal(value, 1 if largest >= 10 else 3) for value in values]


# -------------------------------------------------------------------------------------------------------- completions


def _samples_table(picture: RunPicture) -> str:
    """A few completions; those of episodes as dialogues."""
    if not picture.samples:
        return ""
    heads = [
        _cell("reward", "th", "text-align:right"),
        _cell("advantage", "th", "text-align:right"),
        _cell("prompt", "th"),
        _cell(f"completions of step {picture.samples_step}", "th"),
    ]
    rows = [
        [
            _number(decimal(sample.reward)),
            _advantage(as_number(sample.advantage)),
            _cell(_few_lines(last_message(sample.prompt)), style="min-width:120px", limit=MOST_OF_A_PROMPT),
            _html_cell(_completion(sample.completion)),
        ]
        for sample in picture.samples[:MOST_SAMPLES]
    ]
    more = len(picture.samples) - MOST_SAMPLES
    return _table(heads, rows, f"and {more} more" if more > 0 else "")


def _advantage(value: float) -> str:
    if not math.isfinite(value):
        return _number("-")
    colour = f"color:{GOOD if value > 0 else BAD}" if value else ""
    return _number(f"{value:+.2f}".replace("-", "−"), colour)


def _completion(completion: Prompt) -> str:
    if isinstance(completion, str):
        return escaped(_few_lines(completion), MOST_OF_A_COMPLETION)
    lines = [
        f'<div><b style="margin-right:8px">{escaped(speaker, 20)}</b> {escaped(text, 160)}</div>'
        for speaker, text in dialogue(completion)
    ]
    return "".join(lines)


def _few_lines(text: str) -> str:
    """Without the lines in the middle, if there are many."""
    lines, half = text.splitlines(), MOST_LINES // 2
    return text if len(lines) <= MOST_LINES else "\n".join([*lines[:half], "…", *lines[-half:]])


# -------------------------------------------------------------------------------------------------------------- notes


def _notes(notes: Sequence[str]) -> str:
    """The first and the last ones, if there are many."""
    half, left_out = MOST_NOTES // 2, len(notes) - MOST_NOTES
    shown = [f"note: {note}" for note in notes]
    if left_out > 0:
        shown = [*shown[:half], f"… {left_out} more notes", *shown[-half:]]
    lines = [f'<div style="white-space:pre-wrap">{escaped(note, MOST_OF_A_NOTE)}</div>' for note in shown]
    return f'<div style="margin:6px 0 8px;font-size:12px;overflow-wrap:anywhere">{"".join(lines)}</div>' if lines else ""


# ------------------------------------------------------------------------------------------------------------- tables


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], below: str) -> str:
    body = "".join(f'<tr style="background:none">{"".join(cells)}</tr>' for cells in rows)
    table = (
        '<table style="border-collapse:collapse;margin:4px 0 2px;font-size:12px;border:none">'
        f'<thead><tr style="background:none">{"".join(heads)}</tr></thead><tbody>{body}</tbody></table>'
    )
    note = f'<div style="font-size:11px;{FAINT}">{escaped(below, 80)}</div>' if below else ""
    return f'<div style="margin-bottom:12px;overflow-x:auto">{table}{note}</div>'


def _cell(text: str, tag: str = "td", style: str = "", limit: int = 80) -> str:
    return _html_cell(escaped(text, limit), tag, style)


def _html_cell(content: str, tag: str = "td", style: str = "") -> str:
    # Everything that the style sheets of notebooks set for tables: numbers to the right, stripes, no wrapping.
    kind = (
        f"white-space:nowrap;font-weight:normal;{FAINT}" if tag == "th" else f"white-space:pre-wrap;border-top:1px solid {RULE}"
    )
    every = "text-align:left;vertical-align:top;overflow-wrap:anywhere;padding:3px 16px 3px 0;border:none"
    return f'<{tag} style="{";".join(filter(None, [every, kind, style]))}">{content}</{tag}>'


def _number(text: str, style: str = "") -> str:
    return _cell(text, style=f"text-align:right;white-space:nowrap;{style}")
