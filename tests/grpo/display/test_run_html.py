"""The HTML of a run: what it shows, that every text stays text, and its size."""

import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.display.chart_html import HEIGHT, WIDTH, Line, chart_html
from rankup.grpo.display.run_html import RunPicture, run_html, run_text
from rankup.grpo.display.view import SampleRow

TAGS = {"div", "b", "span", "svg", "path", "g", "circle", "table", "thead", "tbody", "tr", "th", "td"}
WITHOUT_END = {"path", "circle"}
HOSTILE = "</td></div><script>alert(1)</script><img src=x onerror=alert(1)>\"' onload='x' & \x1b[2J\u202e \ud800 $x^2$ "
ADD = {"type": "function", "function": {"name": HOSTILE, "arguments": {HOSTILE: HOSTILE}}}
EPISODE = [
    {"role": "assistant", "content": HOSTILE, "tool_calls": [ADD]},
    {"role": "tool", "name": HOSTILE, "content": HOSTILE},
]


class Page(HTMLParser):
    """The tags, attributes and texts of a page, whose tags must be nested properly."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.values: list[str] = []
        self.text = ""
        self.classes = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values += [value or "" for _, value in attrs]
        if not self._open:
            self.classes = dict(attrs).get("class") or ""
        if tag not in WITHOUT_END:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def picture(**changes: Any) -> RunPicture:
    values: dict[str, Any] = {"run_name": "sums", "status": "training", "steps_done": 2, "max_steps": 8, **changes}
    return RunPicture(**values)


def step(number: int, **metrics: Any) -> dict[str, Any]:
    return {"step": number, "reward": 0.1 * number, "grad_norm": 0.3, "entropy": 1.0, "time/rollout": 2.0, **metrics}


def evaluated(number: int, reward: float, **metrics: Any) -> dict[str, Any]:
    return {"step": number, "eval_reward": reward, "eval_runtime": 1.5, "eval_samples_per_second": 80.0, **metrics}


def test_the_run_is_shown() -> None:
    rows = [
        evaluated(0, 0.125, **{"eval_pass@4": 0.25, "eval_rewards/answer/mean": 0.125}),
        step(1),
        step(2, **{"completions/mean_length": 13.25, "completions/clipped_ratio": 0.02, "guards/alarms": 2.0}),
        evaluated(2, 0.5, **{"eval_pass@4": 0.75, "eval_rewards/answer/mean": 0.5}),
    ]
    samples = [SampleRow([{"role": "user", "content": "What is 1 + 1?"}], "It is\n2.", 1.0, -1.25)]
    shown = picture(
        rows=rows, times="3s, ETA 9s", samples_step=1, samples=samples, notes=["careful"], lines=["output: runs/sums"]
    )
    page = Page(run_html(shown))
    for text in ("sums", "training · step 2 of 8 · 3s, ETA 9s", "0.125 → 0.500", "13.2, 2% cut off", "2 alarms"):
        assert text in page.text
    for text in (
        "pass@4",
        "0.2500.750",
        "rewards/answer/mean",
        "1.00−1.25What is 1 + 1?It is\n2.",
        "note: careful",
        "output: runs/sums",
    ):
        assert text in page.text
    assert "runtime" not in page.text and "per_second" not in page.text
    assert run_text(shown) == "sums: training, step 2/8, reward 0.20\noutput: runs/sums"


def test_every_text_stays_text() -> None:
    names = {f"rewards/{HOSTILE}/mean": 0.5, f"rewards/{HOSTILE}2/mean": 0.25, "completions/mean_length": 3.0}
    rows = [evaluated(0, 0.1, **{f"eval_{HOSTILE}": 0.5}), step(1, **names), evaluated(1, 0.2, **{f"eval_{HOSTILE}": 0.6})]
    page = Page(
        run_html(
            picture(
                run_name=HOSTILE,
                status=HOSTILE,
                times=HOSTILE,
                rows=rows,
                samples=[SampleRow(HOSTILE, HOSTILE, 1.0, 0.5), SampleRow(EPISODE, EPISODE, None)],
                notes=[HOSTILE],
                lines=[HOSTILE],
            )
        )
    )
    assert page.tags <= TAGS
    assert not any(name.startswith("on") or name in ("href", "src") for name in page.attributes)
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert not set("\x1b\u202e\ud800") & set(page.text + "".join(page.values))
    # The classes that MathJax 2, 3 and 4 leave alone: dollars are no mathematics.
    assert {"tex2jax_ignore", "mathjax_ignore"} <= set(page.classes.split())


NAMES = [
    "reward", "entropy", "grad_norm", "learning_rate", "completions/mean_length", "completions/clipped_ratio", "time/rollout",
    "time/total", "tokens_per_second/rollout", "rewards/a/mean", "rewards/b/mean", "workers/0/tokens_per_second",
    "eval_reward", "eval_easy_reward", "eval_completions/mean_length",
]  # fmt: skip


def paths(html: str) -> str:
    return " ".join(re.findall(r' (?:d|cx|cy)="([^"]*)"', html))


@pytest.mark.parametrize("value", [math.nan, None, math.inf, -math.inf])
def test_a_run_without_a_known_value_has_no_curve(value: float | None) -> None:
    rows = [{"step": number, **dict.fromkeys(NAMES, value)} for number in range(3)]
    html = run_html(picture(rows=rows))
    page = Page(html)
    assert "svg" not in page.tags and re.search(r"\b(nan|inf)\b", page.text) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), st.floats(), st.integers(-(10**9), 10**9)), max_size=8),
        max_size=12,
    )
)
def test_any_numbers_are_shown_inside_their_charts(metrics: list[dict[str, Any]]) -> None:
    html = run_html(picture(rows=[{"step": number, **row} for number, row in enumerate(metrics)]))
    Page(html)
    numbers = [float(number) for number in re.findall(r"-?[\d.]+|nan|inf", paths(html))]
    assert all(0 <= number <= max(WIDTH, HEIGHT) for number in numbers)


def test_a_run_without_steps_is_shown() -> None:
    page = Page(run_html(picture(status="not trained", steps_done=0, max_steps=0)))
    assert page.text.strip() == "sums not trained · step 0 of 0"
    assert run_text(picture(status="not trained", steps_done=0)) == "sums: not trained, step 0/8"


def test_a_long_run_with_long_texts_is_a_small_page() -> None:
    """1,000 steps with 500 evaluations of 40 metrics, 200 completions and 1,000 notes, of characters that grow when escaped."""
    text, draw = '"' * 5000, random.Random(1)
    rows: list[dict[str, Any]] = []
    for number in range(1, 1001):
        metrics = {f"rewards/{name}{text}/mean": draw.random() for name in range(8)}
        rows.append(step(number, **metrics, **{"completions/mean_length": draw.random(), "entropy": draw.random()}))
        if number % 2 == 0:
            rows.append(evaluated(number, draw.random(), **{f"eval_{name}{text}": draw.random() for name in range(40)}))
    samples = [SampleRow(text, text, 1.0, 0.5), SampleRow(text, [{"role": "assistant", "content": text}] * 90, 0.0, -0.5)] * 100
    html = run_html(picture(run_name=text, steps_done=1000, rows=rows, samples=samples, notes=[text] * 1000, lines=[text] * 4))
    assert len(html.encode()) < 200_000
    page = Page(html)
    assert "and 194 more" in page.text and "… 980 more notes" in page.text


def test_intervals_stand_beside_their_means_and_are_no_curves() -> None:
    rows = [
        {"step": step, "eval_reward": mean, "eval_reward_low": mean - 0.1, "eval_reward_high": mean + 0.1, "eval_pass@4": 0.5}
        for step, mean in ((0, 0.25), (4, 0.75))
    ]
    page = run_html(picture(rows=rows))
    assert "0.250 [0.150, 0.350]" in page and "0.750 [0.650, 0.850]" in page
    assert "reward_low" not in page and "pass@4" in page


def test_many_evaluations_are_the_first_the_last_and_some_between() -> None:
    html = run_html(picture(rows=[evaluated(number, 0.01 * number) for number in range(0, 101, 2)]))
    steps = [int(number) for number in re.findall(r"<th[^>]*>step (\d+)</th>", html)]
    assert steps == [0, 20, 40, 60, 80, 100]


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    lines = "\n".join(f"line {number}" for number in range(40))
    page = Page(run_html(picture(samples=[SampleRow("Why?", lines, 1.0)])))
    assert "line 0\nline 1\nline 2\nline 3\nline 4\n…\nline 35\n" in page.text and page.text.rstrip().endswith("line 39")


def test_a_line_has_a_gap_where_a_value_is_missing_and_a_dot_between_two_gaps() -> None:
    html = chart_html("reward", [Line("", [1, 2, 3, 4, 5, 6], [0.0, 1.0, math.nan, 0.5, math.nan, 0.25])])
    (line,) = [path for path in re.findall(r'd="(M[^"]*)"', html) if "L" in path]
    assert re.sub(r"[\d.]+ [\d.]+", "p", line) == "MpLpMph0Mph0"


def test_a_long_line_is_drawn_by_means_and_their_running_mean() -> None:
    html = chart_html("reward", [Line("", list(range(3000)), [float(number % 2) for number in range(3000)])])
    thin, strong = [path for path in re.findall(r'd="(M[^"]*)"', html) if "L" in path]
    assert thin.count("L") == strong.count("L") == 99
    assert set(re.findall(r"(?<=[ML])[\d.]+ ([\d.]+)", thin)) == {f"{HEIGHT / 2:.1f}"}, "each part has the same mean"
