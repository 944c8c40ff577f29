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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from ...common.quiet import quiet_stderr

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
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor", help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(command=doctor)


def doctor(options: argparse.Namespace) -> int:
    """`rankup doctor [--json]`; returns the exit status, 1 if there is a problem."""
    from .findings import make_console, run_checks, show_section, show_verdict

    started, console = time.perf_counter(), make_console(quiet=options.json)
    found: dict[str, list[Finding]] = {}
    for name, checks in sections():
        findings = run_checks(checks, show_tracebacks=options.traceback)
        found[name] = show_section(TITLES.get(name, name), findings, console)
    seconds = time.perf_counter() - started
    show_verdict(found, seconds, console)
    if options.json:
        print(json.dumps(as_json(found, seconds), indent=2))
    return 1 if problems(found) else 0


def problems(found: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """The findings that make runs fail."""
    return [finding for findings in found.values() for finding in findings if finding.level == "problem"]


def as_json(found: Mapping[str, Sequence[Finding]], seconds: float) -> dict[str, Any]:
    """All findings by section; sizes in bytes."""
    return {
        "healthy": not problems(found),
        "seconds": round(seconds, 1),
        "sections": {name: [dataclasses.asdict(finding) for finding in findings] for name, findings in found.items()},
    }


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
    yield "paths", checks.PATHS
    yield "self-test", checks.SELF_TEST
    yield "engine", checks.ENGINE


def _raise(error: Exception) -> NoReturn:
    raise error
