"""What `rankup doctor` finds, and checks that fail one by one.

    Finding(name="memory", value="23.0 GiB, 21.4 free", level="ok")
    Finding(name="vllm", value="not installed", level="problem", note="run scripts/install.sh")
    findings = list(examine({"vLLM": check_vllm, "Ray": check_ray}))      # whatever becomes of one, the others are made
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ...common.quiet import quiet_stderr

Level = Literal["info", "ok", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line.

    `level`: `info` where there is nothing to judge; a `problem` breaks runs, a `warning` does not. `note`: why it is so, and
    with these two what to do. `figures`: numbers behind the value, in the units of their names.
    """

    name: str
    value: str
    level: Level = "info"
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


Check = Callable[[], Iterable[Finding]]


def examine(checks: Mapping[str, Check], *, show_tracebacks: bool = False) -> Iterator[Finding]:
    """Make the checks, each by itself and without what libraries say on the way. One that raises is a problem of its name."""
    for name, check in checks.items():
        found: Iterable[Finding]
        with quiet_stderr():
            try:
                found, failure = list(check()), None
            except Exception as error:  # whatever it is, it is what was looked for, and the other checks are to be made too
                found, failure = [_failed(name, error)], error
        if failure is not None and show_tracebacks:
            traceback.print_exception(failure)
        yield from found


def _failed(name: str, error: Exception) -> Finding:
    reason = (str(error).strip() or "no message").splitlines()[0]
    # A ValueError is written for users.
    note = reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason} (--traceback shows where)"
    return Finding(name=name, value="failed", level="problem", note=note)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"
