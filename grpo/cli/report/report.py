"""The command `rankup report`: one HTML file with curves, completions and configuration of one or several runs.

    rankup report runs/quickstart                           # writes runs/quickstart/report.html
    rankup report runs/a runs/b --output both.html          # curves over each other, configurations compared
    rankup report runs/quickstart --serve                   # live while the run goes on, on this machine only

The file loads nothing and needs no server. `runs.py` reads run folders, `completions.py` packs completions, `data.py` keeps the
file small, `page/` is the page, `serve.py` the server.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.files import atomic_write
from ...common.log import log_to
from ..command import add_command
from .runs import RunFolder

EXAMPLES = """examples:
  rankup report runs/quickstart                        writes runs/quickstart/report.html: one file, opens from disk
  rankup report runs/quickstart --open                 and opens it in a browser
  rankup report runs/a runs/b --output both.html       two runs: curves over each other, differences of configuration
  rankup report runs/quickstart --serve                live while the run goes on; prints the address
  rankup report runs/quickstart --max-mb 200           with all completions of a long run
"""
CODE_BYTES = 200_000  # of the page without data


def add_report_command(commands: Any) -> None:
    """Add `report` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "a page with curves, completions and configuration of runs: one HTML file, or live"
    parser = add_command(commands, "report", text, examples=EXAMPLES, run=report)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the HTML file (default RUN/report.html, of the first run)")
    size = "size of the file; what exceeds it is left out, and the page says what (default 10)"
    parser.add_argument("--max-mb", type=float, default=10.0, metavar="MB", help=size)
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--serve", action="store_true", help="serve the page on this machine (127.0.0.1), live, instead")
    parser.add_argument("--port", type=int, metavar="N", help="with --serve: the port (default: a free one)")


def report(options: argparse.Namespace) -> int:
    """`rankup report RUN [RUN ...] [--output FILE | --serve [--port N]]`"""
    if options.serve and options.output:
        raise ValueError("--serve writes no file: leave out --output, or --serve")
    if options.port is not None and not options.serve:
        raise ValueError("--port is for --serve")
    if len({folder.resolve() for folder in options.runs}) < len(options.runs):
        raise ValueError("a run folder is given twice")
    runs = [RunFolder(folder) for folder in options.runs]
    if options.serve:
        from .serve import serve

        return serve(runs, port=options.port or 0, is_opened=options.open)
    output = options.output or options.runs[0] / "report.html"
    with log_to(lambda text: print(f"rankup: {text}", file=sys.stderr)):
        size, lines = write_report(runs, output, max_bytes=round(options.max_mb * 1e6))
    print("\n".join([f"{output}: {size / 1e6:.1f} MB", *lines]))
    if options.open:
        webbrowser.open(output.resolve().as_uri())
    return 0


def write_report(runs: Sequence[RunFolder], output: Path, *, max_bytes: int) -> tuple[int, list[str]]:
    """Write the page of these runs; returns its size in bytes, and lines about what it has and lacks.

    Raises:
        ValueError: `max_bytes` has no room for the page without completions, or a line of the metrics is no JSON.
    """
    from .data import compress, report_data
    from .page import render_page

    index, parts = report_data(runs, limit=max_bytes - CODE_BYTES)
    html = render_page(" and ".join(run["name"] for run in index["runs"]), compress(index), parts).encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, html)
    return len(html), [line for run in index["runs"] for line in _about(run)]


def _about(run: dict[str, Any]) -> list[str]:
    kept, saved = (sum(step[name] for step in run["steps"]) for name in ("kept", "completions"))
    lines = [f"{run['name']}: {run['headline']['steps']} steps, {kept} of {saved} saved completions"]
    if kept < saved:
        lines[0] += " (--max-mb raises the size)"
    return [*lines, *([f"{run['name']}: {run['no_tokens']}"] if run["no_tokens"] and saved else [])]
