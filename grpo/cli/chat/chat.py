"""The command `rankup chat`: a word with the policy, beside the model that it was trained from.

    rankup chat runs/quickstart                                 # the base model and the trained policy answer side by side
    rankup chat runs/quickstart --message "What is 12 + 30?"    # prints the answers and ends
    rankup chat smollm2-135m-instruct                           # a model alone
    rankup chat runs/quickstart/export/adapter                  # an adapter in PEFT's format, and its base model
    echo "What is 12 + 30?" | rankup chat runs/quickstart       # a message on each line

One engine samples both in the same steps. Lines that begin with `/` are commands, in `--message` and in pipes too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..command import add_command

if TYPE_CHECKING:
    from .screen import Screen
    from .session import ChatSession
    from .target import Target

EXAMPLES = """examples:
  rankup chat runs/quickstart                                 base model and trained policy answer side by side
  rankup chat runs/quickstart --message "What is 12 + 30?"    print the answers and end; may be repeated
  rankup chat runs/quickstart --message "/temperature 0" --message "/checkpoint best" --message "What is 12 + 30?"
  rankup chat runs/quickstart/checkpoints/step_000050         begin with a checkpoint; /checkpoint switches
  rankup chat runs/quickstart rollout.engine=torch            without vLLM; overrides are those of other commands
  rankup chat path/to/adapter                                 an adapter in PEFT's format, and its base model
  rankup chat Qwen/Qwen2.5-0.5B-Instruct                      a model alone
"""


def add_chat_command(commands: Any) -> None:
    """Add `chat` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "talk to the base model and the trained policy, side by side"
    parser = add_command(commands, "chat", text, examples=EXAMPLES, run=chat)
    add = parser.add_argument
    add("target", metavar="RUN|MODEL|ADAPTER", help="a run folder, a checkpoint of one, a model, or the folder of an adapter")
    add("overrides", nargs="*", metavar="section.field=value", help="override a setting")
    add("--message", action="append", metavar="TEXT", help="a message or a command; prints the answers and ends")
    add("--context", type=int, metavar="N", help="tokens that the engine has room for (default: 4096, if the model has)")


def chat(options: argparse.Namespace) -> int:
    """`rankup chat RUN|MODEL|ADAPTER [section.field=value ...] [--message TEXT ...] [--context N]`"""
    from ...common.log import log_to
    from .screen import make_screen
    from .session import open_chat
    from .target import find_target

    if options.context is not None and options.context < 2:
        raise ValueError(f"--context: must be at least 2 (got {options.context})")
    screen = make_screen()
    is_typed = options.message is None and sys.stdin.isatty() and sys.stdout.isatty()
    with log_to(screen.note):
        target = find_target(options.target, options.overrides, context=options.context)
        screen.note(f"{_start_text(target)} ...")
        with open_chat(target) as session:
            for line in greeting(session, is_typed=is_typed):
                screen.note(line)
            talk(session, screen, options.message, is_typed=is_typed, stops_at_error=not is_typed or options.traceback)
    return 0


def talk(session: ChatSession, screen: Screen, messages: list[str] | None, *, is_typed: bool, stops_at_error: bool) -> None:
    """Run commands and show answers until the lines end.

    messages: instead of lines that are typed, or read from standard input.

    Raises:
        ValueError: with `stops_at_error`, what could not be done.
        EngineError: the engine failed.
        KeyboardInterrupt: Ctrl-C, where nobody types.
    """
    from .commands import Commands, QuitChat, as_message, is_command
    from .stopping import Stopped

    commands = Commands(session)
    for line in _lines(messages, commands.names, is_typed=is_typed):
        if not line.strip():
            continue
        try:
            if not is_typed:
                screen.asked(line)
            if is_command(line):
                screen.note(commands.run(line))
            else:
                _answer(session, screen, as_message(line))
        except QuitChat:
            return
        except Stopped:
            if not is_typed:
                raise KeyboardInterrupt from None
        except ValueError as error:
            if stops_at_error:
                raise
            screen.error(str(error))


def greeting(session: ChatSession, *, is_typed: bool) -> Iterator[str]:
    """What a chat begins with."""
    target, settings = session.target, session.settings
    model = target.config.model.name
    who = model if target.adapters is None else f"{model}, base and trained ({session.checkpoint}) side by side"
    tools = f", tools: {', '.join(session.tools)}" if session.tools else ""
    yield f"{who}; temperature {settings.temperature:g}, answers of at most {settings.max_tokens} tokens{tools}"
    if target.text_reason is not None:
        yield f"{target.text_reason}: each message is a prompt of plain text, without those before it"
    if is_typed:
        yield "/help lists the commands, Ctrl-D leaves"


def _answer(session: ChatSession, screen: Screen, message: str) -> None:
    with screen.answering(session) as watch:
        exchange = session.ask(message, watch)
    screen.show(session, exchange)


def _lines(messages: list[str] | None, words: list[str], *, is_typed: bool) -> Iterator[str]:
    from .lines import piped_lines, typed_lines

    if messages is not None:
        yield from messages
    else:
        yield from typed_lines(words) if is_typed else piped_lines(sys.stdin)


def _start_text(target: Target) -> str:
    import torch

    from ...sessions import start_text

    rollout = target.config.rollout
    compiles = torch.cuda.is_available() and not rollout.enforce_eager
    return start_text(starts_vllm=rollout.engine == "vllm", compiles=compiles)
