import io
import math
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from rankup.grpo.display.choose import make_view
from rankup.grpo.display.terminal import LiveView, PlainView
from rankup.grpo.display.view import SampleRow, View

METRICS = {
    "reward": 0.41,
    "completions/mean_length": 13.2,
    "completions/clipped_ratio": 0.02,
    "entropy": 0.5,
    "tokens_per_second/rollout": 1204.3,
    "tokens_per_second/train": 2310.0,
}
PHASES = {"rollout": 3.1, "train": 2.1, "publish": 0.012}
SAMPLES = [
    SampleRow("What is [bold]17 + 25?", "Let me see.\n\n42", 1.0),
    SampleRow(
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 1 + 1?"}],
        "x\x1b[2Jy" * 90,
        0.0,
    ),
]
SUMMARY = {
    "steps": 3,
    "seconds": {"total": 370},
    "evaluation": {"before": {"reward": 0.109}, "after": {"reward": 0.86}},
}


def speeds(of_each: Sequence[float]) -> dict[str, float]:
    """Metrics of a step with several workers."""
    return {f"workers/{rank}/tokens_per_second": speed for rank, speed in enumerate(of_each)}


def drive(view: View) -> None:
    view.stage("starting the engine")
    view.evaluation(0, {"eval_reward": 0.109}, "before")
    view.step(1, METRICS, PHASES)
    view.completions(1, SAMPLES)
    view.note("the gradient norm is 8 times [its] usual size")
    view.step(2, METRICS, PHASES)
    view.evaluation(2, {"eval_reward": 0.57}, "during")


def plain_view(file: io.TextIOBase, *, max_steps: int = 80) -> PlainView:
    return PlainView(max_steps=max_steps, run_name="sums", console=Console(file=file))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [PlainView, LiveView])
def test_a_note_that_quotes_a_failure_does_not_control_the_terminal(kind: type[PlainView] | type[LiveView]) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    view = kind(max_steps=3, run_name="sums", console=Console(file=file, color_system=None))  # type: ignore[arg-type]
    view.note("void:\n\tValueError: bad move \x1b[2J\x9b31m \ud800")
    file.flush()
    lines = file.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "note: void:" and lines[1].split() == ["ValueError:", "bad", "move", "·[2J·31m", "·"]


def live_view(*, width: int = 80, height: int = 30) -> tuple[LiveView, Console]:
    console = Console(force_terminal=True, width=width, height=height, file=io.StringIO(), record=True)
    return LiveView(max_steps=80, run_name="sums", console=console), console


def frame(view: LiveView, console: Console) -> str:
    """The current panel."""
    console.export_text(clear=True)
    console.print(view)
    return console.export_text(clear=True)


def test_plain_step_is_one_complete_line():
    file = io.StringIO()
    view = plain_view(file)
    view.step(12, METRICS, PHASES)
    assert file.getvalue() == (
        "step 12/80  reward 0.41  length 13.2  1,204 tok/s rollout  "
        "5.2 s (rollout 3.1 train 2.1 publish 0.01)  ETA 5m54s\n"
    )


def test_plain_step_without_metrics_still_shows():
    file = io.StringIO()
    plain_view(file).step(3, {"reward": math.nan}, {"total": 4.0, "train": 2.0})
    assert file.getvalue() == "step  3/80  reward -  length -  4.0 s (train 2.0)  ETA 5m08s\n"


def test_plain_step_shows_the_speed_of_each_worker():
    file = io.StringIO()
    plain_view(file).step(12, METRICS | speeds([602.4, 601.9]), PHASES)
    assert file.getvalue() == (
        "step 12/80  reward 0.41  length 13.2  1,204 tok/s rollout: 602, 602 tok/s  "
        "5.2 s (rollout 3.1 train 2.1 publish 0.01)  ETA 5m54s\n"
    )


