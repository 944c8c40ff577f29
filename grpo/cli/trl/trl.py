"""The command `rankup trl`: run a script that imports `trl`, unchanged, with rankup's trainer.

    own, of_script = split_words(["trl", "train.py", "--help"])     # ["trl", "train.py"], ["--help"]

Only `GRPOConfig` and `GRPOTrainer` are replaced; all other names are those of the installed TRL.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ...common.interrupts import RunInterrupted
from ..command import add_command

EXAMPLES = """examples:
  rankup trl train_grpo.py                                a script that imports GRPOConfig and GRPOTrainer from trl
  rankup trl train_grpo.py --config grpo.yaml             everything after the script belongs to it, --help too
  rankup trl --traceback train_grpo.py                    options of rankup come before it
"""

PACKAGE = __name__.partition(".")[0]
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def add_trl_command(commands: Any) -> None:
    """Add `rankup trl`."""
    command = add_command(commands, "trl", "run a script written for TRL with rankup's trainer", examples=EXAMPLES, run=run)
    command.usage = "rankup trl [-h] [--traceback] SCRIPT.py [arguments of the script ...]"
    command.add_argument("script", type=Path, metavar="SCRIPT.py", help="a script that imports trl")
    command.add_argument("arguments", nargs="*", help="the script's: sys.argv[1:]")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the command, and those behind a script, which belong to it whatever they look like."""
    if list(words[:1]) == ["trl"]:
        for index, word in enumerate(words[1:], start=1):
            if not word.startswith("-"):
                return list(words[: index + 1]), list(words[index + 1 :])
    return list(words), []


def run(options: argparse.Namespace) -> int:
    """`rankup trl SCRIPT.py [arguments of the script ...]`"""
    script: Path = options.script
    if not os.path.isfile(script):
        raise FileNotFoundError(f"script not found: {script}")
    try:
        _run_script(script, options.arguments)
    except RunInterrupted as interruption:
        if interruption.code == 0:
            print(f"to resume: set train(resume_from_checkpoint=True) in {script}, and run it again")
        raise
    except Exception as error:  # raised again if rankup raised it: `main` shows it
        if options.traceback or _is_of_rankup(error, script):
            raise
        traceback.print_exception(error.with_traceback(_from_script(error.__traceback__, script)))
        return 1
    return 0


def _run_script(script: Path, arguments: Sequence[str]) -> None:
    from ...trainer import GRPOTrainer
    from .arguments import GRPOConfig
    from .replacing import names_replaced

    with names_replaced({"GRPOConfig": GRPOConfig, "GRPOTrainer": GRPOTrainer}) as version:
        print(f"rankup trl: GRPOConfig and GRPOTrainer are those of rankup, everything else is TRL {version}", flush=True)
        with _interpreter_of(script, arguments):
            runpy.run_path(str(script), run_name="__main__")


@contextmanager
def _interpreter_of(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """`sys.argv` and `sys.path` as `python SCRIPT.py` sets them."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _is_of_rankup(error: BaseException, script: Path) -> bool:
    """Whether rankup raised the error, or a library that it called: not the script, nor other code of the user."""
    start = _from_script(error.__traceback__, script)
    if start is None:
        return not isinstance(error, SyntaxError)
    for frame, _ in reversed(list(traceback.walk_tb(start))):
        if frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
            return True
        if _is_file(frame, script) or not frame.f_code.co_filename.startswith(("<", *LIBRARIES)):
            return False
    return False


def _from_script(trace: TracebackType | None, script: Path) -> TracebackType | None:
    """The traceback from the script's first line on, as Python shows it; None if the script has not started."""
    while trace is not None and not _is_file(trace.tb_frame, script):
        trace = trace.tb_next
    return trace


def _is_file(frame: FrameType, script: Path) -> bool:
    return frame.f_code.co_filename == str(script)
