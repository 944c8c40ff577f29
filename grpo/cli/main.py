"""The command `rankup`: train, eval, export, check, doctor, plan, new, reward."""

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
from ..run.records import CONFIG_FILE
from .doctor.doctor import add_doctor_command
from .export.export import add_export_command
from .plan.plan import add_plan_command
from .reward import add_reward_commands

if TYPE_CHECKING:
    from ..trainer import GRPOTrainer

EXAMPLES = """examples:
  rankup train configs/quickstart.yaml                            learn to add, in minutes, on two CPU cores
  rankup train run.yaml optim.max_steps=200 lora.rank=128 seed=1  a run file and overrides
  rankup train run.yaml data.train=rows.jsonl rewards.functions=reward.py:score
  rankup train run.yaml --resume                                  go on from the newest checkpoint
  rankup eval runs/quickstart                                     the trained adapter on the evaluation data, greedy
  rankup eval configs/quickstart.yaml                             the base model on the same
  rankup export runs/quickstart --merge                           a plain transformers model, to share or to serve
  rankup check configs/quickstart.yaml                            prove that vLLM samples from what is trained
  rankup doctor                                                   what is here, and whether kernels and vLLM are in order
  rankup plan Qwen/Qwen2.5-7B --vram 80                           an adapter and a memory budget, with the reasons
  rankup new reward short_answers                                 a reward function to begin with, and its test
  rankup reward short_answers.py:short_answers --data runs/sums   try a reward on the completions of a run
"""

INTERRUPTED = 130  # what shells expect after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for an error of the user's, 130 after Ctrl-C.

    Raises:
        RunInterrupted: a signal ended a run; a SystemExit, with status 0 where the run is saved.
    """
    options = parse(arguments)
    from ..common.quiet import quiet_loggers

    quiet_loggers()
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # `explain` knows which ones a user can mend; all others go on
        text = explain(error)
        if text is None or options.traceback:
            raise
        print("\n".join([f"rankup: error: {text}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; overrides may stand before and after options, which argparse alone takes in one place only."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def make_parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    parser = argparse.ArgumentParser(
        prog="rankup",
        description="GRPO with high-rank LoRA: the trainer and vLLM on one device, one copy of the adapter.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text, what in (
        ("train", train, "train an adapter by a run file", "a run file (YAML)"),
        (
            "eval",
            evaluate,
            "greedy reward on the evaluation data",
            "a run folder (its adapter) or a run file (the base model)",
        ),
        ("check", check, "prove that trainer and vLLM compute the same, projection by projection", "a run file (YAML)"),
    ):
        command = commands.add_parser(
            name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("file", type=Path, help=what)
        command.add_argument("overrides", nargs="*", metavar="section.field=value", help="what to set differently")
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        command.set_defaults(command=function)
        if function is train:
            _add_resume_options(command)
    add_doctor_command(commands)
    add_export_command(commands)
    add_plan_command(commands)
    add_reward_commands(commands)
    return parser


def _add_resume_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run's newest whole checkpoint, to the bit as if nothing had happened; without any, start",
    )
    command.add_argument(
        "--allow-changes",
        action="store_true",
        help="with --resume: go on although configuration, data or reward functions have changed",
    )


def train(options: argparse.Namespace) -> int:
    """`rankup train FILE [section.field=value ...] [--resume]`"""
    trainer = _trainer(load_config(options.file, options.overrides))
    allowed = ["--allow-changes"] if options.allow_changes else []
    words = ["rankup", "train", str(options.file), *options.overrides, "--resume", *allowed]
    to_go_on = f"to go on: {shlex.join(words)}"
    try:
        trainer.train(resume_from_checkpoint=options.resume, allow_changes=options.allow_changes)
    except RunInterrupted as interruption:
        if interruption.code == 0:
            print(to_go_on)
        raise
    except Exception as error:  # it goes on; said beside it is what a user will want next
        if trainer.can_resume:
            error.add_note(to_go_on)
        raise
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """`rankup eval RUN|FILE [section.field=value ...]`"""
    run_or_file: Path = options.file
    adapter = run_or_file / "adapter" if run_or_file.is_dir() else None
    config_file = run_or_file / CONFIG_FILE if adapter else run_or_file
    if adapter is not None and not (adapter / "adapter_model.safetensors").is_file():  # before an engine is started for it
        raise ValueError(f"no adapter in {adapter}: {run_or_file} is not the folder of a run, or the run saved none")
    trainer = _trainer(load_config(config_file, options.overrides))
    reward = trainer.evaluate(adapter=adapter)
    count = len(trainer.setup.eval_prompts or ())
    print(f"{adapter or trainer.config.model.name}: reward {reward:.4f} on {count} prompts, greedy")
    return 0


def check(options: argparse.Namespace) -> int:
    """`rankup check FILE [section.field=value ...]`"""
    from .check import check_slots

    return check_slots(load_config(options.file, options.overrides))


def _trainer(config: GRPOConfig) -> GRPOTrainer:
    from ..trainer import GRPOTrainer

    return GRPOTrainer(args=config)