def test_plain_view_shows_the_complete_run_without_control_characters():
    file = io.StringIO()
    with plain_view(file) as view:
        drive(view)
        view.finish(SUMMARY)
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert lines[:3] == ["run sums: 80 steps", "starting the engine ...", "evaluation before training: reward 0.109"]
    assert "    reward 1.00  What is [bold]17 + 25?" in lines
    assert "        Let me see.⏎⏎42" in lines
    assert "    reward 0.00  What is 1 + 1?" in lines
    assert "note: the gradient norm is 8 times [its] usual size" in lines
    assert "evaluation at step 2: reward 0.570" in lines
    assert lines[-1] == "done: 3 steps in 6m10s, evaluation reward 0.109 → 0.860"


def test_plain_view_survives_a_log_in_ascii():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    plain_view(file).completions(1, [SampleRow("Ωμέγα", "42\n", 1.0)])
    assert b"42?" in raw.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_live_panel_fits_the_width_and_shows_the_run(width):
    view, console = live_view(width=width)
    drive(view)
    text = frame(view, console)
    assert max(cell_len(line) for line in text.splitlines()) <= min(width - 2, 100)
    for expected in ("step 2/80", "ETA 6m", "0.41", "0.109 → 0.570", "13.2 tokens, 2% cut off", "1,204", "2,310"):
        assert expected in text
    for expected in ("rollout", "train", "publish", "sums", "notes: 1", "completions of step 1", "Let me see.⏎⏎42"):
        assert expected in text
    assert "What is [bold]17 + 25?" in text
    assert "…" in text


@pytest.mark.parametrize("is_evaluated", [False, True])
@pytest.mark.parametrize("width", [78, 80, 120])
@pytest.mark.parametrize(
    ("of_each", "text"),
    [
        ([12812, 12798, 12805, 12799], "12812, 12798, 12805, 12799 tok/s"),
        ([20000] * 487 + [11207] + [20000] * 23 + [99889], "512 workers, 11,207 (rank 487) to 99,889 (rank 511) tok/s"),
    ],
)
def test_live_panel_shows_the_workers_on_one_line_below_the_metrics(of_each, text, width, is_evaluated):
    view, console = live_view(width=width)
    if is_evaluated:
        view.evaluation(0, {"eval_reward": 0.109}, "before")
    view.step(1, METRICS | speeds(of_each), PHASES)
    lines = frame(view, console).splitlines()
    assert any(line.startswith(f"│ workers     {text} ") for line in lines)
    assert any(line.startswith("│ length      13.2 tokens") for line in lines), "both columns line up"


def test_live_panel_of_one_worker_has_no_row_for_workers():
    view, console = live_view()
    view.step(1, METRICS | speeds([602.4, 601.9]), PHASES)
    of_two = frame(view, console).splitlines()
    view.step(1, METRICS, PHASES)
    of_one = frame(view, console)
    assert "workers" not in of_one
    assert len(of_one.splitlines()) == len(of_two) - 1


@pytest.mark.parametrize("num_workers", [0, 8])
@pytest.mark.parametrize("height", [12, 24, 40])
def test_live_panel_fits_the_height(height, num_workers):
    view, console = live_view(height=height)
    drive(view)
    guards = {"guards/alarms": 1.0, "grad_norm": 0.1}
    view.step(3, METRICS | guards | speeds([800.0] * num_workers), PHASES)
    view.completions(2, SAMPLES[1:] * 10)  # of three lines each
    shown = frame(view, console)
    assert len(shown.splitlines()) < max(height, 16 if num_workers else 15)
    assert ("completions of step 2" in shown) == (height >= 24)


def test_live_view_keeps_notes_above_the_panel():
    view, console = live_view()
    with view:
        drive(view)
        view.finish(SUMMARY)
    text = console.export_text()
    assert "note: the gradient norm is 8 times [its] usual size" in text
    assert text.rstrip().endswith("done: 3 steps in 6m10s, evaluation reward 0.109 → 0.860")


