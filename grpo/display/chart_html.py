"""Small curves for a notebook, as inline SVG.

    chart_html("reward", [Line("training", steps, rewards), Line("evaluation", eval_steps, eval_rewards, is_points=True)])

No script, no style sheet, and no text inside the SVG: a page that drops it (GitHub, an untrusted notebook) still shows the
numbers around it. Axes have the colour of the surrounding text; the colours of lines read on white and on black.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .view_text import escaped, significant

COLOURS = ("#1f86cc", "#d55e00", "#009e73", "#b8609a", "#c78a00", "#3d9bd1")
"""Those of `rankup report`, in tones between light and dark."""

WIDTH, HEIGHT, MARGIN = 270, 84, 5
MOST_POINTS, MOST_MARKS = 100, 50
"""Of a curve, and of single measurements: more are drawn by the means of equal parts."""

FAINT = "opacity:0.65"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: values after `steps`, which increase; NaN where there is none. `is_points`: single measurements."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    is_points: bool = False

    @property
    def known(self) -> list[float]:
        """The finite values."""
        return [value for value in self.values if math.isfinite(value)]


def chart_html(title: str, lines: Sequence[Line]) -> str:
    """Title, the lines, their last values, and the range of steps and values; empty if no line has a value."""
    lines = [line for line in lines if line.known][: len(COLOURS)]
    if not lines:
        return ""
    area = _Area.around(lines)
    coloured = list(zip(lines, COLOURS, strict=False))
    shapes = "".join(_shapes(line, colour, area) for line, colour in coloured)
    edges = "".join(
        f'<path d="M0 {y}H{WIDTH}" stroke="currentColor" stroke-opacity="0.18" fill="none"/>' for y in (0.5, HEIGHT - 0.5)
    )
    span = f"{significant(area.low)} to {significant(area.high)}" if area.low < area.high else significant(area.low)
    steps = f"step {area.first:.0f} to {area.last:.0f}" if area.first < area.last else f"step {area.first:.0f}"
    value = significant(lines[0].known[-1]) if len(lines) == 1 else ""
    legend = "".join(_legend(line, colour) for line, colour in coloured) if len(lines) > 1 else ""
    return (
        f'<div style="display:inline-block;vertical-align:top;width:{WIDTH}px;margin:0 26px 14px 0">'
        f'<div style="margin-bottom:3px"><b style="margin-right:8px">{escaped(title, 40)}</b> {value}</div>'
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title, 40)}"'
        f' style="display:block;overflow:visible">{edges}{shapes}</svg>'
        f'<div style="font-size:11px;{FAINT}">{steps}, {span}</div><div style="font-size:12px">{legend}</div></div>'
    )


@dataclass(frozen=True, slots=True)
class _Area:
    """The ranges of steps and values that a chart covers."""

    first: float
    last: float
    low: float
    high: float

    @staticmethod
    def around(lines: Sequence[Line]) -> "_Area":
        steps = [step for line in lines for step, value in zip(line.steps, line.values, strict=True) if math.isfinite(value)]
        values = [value for line in lines for value in line.known]
        return _Area(min(steps), max(steps), min(values), max(values))

    def place(self, step: float, value: float) -> tuple[float, float]:
        """In pixels; halves first, since the difference of two large numbers may be infinite."""
        across = (step - self.first) / (self.last - self.first) if self.first < self.last else 0.5
        half = self.high / 2 - self.low / 2
        up = (value / 2 - self.low / 2) / half if half > 0 else 0.5
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)


def _shapes(line: Line, colour: str, area: _Area) -> str:
    """Points joined by dashes; or a curve, thin behind its running mean over a tenth of it if that is several steps."""
    points = _thinned(line.steps, line.values, MOST_MARKS if line.is_points else MOST_POINTS)
    if line.is_points:
        places = [area.place(step, value) for step, value in points if math.isfinite(value)]
        radius = 3 if len(places) <= 25 else 1.5
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in places)
        dashes = _path(points, area, f'stroke="{colour}" stroke-opacity="0.6" stroke-dasharray="3 4"')
        return f'{dashes}<g fill="{colour}">{dots}</g>'
    window = len(points) // 10
    if window < 2:
        return _path(points, area, f'stroke="{colour}" stroke-width="1.75"')
    thin = _path(points, area, f'stroke="{colour}" stroke-opacity="0.35"')
    return thin + _path(_running_means(points, window), area, f'stroke="{colour}" stroke-width="2"')


def _path(points: Sequence[tuple[float, float]], area: _Area, style: str) -> str:
    """A line through the points, with a gap where a value is missing; a point between two gaps is a dot."""
    parts: list[str] = []
    is_open = False
    for (step, value), (_, following) in zip(points, [*points[1:], (math.nan, math.nan)], strict=True):
        if not math.isfinite(value):
            is_open = False
            continue
        x, y = area.place(step, value)
        parts.append(f"{'L' if is_open else 'M'}{x:.1f} {y:.1f}" + ("" if is_open or math.isfinite(following) else "h0"))
        is_open = True
    return f'<path d="{"".join(parts)}" fill="none" stroke-linecap="round" stroke-linejoin="round" {style}/>'


def _thinned(steps: Sequence[float], values: Sequence[float], most: int) -> list[tuple[float, float]]:
    """At most `most` points: the means of equal parts, NaN for a part without a value."""
    count = min(most, len(values))
    points = []
    for part in range(count):
        places = range(part * len(values) // count, (part + 1) * len(values) // count)
        known = [values[place] for place in places if math.isfinite(values[place])]
        points.append((_mean([steps[place] for place in places]), _mean(known)))
    return points


def _running_means(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Each point with the mean of the last `window` known values; NaN where its own is not known."""
    means = []
    for place, (step, value) in enumerate(points):
        recent = [one for _, one in points[max(0, place - window + 1) : place + 1] if math.isfinite(one)]
        means.append((step, _mean(recent) if math.isfinite(value) else math.nan))
    return means


def _mean(values: Sequence[float]) -> float:
    """NaN of nothing. Each is divided first: a sum of large numbers may be infinite."""
    return sum(value / len(values) for value in values) if values else math.nan


def _legend(line: Line, colour: str) -> str:
    """The line's mark, its name, and its last value."""
    shape = "width:8px;height:8px;border-radius:4px" if line.is_points else "width:12px;height:3px;border-radius:2px"
    mark = f"display:inline-block;{shape};margin-right:5px;vertical-align:middle;background:{colour}"
    name = f'<span style="{mark}"></span><span style="{FAINT}">{escaped(line.label, 40)}</span>'
    return f'<span style="margin-right:12px">{name} {significant(line.known[-1])}</span> '
