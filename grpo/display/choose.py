"""Which view shows a run.

with make_view(max_steps=80, run_name="quickstart", output_dir=Path("runs/quickstart")) as view:
    ...
"""

import sys
from pathlib import Path

from rich.console import Console

from .notebook import NotebookView
from .terminal import LiveView, PlainView
from .view import View

__all__ = ["View", "make_view", "make_view_without_run"]


def make_view(*, max_steps: int, run_name: str, output_dir: Path | None = None, console: Console | None = None) -> View:
    """An HTML output in a notebook, the live view if standard output (or `console`) is a terminal that can show it, else plain
    lines.

    `output_dir` is shown at the end of the run.
    """
    if console is None:
        if is_notebook():
            return NotebookView(max_steps=max_steps, run_name=run_name, output_dir=output_dir)
        # Only the stream counts: FORCE_COLOR and similar variables must not fill a log file with redrawn panels.
        console = Console(force_terminal=sys.stdout.isatty())
    can_redraw = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    kind = LiveView if can_redraw else PlainView
    return kind(max_steps=max_steps, run_name=run_name, output_dir=output_dir, console=console)


def make_view_without_run(console: Console | None = None) -> View:
    """Plain lines for what happens outside of a run, in a notebook too."""
    return PlainView(max_steps=0, run_name="", console=console or Console(force_terminal=sys.stdout.isatty()))


def is_notebook() -> bool:
    """Whether this process is an IPython kernel (Jupyter, VS Code, Colab), whose front end shows HTML. IPython in a terminal is
    not.

    IPython is not imported: a kernel has done that.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
