"""The texts of the views: numbers, durations, sparklines, lines about a run.

    duration(370)                                       # 6m10s
    decimal(0.4071, 3)                                  # 0.407
    sparkline([0.1, 0.4, 0.9], width=20)                # ▂▄▇
    shorten(one_line(completion), 132)                  # one line without control characters
    dialogue(messages)                                  # [("assistant", "add(a=1, b=2)"), ("add", "3"), ...]

An unknown (None) or non-finite number is a dash. Colours and widths are in `terminal.py` and `run_html.py`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from ...rewards.texts import content_text

When = Literal["before", "during", "after"]
"""When an evaluation took place: before, during or after training."""

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""

MOST_MESSAGES = 12
"""Of an episode that are shown."""

MOST_OF_A_NAME = 20
"""Characters of the name of a tool."""

WHEN_TEXT = {"before": "before training", "after": "after training"}
_ATTEMPTS = re.compile(r"eval_((?:pass|maj)@\d+)")
GUARD_WORDS = {"alarms": "alarm", "skipped_steps": "skip", "restores": "restore"}
MOST_WORKERS_LISTED = 4
SPARK_LEVELS = "▁▂▃▄▅▆▇█"


def phases_of(seconds_by_phase: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in seconds_by_phase.items() if name != "total"}


def step_seconds(seconds_by_phase: Mapping[str, float]) -> float:
    """The `total` if present (phases may overlap), else the sum."""
    return seconds_by_phase.get("total", sum(seconds_by_phase.values()))


def guards_text(metrics: Mapping[str, float]) -> str:
    """Alarms and actions of the guards so far, such as `3 alarms, 1 skip, 1 restore`; empty if no alarm triggered."""
    counts = [(int(metrics.get(f"guards/{name}", 0)), word) for name, word in GUARD_WORDS.items()]
    return ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts if count)


def no_update_text(metrics: Mapping[str, float]) -> str:
    """`(update skipped)`, or `(no update)` if there was nothing to train on; empty for a step with an update."""
    if metrics.get("update_skipped"):
        return "(update skipped)"
    is_trained = "learning_rate" not in metrics or "updates" in metrics  # without a learning rate: not the metrics of training
    return "" if is_trained else "(no update)"


def workers_text(metrics: Mapping[str, float]) -> str:
    """Sampling speed of each worker by rank, such as `812, 798 tok/s`; of more than four, the slowest and the fastest.

    `metrics` contains those of `time_metrics`. Empty for a single worker.
    """
    speeds: list[float] = []
    while (speed := metrics.get(f"workers/{len(speeds)}/tokens_per_second")) is not None:
        speeds.append(speed)
    if not speeds:
        return ""
    if len(speeds) <= MOST_WORKERS_LISTED:
        return ", ".join(whole(speed).replace(",", "") for speed in speeds) + " tok/s"  # commas separate workers only
    slowest, fastest = (f"{whole(speed)} (rank {speeds.index(speed)})" for speed in (min(speeds), max(speeds)))
    return f"{len(speeds)} workers, {slowest} to {fastest} tok/s"


def evaluation_text(step: int, metrics: Mapping[str, float], when: When) -> str:
    """`evaluation at step 20: reward 0.412 [0.35, 0.47]; pass@1 0.412, pass@4 0.701`, see `rewards_text`."""
    of_all = decimal(metrics["eval_reward"], 3)
    others = rewards_text(evaluation_rewards(metrics)).removeprefix(of_all)
    low, high = (as_number(metrics.get(f"eval_reward_{end}")) for end in ("low", "high"))
    interval = f" [{decimal(low, 3)}, {decimal(high, 3)}]" if math.isfinite(low) and math.isfinite(high) else ""
    found = [(match[1], value) for name, value in metrics.items() if (match := _ATTEMPTS.fullmatch(name))]
    attempts = "; " + ", ".join(f"{name} {decimal(value, 3)}" for name, value in found) if found else ""
    return f"evaluation {WHEN_TEXT.get(when, f'at step {step}')}: reward {of_all}{interval}{others}{attempts}"


def evaluation_rewards(metrics: Mapping[str, float]) -> dict[str, Any]:
    """The mean rewards in the metrics of an evaluation, in the form of `summary.json`.

    `{"reward": 0.4, "rewards": {"format": 0.9}}`, and with named sets also `"sets": {"easy": {"reward": ..., "rewards": ...}}`.
    """

    def with_prefix(prefix: str) -> dict[str, Any]:
        names = re.compile(rf"{re.escape(prefix)}rewards/(.*)/mean")
        by_function = {match[1]: value for name, value in metrics.items() if (match := names.fullmatch(name))}
        return {"reward": metrics[f"{prefix}reward"], "rewards": by_function}

    sets = [match[1] for name in metrics if (match := re.fullmatch(r"eval_([^/]+)_reward", name))]
    of_all = with_prefix("eval_")
    return {**of_all, "sets": {name: with_prefix(f"eval_{name}_") for name in sets}} if sets else of_all


def rewards_text(*evaluations: Mapping[str, Any]) -> str:
    """The mean rewards of one evaluation, or their course over several: of all prompts, then of each named set.

    With two functions, `0.412 (answer 0.310, format 0.514); easy 0.612 (answer ...); hard 0.212 (answer ...)`, and of two
    evaluations `0.109 → 0.412 (answer 0.100 → 0.310, format ...); easy 0.200 → 0.612; hard ...`, without the functions of each
    set. The arguments are in the form of `evaluation_rewards`.
    """

    def course(values: Sequence[float | None]) -> str:
        return " → ".join(decimal(value, 3) for value in values)

    def text(of_each: Sequence[Mapping[str, Any]], *, functions: bool) -> str:
        names = of_each[-1].get("rewards", {})
        parts = [f"{name} {course([one.get('rewards', {}).get(name) for one in of_each])}" for name in names]
        return course([one.get("reward") for one in of_each]) + (
            f" ({', '.join(parts)})" if functions and len(parts) > 1 else ""
        )

    texts = [text(evaluations, functions=True)]
    for name in evaluations[-1].get("sets", {}):
        of_set = [one.get("sets", {}).get(name, {}) for one in evaluations]
        texts.append(f"{name} {text(of_set, functions=len(evaluations) == 1)}")
    return "; ".join(texts)


def summary_text(
    summary: Mapping[str, Any], *, wall_seconds: float | None = None, output_dir: Path | None = None
) -> str:
    """Steps, time, evaluation before and after from `summary.json`, and the output folder on a separate line.

    `wall_seconds`: time since the view was opened; shown if it is longer than the time of the run, which excludes the start of
    vLLM.
    """
    seconds = summary.get("seconds", {}).get("total")
    how = "stopped" if summary.get("interrupted") else "done"
    text = f"{how}: {summary.get('steps', 0)} steps in {duration(seconds)}"
    if wall_seconds is not None and seconds is not None and wall_seconds - seconds >= 1:
        text += f" ({duration(wall_seconds)} with start-up)"
    evaluations = [summary.get("evaluation", {}).get(when, {}) for when in ("before", "after")]
    done = [evaluation for evaluation in evaluations if evaluation.get("reward") is not None]
    if done and done[-1] is evaluations[-1]:
        text += f", evaluation reward {rewards_text(*done)}"
    return text if output_dir is None else f"{text}\noutput: {output_dir}"


def one_line(text: Prompt) -> str:
    """`text`, or the last message of a conversation, on one line: line breaks as ⏎, control characters as ·."""
    text = last_message(text)
    return harmless(text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " "))


def last_message(text: Prompt) -> str:
    """`text`, or the last message of a conversation."""
    if isinstance(text, str):
        return text
    return content_text(text[-1].get("content")) if text else ""


def harmless(text: str) -> str:
    """The text with · for what controls a terminal or cannot be written to one: errors of users' code may quote the model."""
    return "".join(character if character.isprintable() or character in "\n\t" else "·" for character in text)


