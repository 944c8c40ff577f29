"""The texts of the views: numbers, durations, sparklines, lines about a run.

    duration(370)                                       # 6m10s
    decimal(0.4071, 3)                                  # 0.407
    sparkline([0.1, 0.4, 0.9], width=20)                # ▂▄▇
    shorten(one_line(completion), 132)                  # one line without control characters

An unknown (None) or non-finite number is a dash. Colours and widths are in `terminal.py`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

When = Literal["before", "during", "after"]
"""When an evaluation took place: before, during or after training."""

Prompt = str | Sequence[Mapping[str, Any]]

WHEN_TEXT = {"before": "before training", "after": "after training"}
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
        return ", ".join(f"{speed:.0f}" for speed in speeds) + " tok/s"  # commas separate workers only
    slowest, fastest = (f"{whole(speed)} (rank {speeds.index(speed)})" for speed in (min(speeds), max(speeds)))
    return f"{len(speeds)} workers, {slowest} to {fastest} tok/s"


def evaluation_text(step: int, reward: float, when: When) -> str:
    return f"evaluation {WHEN_TEXT.get(when, f'at step {step}')}: reward {decimal(reward, 3)}"


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
    rewards = [summary.get("evaluation", {}).get(when, {}).get("reward") for when in ("before", "after")]
    if rewards[1] is not None:
        before = "" if rewards[0] is None else f"{decimal(rewards[0], 3)} → "
        text += f", evaluation reward {before}{decimal(rewards[1], 3)}"
    return text if output_dir is None else f"{text}\noutput: {output_dir}"


def one_line(text: Prompt) -> str:
    """`text`, or the last message of a conversation, on one line: line breaks as ⏎, control characters as ·."""
    if not isinstance(text, str):
        text = str(text[-1]["content"])
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join(character if character.isprintable() else "·" for character in text)


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
