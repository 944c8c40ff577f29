"""What `rankup doctor` prints: a table for each section in a terminal, the same as plain text where output is piped.

    findings = show_section("device", findings)                     # on standard output, each line when it is known
    show_verdict({"device": findings}, seconds=3.2, console=Console(file=buffer, width=100))
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .findings import Finding, Level

PIPED_WIDTH = 120
NAME_WIDTH = 25
VALUE_WIDTH = 38
WIDE = 110  # from here on every note has room beside its value; below, short ones have
MARKS: dict[Level, tuple[str, str]] = {
    "info": ("", ""),
    "ok": ("ok", "green"),
    "warning": ("note", "yellow"),
    "problem": ("FAIL", "bold red"),
}


def console_of_output() -> Console:
    """As wide as the terminal, or `PIPED_WIDTH`."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def show_section(title: str, findings: Iterable[Finding], console: Console | None = None) -> list[Finding]:
    """Print a section while its findings come in; returns them."""
    console = console or console_of_output()
    console.print(title, style="bold")
    shown = []
    for finding in findings:
        console.print(_line(finding, console.width))
        shown.append(finding)
    console.print()
    return shown


def _line(finding: Finding, width: int) -> Table:
    word, style = MARKS[finding.level]
    note = Text(finding.note, style if finding.level in ("warning", "problem") else "dim")
    room = width - NAME_WIDTH - 12
    beside = bool(finding.note) and (width >= WIDE or len(finding.value) + len(finding.note) <= room)
    table = Table.grid(padding=(0, 2))
    table.add_column(width=4)
    table.add_column(width=NAME_WIDTH)
    table.add_column(width=VALUE_WIDTH if width >= WIDE and beside else None, overflow="fold")
    cells = [Text(word, style), Text(finding.name, "dim"), Text(finding.value)]
    if beside:
        table.add_column(overflow="fold")
        table.add_row(*cells, note)
    else:
        table.add_row(*cells)
        if finding.note:
            table.add_row("", "", note)
    return table


def show_verdict(sections: Mapping[str, Sequence[Finding]], seconds: float, console: Console | None = None) -> None:
    """Print whether a run can be made here."""
    console = console or console_of_output()
    levels = [finding.level for findings in sections.values() for finding in findings]
    count, notes = levels.count("problem"), levels.count("warning")
    of_notes = f", {notes} note{'s' if notes != 1 else ''}" if notes else ""
    if count:
        text = Text(f"{count} problem{'s' if count != 1 else ''}{of_notes}: a run will fail here ({seconds:.0f} s)", "bold red")
    else:
        text = Text(f"all is well{of_notes} ({seconds:.0f} s)", "bold green")
    console.print(text)