def test_a_second_run_is_shown_without_the_first_one():
    """A trainer shows all of its runs in one view."""
    view, console = live_view()
    with view:
        drive(view)
    with view:
        started = frame(view, console)
        view.step(1, METRICS, PHASES)
        shown = frame(view, console)
    assert "step 0/80" in started and "waiting for the first step" in started
    assert "step 1/80" in shown
    for earlier in ("notes", "evaluation", "completions of"):
        assert earlier not in shown


def test_a_run_that_was_finished_before_leaves_its_note_and_no_panel():
    file = io.StringIO()
    console = Console(file=file, width=80, height=30, force_terminal=True)
    with LiveView(max_steps=130, run_name="quickstart", console=console) as view:
        view.note("the run is already finished")
    text = file.getvalue()
    assert "already finished" in text
    assert text.rstrip().endswith("\x1b[2K"), "the panel's last frame is erased"


def test_terminal_gets_the_live_view_and_a_file_plain_lines():
    def kind(console: Console | None) -> type:
        return type(make_view(max_steps=3, run_name="sums", console=console))

    assert kind(Console(force_terminal=True, file=io.StringIO(), _environ={"TERM": "xterm"})) is LiveView
    assert kind(Console(force_terminal=True, file=io.StringIO(), _environ={"TERM": "dumb"})) is PlainView
    assert kind(Console(file=io.StringIO())) is PlainView
    ascii_file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert kind(Console(force_terminal=True, file=ascii_file, _environ={"TERM": "xterm"})) is PlainView


def test_colour_settings_do_not_put_the_live_view_into_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(make_view(max_steps=3, run_name="sums"), PlainView)


CHILD = """
import signal
import time
from rankup.grpo.display.choose import make_view
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for commands in the background
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the panel is drawn: a run's own handler raises nothing there
with make_view(max_steps=3, run_name="sums") as view:
    view.step(1, {"reward": 0.41}, {"train": 1.0})
    print("a reward function prints", flush=True)
    view.stage("waiting for the signal")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    time.sleep(60)
"""


def test_interrupt_in_a_real_terminal_restores_the_cursor():
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONUTF8": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    seen = _read(controller, until=b"waiting for the signal")
    assert seen.rfind(b"\x1b[?25l") > seen.rfind(b"\x1b[?25h"), "the live view hides the cursor"
    assert b"a reward function prints" in seen
    child.send_signal(2)
    rest = _read(controller, until=b"KeyboardInterrupt")
    assert child.wait(timeout=20) != 0
    os.close(controller)
    assert b"interrupted" in rest
    assert rest.rfind(b"\x1b[?25h") > rest.rfind(b"\x1b[?25l")


def _read(controller: int, *, until: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + 30
    while until not in seen:
        ready, _, _ = select.select([controller], [], [], deadline - time.monotonic())
        assert ready, f"{until!r} did not appear in {seen!r}"
        seen += os.read(controller, 65536)
    return seen


def test_actions_of_the_guards_are_shown() -> None:
    counts = {"guards/alarms": 3.0, "guards/skipped_steps": 1.0, "guards/restores": 1.0}
    view, console = live_view(width=100)
    view.step(31, METRICS | counts | {"guards/learning_rate_factor": 0.25}, PHASES)
    shown = frame(view, console)
    assert "3 alarms, 1 skip, 1 restore" in shown and "x 0.25" in shown


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"learning_rate": 1e-4, "updates": 1.0, "update_skipped": 0.0}, ""),
        ({"learning_rate": 1e-4, "updates": 0.0, "update_skipped": 1.0}, "(update skipped)"),
        ({"learning_rate": 1e-4}, "(no update)"),
    ],
)
@pytest.mark.parametrize("width", [60, 100])
def test_a_step_without_an_update_is_marked(metrics: dict[str, float], text: str, width: int) -> None:
    view, console = live_view(width=width)
    view.step(31, METRICS | metrics, PHASES)
    shown = frame(view, console)
    file = io.StringIO()
    plain_view(file).step(31, METRICS | metrics, PHASES)
    assert text in shown and text in file.getvalue()
    assert ("update" in shown) == ("update" in text)
    view.step(32, METRICS | {"learning_rate": 1e-4, "updates": 1.0}, PHASES)
    assert "(" not in frame(view, console).splitlines()[2], "the mark is of the last step only"


