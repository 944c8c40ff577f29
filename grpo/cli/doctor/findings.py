"""What `rankup doctor` finds, how checks are run, and how their findings are shown.

    Finding("memory", "23.0 GiB, 21.4 GiB available")
    Finding("vllm", "not installed", "run scripts/install.sh", "problem")
    findings = list(run_checks({"vLLM": check_vllm, "Ray": check_ray}))     # an error in one check does not stop the others
    shown = show_section("device", findings, make_console(quiet=False))     # prints each line as soon as it is known
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...common.errors import first_line
from ...common.quiet import quiet_stderr

Level = Literal["info", "ok", "warning", "problem"]

PIPED_WIDTH = 120
NAME_WIDTH, VALUE_WIDTH = 25, 38
WIDE = 110  # terminal width from which notes get a separate column
MARKS: dict[Level, tuple[str, str]] = {
    "info": ("", "dim"),
    "ok": ("ok", "green"),
    "warning": ("warn", "yellow"),
    "problem": ("FAIL", "bold red"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    note: the reason, and the remedy for a warning or problem.
    level: a `problem` makes runs fail, a `warning` does not, `info` is no judgement.
    figures: the numbers behind the value, in the units of their names.
    """

    name: str
    value: str
    note: str = ""
    level: Level = "info"
    figures: Mapping[str, float] = field(default_factory=dict)


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Mapping[str, Check], *, show_tracebacks: bool = False) -> Iterator[Finding]:
    """The findings of all checks, without what libraries print. A check that raises is a problem of that name."""
    for name, check in checks.items():
        findings, trace = [], ""
        with quiet_stderr():
            try:
                findings.extend(check())
            except Exception as error:  # any error is a finding, and the other checks must still run
                reason = first_line(error)
                if not isinstance(error, ValueError):  # a ValueError is written for users
                    reason = f"{type(error).__name__}: {reason} (--traceback shows where)"
                findings.append(Finding(name, "failed", reason, "problem"))
                trace = traceback.format_exc()
        if show_tracebacks:
            sys.stderr.write(trace)
        yield from findings


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
    note = [Text(finding.note, "dim" if finding.level == "ok" else style)] if finding.note else []
    cells = [Text(finding.value), *note]
    if not is_wide:
        cells = [Text(": ").join(cells)]
    table = Table.grid(Column(width=4), Column(width=NAME_WIDTH), padding=(0, 2))
    table.add_column(width=VALUE_WIDTH if len(cells) == 2 else None, overflow="fold")
    table.add_row(Text(mark, style), Text(finding.name, "dim"), *cells)
    return table


def show_verdict(findings: Iterable[Finding], seconds: float, console: Console) -> bool:
    """Print, and return, whether runs work on this machine."""
    counts = Counter(finding.level for finding in findings)
    problems, warnings = (
        f"{counts[level] or 'no'} {level}{'' if counts[level] == 1 else 's'}" for level in ("problem", "warning")
    )
    if counts["problem"]:
        console.print(f"{problems}, {warnings}: runs will fail on this machine ({seconds:.0f} s)", style="bold red")
    else:
        console.print(f"no problems found, {warnings} ({seconds:.0f} s)", style="bold green")
    return not counts["problem"]


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"
