"""The terminal output of `rankup doctor`; the same as plain text in a pipe.

    shown = show_section("device", findings, console)          # prints each line as soon as it is known
    show_verdict({"device": shown}, 3.2, console)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .findings import Finding, Level

PIPED_WIDTH = 120
NAME_WIDTH, VALUE_WIDTH = 25, 38
WIDE = 110  # columns from which notes have a column of their own
MARKS: dict[Level, tuple[str, str]] = {
    "info": ("", "dim"),
    "ok": ("ok", "green"),
    "warning": ("warn", "yellow"),
    "problem": ("FAIL", "bold red"),
}


def make_console(*, quiet: bool) -> Console:
    """As wide as the terminal, or `PIPED_WIDTH`."""
    return Console(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def show_section(title: str, findings: Iterable[Finding], console: Console) -> list[Finding]:
    """Print a section while its checks run; returns their findings."""
    console.print(title, style="bold")
    shown = []
    for finding in findings:
        console.print(_line(finding, is_wide=console.width >= WIDE))
        shown.append(finding)
    console.print()
    return shown


def _line(finding: Finding, *, is_wide: bool) -> Table:
    mark, style = MARKS[finding.level]
    value, note = Text(finding.value), Text(finding.note, "dim" if finding.level == "ok" else style)
    table = Table.grid(padding=(0, 2))
    table.add_column(width=4)
    table.add_column(width=NAME_WIDTH)
    table.add_column(width=VALUE_WIDTH if is_wide and finding.note else None, overflow="fold")
    table.add_column(overflow="fold")
    cells = [value, note] if is_wide else [Text("  ").join([value, note])]
    table.add_row(Text(mark, style), Text(finding.name, "dim"), *cells)
    return table


def show_verdict(found: Mapping[str, Iterable[Finding]], seconds: float, console: Console) -> None:
    """Print whether runs work on this machine."""
    levels = [finding.level for findings in found.values() for finding in findings]
    problems, warnings = _count(levels, "problem"), _count(levels, "warning")
    if "problem" in levels:
        console.print(f"{problems}, {warnings}: runs will fail on this machine ({seconds:.0f} s)", style="bold red")
    else:
        console.print(f"no problems found, {warnings} ({seconds:.0f} s)", style="bold green")


def _count(levels: Sequence[Level], level: Level) -> str:
    count = levels.count(level)
    return f"{count or 'no'} {level}{'' if count == 1 else 's'}"
