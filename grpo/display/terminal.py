"""The output of a run: a live view in a terminal, plain lines everywhere else.

Text from a model or a data set is shown on one line, shortened, and never interpreted as markup or terminal control. Leaving
the `with` block restores the terminal, also after Ctrl-C.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from .view import Pace, SampleRow, View
from .view_text import (
    MOST_MESSAGES,
    MOST_OF_A_NAME,
    Prompt,
    When,
    as_number,
    decimal,
    dialogue,
    duration,
    evaluation_text,
    guards_text,
    harmless,
    name_width,
    no_update_text,
    one_line,
    phases_of,
    seconds_text,
    shorten,
    sparkline,
    step_seconds,
    summary_text,
    whole,
    workers_text,
)

LABEL_WIDTH = 10  # of "evaluation", the longest label, so that rows below the metrics are aligned with them


class _TerminalView(View):
    """The settings of both views, and the clock."""

    def __init__(self, *, max_steps: int, run_name: str, console: Console, output_dir: Path | None = None) -> None:
        self._max_steps = max_steps
        self._run_name = run_name
        self._output_dir = output_dir
        self._console = console
        self._pace = Pace(max_steps)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._pace = Pace(self._max_steps)  # of a trainer's second run too
        self._started = time.monotonic()
        return self

    def _summary_text(self, summary: Mapping[str, Any]) -> str:
        return summary_text(summary, wall_seconds=time.monotonic() - self._started, output_dir=self._output_dir)


class PlainView(_TerminalView):
    """One line per step, for logs and pipes."""

    def stage(self, text: str) -> None:
        self._print(f"{text} ...")

    def note(self, text: str) -> None:
        self._print(f"note: {harmless(text)}")

    def resumed(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._print(f"resuming after step {step}")

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None:
        self._pace.step(step, step_seconds(seconds_by_phase))
        parts = [
            f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}",
            f"reward {decimal(metrics.get('reward'))}",
            f"length {decimal(metrics.get('completions/mean_length'), 1)}",
        ]
        if (rate := metrics.get("tokens_per_second/rollout")) is not None:
            workers = workers_text(metrics)
            parts.append(f"{whole(rate)} tok/s rollout" + (f": {workers}" if workers else ""))
        phases = " ".join(f"{name} {seconds_text(seconds)}" for name, seconds in phases_of(seconds_by_phase).items())
        parts.append(f"{seconds_text(step_seconds(seconds_by_phase))} s ({phases})")
        parts.append(f"ETA {duration(self._pace.left())}")
        if text := no_update_text(metrics):
            parts.append(text)
        self._print("  ".join(parts))

    def completions(self, step: int, rows: Sequence[SampleRow]) -> None:
        self._print(f"completions of step {step}")
        for row in rows:
            self._print(f"    reward {decimal(row.reward)}  {shorten(one_line(row.prompt), 160)}")
            if isinstance(row.completion, str):
                self._print(f"        {shorten(one_line(row.completion), 320)}")
                continue
            lines = dialogue(row.completion)
            for speaker, text in lines:
                self._print(f"        {shorten(speaker, MOST_OF_A_NAME):<{name_width(lines)}}  {shorten(text, 160)}".rstrip())

    def evaluation(self, step: int, metrics: Mapping[str, float], when: When) -> None:
        self._print(evaluation_text(step, metrics, when))

    def finish(self, summary: Mapping[str, Any]) -> None:
        for line in self._summary_text(summary).splitlines():
            self._print(line)

    def __enter__(self) -> Self:
        if self._run_name:
            self._print(f"run {self._run_name}: {self._max_steps} steps")
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._console.file.flush()

    def _print(self, line: str) -> None:
        encoding, file = self._console.encoding, self._console.file
        try:  # a completion in Greek must not end a run whose log is in ASCII
            file.write(line.encode(encoding, "replace").decode(encoding) + "\n")
            file.flush()
        except OSError:  # the reader has exited, as after Ctrl-C with `| tee log`: discard output, so that the run continues
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class LiveView(_TerminalView):
    """A panel that is redrawn in place; notes and evaluations are printed above it and stay in the scrollback.

    A thread of rich redraws it. Everything that it reads is replaced in one assignment, never modified in place."""

    def __init__(self, *, max_steps: int, run_name: str, console: Console, output_dir: Path | None = None) -> None:
        super().__init__(max_steps=max_steps, run_name=run_name, console=console, output_dir=output_dir)
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(self, console=console, refresh_per_second=4, redirect_stderr=True, redirect_stdout=True)
        self._forget_run()

    def _forget_run(self) -> None:
        """What an earlier run of the same trainer has shown."""
        self._stage = "starting"
        self._rewards: list[float] = []
        self._evaluations: list[float] = []
        self._num_notes = 0
        self._note_line = ""
        self._last_step: tuple[Mapping[str, float], Mapping[str, float]] | None = None
        self._workers = ""
        self._tables: RenderableType = Text("waiting for the first step", style="dim")
        self._samples: RenderableType | None = None

    def stage(self, text: str) -> None:
        self._stage = text
        if self._live.is_started:
            self._live.refresh()
        else:
            self._console.print(Text(f"{text} ...", style="dim"))

    def note(self, text: str) -> None:
        self._num_notes += 1
        self._note_line = f"notes: {self._num_notes}, the last at step {self._pace.steps_done}"
        self._console.print(Text(f"note: {harmless(text)}", style="yellow"))

    def resumed(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._pace.steps_done = step
        self._rewards = [as_number(row["reward"]) for row in rows if "reward" in row]
        self._evaluations = [as_number(row["eval_reward"]) for row in rows if "eval_reward" in row]
        self._console.print(Text(f"resuming after step {step}", style="cyan"))

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None:
        self._pace.step(step, step_seconds(seconds_by_phase))
        self._stage = "training"
        self._rewards.append(as_number(metrics.get("reward")))
        self._last_step = (metrics, seconds_by_phase)
        self._workers = workers_text(metrics)
        self._build_tables()
        self._live.refresh()

    def completions(self, step: int, rows: Sequence[SampleRow]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(justify="right", width=6, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("", Text(f"completions of step {step}", style="dim"))
        # The rest of the panel has 14 lines, 15 with the workers' row.
        lines_left = self._console.height - 15 - bool(self._workers)
        num_shown = 0
        for row in rows:
            shown = _sample_lines(row.completion, lines_left - 1)
            height = 3 if isinstance(row.completion, str) else 1 + len(shown)  # a text may wrap once
            lines_left -= height
            if lines_left < 0 or not shown:
                break
            num_shown += 1
            style = "dim" if row.reward is None else "bold green" if row.reward > 0 else "bold red"
            grid.add_row(
                Text(decimal(row.reward), style=style),
                Text(shorten(one_line(row.prompt), 66), style="dim", no_wrap=True, overflow="ellipsis"),
            )
            for line in shown:
                grid.add_row("", line)
        self._samples = grid if num_shown else None
        self._live.refresh()

    def evaluation(self, step: int, metrics: Mapping[str, float], when: When) -> None:
        self._evaluations.append(as_number(metrics["eval_reward"]))
        self._stage = "finishing" if when == "after" else "training"
        self._build_tables()
        self._console.print(Text(evaluation_text(step, metrics, when), style="cyan"))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._stage = "stopped" if summary.get("interrupted") else "done"
        self._live.stop()
        self._console.print(Text(self._summary_text(summary), style="bold"))

    def __enter__(self) -> Self:
        self._forget_run()
        self._live.start()
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._stage = "interrupted" if issubclass(kind, KeyboardInterrupt | SystemExit) else "stopped by an error"
        elif self._stage == "starting":  # the run was finished before: nothing was shown
            self._live.transient = True
        self._live.stop()

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._header(), Text(), self._tables]
        if self._note_line:
            parts.append(Text(self._note_line, style="yellow"))
        if self._samples is not None:
            parts += [Text(), self._samples]
        title = Text.assemble(" rankup ", (f"{one_line(self._run_name)} ", "bold"), style="not dim")
        panel = Panel(Group(*parts), title=title, title_align="left", border_style="dim")
        # Two columns remain free for the terminal's echo of Ctrl-C: if it wrapped, the last frame would be one line off.
        return Constrain(panel, width=min(100, self._console.width - 2))

    def _header(self) -> RenderableType:
        """The part that changes between steps: current activity, progress, elapsed time and ETA."""
        self._spinner.update(text=Text(self._stage))
        elapsed = duration(time.monotonic() - self._started)
        times = Text.assemble(("elapsed ", "dim"), elapsed, ("   ETA ", "dim"), duration(self._pace.left()))
        steps_done = self._pace.steps_done
        bar = ProgressBar(total=self._max_steps, completed=steps_done, complete_style="cyan", finished_style="green")
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        no_update = no_update_text(self._last_step[0]) if self._last_step else ""
        step = Text.assemble("step ", (f"{steps_done}/{self._max_steps}", "bold"), (f" {no_update}".rstrip(), "yellow"))
        grid.add_row(step, bar, times)
        return Group(self._spinner if self._live.is_started else Text(self._stage), grid)

    def _build_tables(self) -> None:
        if self._last_step is None:
            return
        metrics, seconds_by_phase = self._last_step
        tables = [self._metric_table(metrics), _phase_table(metrics, seconds_by_phase)]
        side_by_side = Table.grid(padding=(0, 4))
        side_by_side.add_row(*tables)
        both = side_by_side if self._console.width >= 78 else Group(*tables)
        self._tables = Group(both, _workers_row(self._workers)) if self._workers else both

    def _metric_table(self, metrics: Mapping[str, float]) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, min_width=LABEL_WIDTH if self._workers else None)
        grid.add_column(no_wrap=True, width=27)
        trend = sparkline(self._rewards, width=20)
        grid.add_row("reward", Text.assemble((decimal(self._rewards[-1]), "bold"), "  ", (trend, "cyan")))
        if self._evaluations:
            first_and_last = self._evaluations[:1] + self._evaluations[1:][-1:]
            grid.add_row("evaluation", " → ".join(decimal(reward, 3) for reward in first_and_last))
        clipped = metrics.get("completions/clipped_ratio")
        length = decimal(metrics.get("completions/mean_length"), 1) + " tokens"
        grid.add_row("length", length + (f", {clipped:.0%} cut off" if clipped else ""))
        for label, name in (("entropy", "entropy"), ("grad norm", "grad_norm")):
            if name in metrics:
                grid.add_row(label, decimal(metrics[name], 3))
        if guards := guards_text(metrics):
            grid.add_row("guards", Text(guards, style="yellow"))
        if (factor := metrics.get("guards/learning_rate_factor", 1.0)) != 1.0:
            grid.add_row("lr factor", Text(f"x {factor:g}", style="yellow"))
        return grid


def _sample_lines(completion: Prompt, most: int) -> list[Text]:
    """A text, or the messages of an episode, one line each; none if there is no room for the first and the last."""
    if isinstance(completion, str):
        return [Text(shorten(one_line(completion), 132))]
    lines = dialogue(completion, most=min(most, MOST_MESSAGES)) if most >= min(3, len(completion)) else []
    width = name_width(lines)
    return [
        Text.assemble(
            (f"{shorten(speaker, MOST_OF_A_NAME):<{width}}  ", "cyan" if speaker == "assistant" else "dim"),
            (shorten(text, 80 - width), "" if speaker == "assistant" else "dim"),
            no_wrap=True,
            overflow="ellipsis",
        )
        for speaker, text in lines
    ]


def _workers_row(text: str) -> Table:
    """A row below both tables, since the text for hundreds of workers does not fit into either."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, width=LABEL_WIDTH)
    grid.add_column()
    grid.add_row("workers", text)
    return grid


def _phase_table(metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("phase", style="dim", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    for name, seconds in phases_of(seconds_by_phase).items():
        rate = metrics.get(f"tokens_per_second/{name}")
        table.add_row(name, seconds_text(seconds), "" if rate is None else whole(rate))
    table.add_row("step", Text(seconds_text(step_seconds(seconds_by_phase)), style="bold"), "")
    return table
