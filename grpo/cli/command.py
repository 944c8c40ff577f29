"""What the subcommands of `rankup` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, text: str, *, examples: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Add a subcommand with `--traceback` to `commands`, the result of `add_subparsers`. `run` returns the exit status."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(command=run)
    return parser
