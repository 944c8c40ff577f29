"""The command `rankup`: train, eval, compare, chat, report, export, check, doctor, plan, new, reward, trl."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import explain
from ..common.interrupts import RunInterrupted
from ..config import GRPOConfig, load_config
from .command import add_command
from .subcommands import add_subcommands
from .trl.trl import split_words

if TYPE_CHECKING:
    from ..trainer import GRPOTrainer

EXAMPLES = """examples:
  rankup train configs/quickstart.yaml                            learns to add, in minutes, on two CPU cores
  rankup train run.yaml optim.max_steps=200 lora.rank=128 seed=1  a run file and overrides
  rankup train run.yaml data.train=rows.jsonl rewards.functions=reward.py:score
  rankup train run.yaml --resume                                  resume from the newest checkpoint
  rankup eval runs/quickstart                                     the adapter on the evaluation data
  rankup eval runs/quickstart --checkpoint best --samples 8       pass@k of its best checkpoint
  rankup eval configs/quickstart.yaml                             the base model on the same data
  rankup compare runs/a runs/b                                    prompt by prompt, with the interval of the difference
  rankup chat runs/quickstart                                     the base model and the policy answer side by side
  rankup report runs/quickstart                                   curves and completions as one page, opens from disk
  rankup export runs/quickstart --merge                           a plain transformers model to share or serve
  rankup check configs/quickstart.yaml                            check that vLLM and the trainer compute the same
  rankup doctor                                                   installed versions, and whether kernels and vLLM work
  rankup plan Qwen/Qwen2.5-7B --vram 80                           a recommended adapter and a memory budget
  rankup new reward short_answers                                 a template for a reward function, and its test
  rankup reward short_answers.py:short_answers --data runs/sums   try a reward function on a run's completions
  rankup trl train_grpo.py                                        a script written for TRL, unchanged
"""

INTERRUPTED = 130  # the exit status that shells expect after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for a user's error, 130 after Ctrl-C.

    Raises:
        RunInterrupted: a signal ended a run. It is a SystemExit, with status 0 if the run is saved.
    """
    options = parse(arguments)
    if arguments is None:
        del sys.argv[1:]  # a user's functions must not read the arguments of `rankup` as theirs
    from ..common.quiet import quiet_loggers

    quiet_loggers()
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # `explain` knows the errors that a user can fix; all others are raised
        text = explain(error)
        if text is None or options.traceback:
            raise
        print("\n".join([f"rankup: error: {text}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line. Overrides may come before and after options, which argparse itself does not allow."""
    parser = make_parser()
    words, of_script = split_words(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser.parse_known_args(words)
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    if rest:
        options.overrides += rest
    if of_script:
        options.arguments = of_script
    return options


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="rankup",
        description="GRPO with high-rank LoRA: the trainer and vLLM on one device, one copy of the adapter.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text, what in (
        ("train", train, "train an adapter as a run file says", "a run file (YAML)"),
        ("check", check, "check that trainer and vLLM compute the same, projection by projection", "a run file (YAML)"),
    ):
        command = add_command(commands, name, text, examples=EXAMPLES, run=function)
        command.add_argument("file", type=Path, help=what)
        command.add_argument("overrides", nargs="*", metavar="section.field=value", help="override a setting")
        if function is train:
            _add_resume_options(command)
    add_subcommands(commands)
    return parser


def _add_resume_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume",
        action="store_true",
        help="resume from the run's newest complete checkpoint (bit-exact on CPU); start from scratch if there is none",
    )
    command.add_argument(
        "--allow-changes",
        action="store_true",
        help="with --resume: resume even if configuration, data or reward functions have changed",
    )


def train(options: argparse.Namespace) -> int:
    """`rankup train FILE [section.field=value ...] [--resume]`"""
    trainer = _trainer(load_config(options.file, options.overrides))
    allowed = ["--allow-changes"] if options.allow_changes else []
    words = ["rankup", "train", str(options.file), *options.overrides, "--resume", *allowed]
    how_to_resume = f"to resume: {shlex.join(words)}"
    try:
        with trainer:
            trainer.train(options.resume, allow_changes=options.allow_changes)
    except RunInterrupted as interruption:
        if interruption.code == 0:
            print(how_to_resume)
        raise
    except Exception as error:  # raised again, with a note about what the user will want next
        if trainer.can_resume:
            error.add_note(how_to_resume)
        raise
    return 0


def check(options: argparse.Namespace) -> int:
    """`rankup check FILE [section.field=value ...]`"""
    from .check import check_slots

    return check_slots(load_config(options.file, options.overrides))


def _trainer(config: GRPOConfig) -> GRPOTrainer:
    from ..trainer import GRPOTrainer

    return GRPOTrainer(args=config)