def dialogue(messages: Sequence[Mapping[str, Any]], *, most: int = MOST_MESSAGES) -> list[tuple[str, str]]:
    """Who says what in an episode, one line for each message: text and calls of the assistant, results of tools by their names.

    Of more than `most` messages those in the middle are left out.
    """
    lines = [(_speaker(message), _said(message)) for message in messages]
    if len(lines) <= most:
        return lines
    first = most // 2
    rest = most - 1 - first
    return [*lines[:first], ("", f"… {len(lines) - first - rest} more messages"), *lines[len(lines) - rest :]]


def name_width(lines: Sequence[tuple[str, str]]) -> int:
    """Of the column that says who says the lines of a dialogue."""
    return min(MOST_OF_A_NAME, max((len(speaker) for speaker, _ in lines), default=0))


def _speaker(message: Mapping[str, Any]) -> str:
    name = message.get("name") if message.get("role") == "tool" else None
    return one_line(str(name or message.get("role") or "?"))


def _said(message: Mapping[str, Any]) -> str:
    calls = [_call_text(call) for call in message.get("tool_calls") or ()]
    text = one_line(content_text(message.get("content"))).strip("⏎ ")
    return "  ".join([*([text] if text else []), *calls]) or "(nothing)"


def _call_text(call: Mapping[str, Any]) -> str:
    """`add(a=1, b=2)`: arguments that are no mapping as they are."""
    function = call.get("function") or call
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        values = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in arguments.items()}
        arguments = ", ".join(f"{name}={value}" for name, value in values.items())
    return one_line(f"{function.get('name') or '?'}({'' if arguments is None else arguments})")


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, cut in the middle, since answers are at the end."""
    if len(text) <= limit:
        return text
    tail = limit // 2
    return text[: limit - tail - 3] + " … " + text[-tail:]


def sparkline(values: Sequence[float], *, width: int) -> str:
    """The complete history in at most `width` bars, each the mean of the finite values of its part.

    The scale is 0 to 1 if all values are within, else lowest to highest.
    """
    bars = []
    num_bars = min(width, len(values))
    for index in range(num_bars):
        share = values[index * len(values) // num_bars : (index + 1) * len(values) // num_bars]
        finite = [value for value in share if math.isfinite(value)]
        bars.append(sum(finite) / len(finite) if finite else None)
    heights = [bar for bar in bars if bar is not None]
    if not heights:
        return ""
    low, high = min(heights), max(heights)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scale = 7 / (high - low or 1.0)
    return "".join(" " if bar is None else SPARK_LEVELS[round((bar - low) * scale)] for bar in bars)


def decimal(value: float | None, places: int = 2) -> str:
    return f"{number:.{places}f}" if math.isfinite(number := as_number(value)) else "-"


def whole(value: float | None) -> str:
    return f"{number:,.0f}" if math.isfinite(number := as_number(value)) else "-"


def significant(value: float | None) -> str:
    """Three digits: `0.412`, `13.2`, `0.0002`, `1,204`, `4.1e+09`; - if unknown."""
    number = as_number(value)
    if not math.isfinite(number):
        return "-"
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e9 else f"{number:.3g}"


def escaped(text: str, limit: int) -> str:
    """At most `limit` characters of a text, for a page of HTML, in a tag or in a quoted attribute."""
    return escape(harmless(shorten(text, limit)), quote=True)


def seconds_text(value: float) -> str:
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """45s, 6m10s, 1h02m; - if unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def as_number(value: float | None) -> float:
    """NaN if unknown."""
    return math.nan if value is None else float(value)
