"""The command `rankup doctor`: installed versions, the code paths of a run, and tests of kernels and vLLM.

    rankup doctor             # exit status 0 if runs work on this machine, 1 if there is a problem
    rankup doctor --json      # the same as one JSON object

No engine is started and the network is not used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

from ...common.quiet import quiet_stderr
from ..command import add_command

if TYPE_CHECKING:
    from .findings import Check, Finding

EXAMPLES = """examples:
  rankup doctor                  device, versions, code paths, a self-test of the kernels, requirements of vLLM's engine
  rankup doctor --json           the same as one JSON object
  rankup doctor --traceback      with the traceback of a check that fails
"""

# Titles of sections in a terminal, if they are not the names in JSON.
TITLES = {
    "paths": "code paths that a run will use",
    "self-test": "self-test of the kernels",
    "engine": "vLLM and its environment",
}


def add_doctor_command(commands: Any) -> None:
    """Add `doctor` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "show installed versions and the code paths of a run; test kernels and vLLM"
    parser = add_command(commands, "doctor", text, examples=EXAMPLES, run=doctor)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def doctor(options: argparse.Namespace) -> int:
    """`rankup doctor [--json]`; returns the exit status, 1 if there is a problem."""
    from .findings import make_console, run_checks, show_section, show_verdict

    started, console = time.perf_counter(), make_console(quiet=options.json)
    found: dict[str, list[Finding]] = {}
    for name, checks in sections():
        findings = run_checks(checks, show_tracebacks=options.traceback)
        found[name] = show_section(TITLES.get(name, name), findings, console)
    seconds = time.perf_counter() - started
    is_healthy = show_verdict(chain.from_iterable(found.values()), seconds, console)
    if options.json:
        report = {"healthy": is_healthy, "seconds": round(seconds, 1), "sections": found}
        print(json.dumps(report, indent=2, default=dataclasses.asdict))
    return 0 if is_healthy else 1


def sections() -> Iterator[tuple[str, Mapping[str, Check]]]:
    """Name and checks of each section; only `versions` if torch does not import, since all other checks use it."""
    from . import versions

    try:
        with quiet_stderr():
            from . import checks, device
    except (ImportError, OSError) as error:
        yield "versions", {**versions.CHECKS, "imports": partial(_raise, error)}
        return
    yield "device", device.CHECKS
    yield "versions", versions.CHECKS
    yield from checks.SECTIONS.items()


def _raise(error: Exception) -> NoReturn:
    raise error
