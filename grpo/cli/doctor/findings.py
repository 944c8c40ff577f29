"""What `rankup doctor` finds, and how checks are run.

    Finding("memory", "23.0 GiB, 21.4 GiB available")
    Finding("vllm", "not installed", "run scripts/install.sh", "problem")
    findings = list(run_checks({"vLLM": check_vllm, "Ray": check_ray}))     # an error in one check does not stop the others
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ...common.errors import first_line
from ...common.quiet import quiet_stderr

Level = Literal["info", "ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    note: the reason, and what to do about a warning or problem.
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


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"
