"""What the views write, as plain text: numbers, durations, curves of a few characters, lines about a run.

    duration(370)                                       # 6m10s
    decimal(0.4071, 3)                                  # 0.407
    sparkline([0.1, 0.4, 0.9], width=20)                # ▂▄▇
    shorten(one_line(completion), 132)                  # one line that a terminal cannot obey

A number that is not known (None) or not finite is a dash. Nothing here knows colours or widths of a screen.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

When = Literal["before", "during", "after"]
"""When an evaluation was made: before, during or after training."""

Prompt = str | Sequence[Mapping[str, Any]]

WHEN_TEXT = {"before": "before training", "after": "after training"}
GUARD_WORDS = {"alarms": "alarm", "skipped_steps": "skip", "restores": "restore"}
MOST_WORKERS_LISTED = 4
SPARK_LEVELS = "▁▂▃▄▅▆▇█"


def phases_of(seconds_by_phase: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in seconds_by_phase.items() if name != "total"}


def step_seconds(seconds_by_phase: Mapping[str, float]) -> float:
    """The `total` where it is given (phases may overlap), else the sum."""
    return seconds_by_phase.get("total", sum(seconds_by_phase.values()))


def guards_text(metrics: Mapping[str, float]) -> str:
    """What the guards have done so far, such as `3 alarms, 1 skip, 1 restore`; empty where nothing rang."""
    counts = [(int(metrics.get(f"guards/{name}", 0)), word) for name, word in GUARD_WORDS.items()]
    return ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts if count)


def workers_text(metrics: Mapping[str, float]) -> str:
    """How fast each worker sampled, by rank, such as `812, 798 tok/s`; the slowest and the fastest of more than four.

    `metrics` hold those of `worker_reports.time_metrics`. Empty where one worker is all there is.
    """
    speeds: list[float] = []
    while (speed := metrics.get(f"workers/{len(speeds)}/tokens_per_second")) is not None:
        speeds.append(speed)
    if not speeds:
        return ""
    if len(speeds) <= MOST_WORKERS_LISTED:
        return ", ".join(f"{speed:.0f}" for speed in speeds) + " tok/s"  # commas stand between workers, none between digits
    slowest, fastest = (f"{whole(speed)} (rank {speeds.index(speed)})" for speed in (min(speeds), max(speeds)))
    return f"{len(speeds)} workers, {slowest} to {fastest} tok/s"


def evaluation_text(step: int, reward: float, when: When) -> str:
    return f"evaluation {WHEN_TEXT.get(when, f'at step {step}')}: reward {decimal(reward, 3)}"


def summary_text(summary: Mapping[str, Any]) -> str:
    """One line of `summary.json`: steps, time, and the evaluation before and after."""
    seconds = summary.get("seconds", {}).get("total")
    how = "stopped" if summary.get("interrupted") else "done"
    text = f"{how}: {summary.get('steps', 0)} steps in {duration(seconds)}"
    rewards = [summary.get("evaluation", {}).get(when, {}).get("reward") for when in ("before", "after")]
    if rewards[1] is not None:
        before = "" if rewards[0] is None else f"{decimal(rewards[0], 3)} → "
        text += f", evaluation reward {before}{decimal(rewards[1], 3)}"
    return text


def one_line(text: Prompt) -> str:
    """`text`, or a conversation's last message, on one line: line breaks as ⏎, what a terminal might obey as ·."""
    if not isinstance(text, str):
        text = str(text[-1]["content"])
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join(character if character.isprintable() else "·" for character in text)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters; what is cut is the middle, since an answer stands at the end."""
    if len(text) <= limit:
        return text
    tail = limit // 2
    return text[: limit - tail - 3] + " … " + text[-tail:]


def sparkline(values: Sequence[float], *, width: int) -> str:
    """The whole history in at most `width` bars, each the mean of its share of the values that are finite.

    The scale is 0 to 1 where all values lie within, else lowest to highest.
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
    """NaN for what is not known."""
    return math.nan if value is None else float(value)