def test_evaluating_is_not_shown_during_the_next_step() -> None:
    view, console = live_view()
    view.stage("evaluating 128 prompts")
    assert "evaluating" in frame(view, console)
    view.evaluation(0, {"eval_reward": 0.1}, "before")
    assert "evaluating" not in frame(view, console) and "training" in frame(view, console)


def test_both_views_end_with_the_output_folder_and_the_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1450.0])
    file = io.StringIO()
    console = Console(file=file)
    view = PlainView(max_steps=3, run_name="sums", console=console, output_dir=Path("runs/sums"))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    view.__enter__()
    view.finish(SUMMARY)
    assert file.getvalue().splitlines()[-2:] == [
        "done: 3 steps in 6m10s (7m30s with start-up), evaluation reward 0.109 → 0.860",
        "output: runs/sums",
    ]
    monkeypatch.undo()
    live, recorded = live_view()
    live._output_dir = Path("runs/sums")
    with live:
        live.finish(SUMMARY)
    assert recorded.export_text().rstrip().endswith("\noutput: runs/sums")


ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 741, "b": 295}}}
EPISODE = [
    {"role": "assistant", "content": "I add [bold]them.", "tool_calls": [ADD]},
    {"role": "tool", "name": "add", "content": "1036" + " 0" * 200},
    {"role": "assistant", "content": "It is 1036."},
]


def test_an_episode_is_shown_as_a_dialogue_in_plain_lines() -> None:
    file = io.StringIO()
    plain_view(file).completions(1, [SampleRow("What is 741 + 295?", EPISODE, 1.0), SampleRow("Next?", "A text", None)])
    lines = file.getvalue().splitlines()
    assert lines[1:3] == [
        "    reward 1.00  What is 741 + 295?",
        "        assistant  I add [bold]them.  add(a=741, b=295)",
    ]
    assert lines[3].startswith("        add        1036 0 0") and " … " in lines[3] and len(lines[3]) < 190
    assert lines[4:] == ["        assistant  It is 1036.", "    reward -  Next?", "        A text"]


@pytest.mark.parametrize(("height", "lines_of_episode"), [(17, 0), (18, 0), (19, 3), (48, 3)])
def test_a_panel_shows_an_episode_with_its_beginning_and_its_end_or_not_at_all(height: int, lines_of_episode: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=height, _environ={})
    view = LiveView(max_steps=80, run_name="sums", console=console)
    view.step(1, METRICS, PHASES)
    view.completions(1, [SampleRow("What is 741 + 295?", EPISODE, 1.0)] * 9)
    recorded = Console(file=io.StringIO(), force_terminal=True, width=100, height=height, record=True)
    recorded.print(view)
    shown = recorded.export_text()
    assert len(shown.splitlines()) <= height
    assert ("I add [bold]them.  add(a=741, b=295)" in shown) == ("It is 1036." in shown) == bool(lines_of_episode)


def test_a_long_episode_fits_into_the_panel() -> None:
    for height in range(10, 50):
        console = Console(file=io.StringIO(), force_terminal=True, width=100, height=height, _environ={})
        view = LiveView(max_steps=80, run_name="sums", console=console)
        view.step(1, METRICS, PHASES)
        samples = [("Guess!", EPISODE * 20, 0.0), ("Guess!", EPISODE, 0.0), ("Say!", "x" * 400, 0.0)]
        view.completions(1, [SampleRow(*sample) for sample in samples])
        recorded = Console(file=io.StringIO(), force_terminal=True, width=100, height=height, record=True)
        recorded.print(view)
        assert len(recorded.export_text().splitlines()) <= max(height, 15), height
