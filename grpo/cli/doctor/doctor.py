"""The command `rankup doctor`: what is here, which ways a run will take and why, and whether kernels and vLLM are in order.

    rankup doctor             # 0 if a run can be made here, 1 if something that it needs is broken
    rankup doctor --json      # the same as one JSON object

What is looked at is in `doctor_<section>.py`; the kernels are tried by `doctor_compare.py`, what is printed is in
`doctor_view.py`. No engine is started and no network is asked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .findings import Check, Finding

EXAMPLES = """examples:
  rankup doctor                  device, versions, paths, a self-test of the kernels, and what an engine needs
  rankup doctor --json           the same as one JSON object
  rankup doctor --traceback      where a check that fails came from, too
"""


def add_doctor_command(commands: Any) -> None:
    """Add `doctor` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "say what is here, which ways a run will take, and whether kernels and vLLM are in order"
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor", help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(command=doctor)


def doctor(options: argparse.Namespace) -> int:
    """`rankup doctor [--json]`; returns the exit status, 1 where there is a problem."""
    started = time.perf_counter()
    sections: dict[str, list[Finding]] = {}
    if options.json:
        sections = {title: list(findings) for title, findings in examined(show_tracebacks=options.traceback)}
        print(json.dumps(as_json(sections, time.perf_counter() - started), indent=2))
    else:
        from .view import show_section, show_verdict

        for title, findings in examined(show_tracebacks=options.traceback):
            sections[title] = show_section(title, findings)
        show_verdict(sections, time.perf_counter() - started)
    return 1 if problems(sections) else 0


def examined(*, show_tracebacks: bool = False) -> Iterator[tuple[str, Iterable[Finding]]]:
    """Each section's title and findings, which are looked for while they are read."""
    from .findings import examine

    for title, checks in _sections().items():
        yield title, examine(checks(), show_tracebacks=show_tracebacks)


def _sections() -> dict[str, Callable[[], Mapping[str, Check]]]:
    """What is imported for a section is imported when it is reached."""

    def checks_of(section: str) -> Callable[[], Mapping[str, Check]]:
        return lambda: importlib.import_module(f".doctor_{section}", __package__).CHECKS

    sections = {"versions": checks_of("versions")}
    if importlib.util.find_spec("torch") is None:  # it is named among the versions; nothing else can be looked at
        return sections
    return {
        "device": checks_of("device"),
        **sections,
        "paths": checks_of("paths"),
        "self-test": checks_of("kernels"),
        "engine": checks_of("engine"),
    }


def problems(sections: Mapping[str, Iterable[Finding]]) -> list[Finding]:
    """All that breaks runs."""
    return [finding for findings in sections.values() for finding in findings if finding.level == "problem"]


def as_json(sections: Mapping[str, Iterable[Finding]], seconds: float) -> dict[str, Any]:
    """All findings; `healthy` where none is a problem, sizes in bytes."""
    import dataclasses

    return {
        "healthy": not problems(sections),
        "seconds": round(seconds, 1),
        "sections": {title: [dataclasses.asdict(finding) for finding in findings] for title, findings in sections.items()},
    }
