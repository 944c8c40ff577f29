"""`rankup chat` in a real terminal: columns, editing, pasting, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from terminals import TMUX, Terminal

pytestmark = [pytest.mark.runs, pytest.mark.slow, pytest.mark.skipif(TMUX is None, reason="tmux is not installed")]

OPTIONS = ("rollout.generation_kwargs.ignore_eos=true", "rollout.max_completion_length=12")
"""Answers are as long as they may be."""
Talk = Callable[..., Terminal]


@pytest.fixture
def talk(run: Path, tmp_path: Path) -> Iterator[Talk]:
    """A function that starts a chat with the run in a terminal of some size, and waits until it can be typed at."""
    with ExitStack() as stack:

        def started(width: int, height: int) -> Terminal:
            command = [Path(sys.executable).with_name("rankup"), "chat", run, *OPTIONS]
            terminal = stack.enter_context(Terminal(command, width=width, height=height, cwd=tmp_path))
            terminal.wait_for("/help lists the commands")
            terminal.wait_until(lambda: is_ready(terminal), "there is no prompt")
            return terminal

        yield started


def is_ready(terminal: Terminal) -> bool:
    """Whether the last line is an empty prompt."""
    lines = [line for line in terminal.screen() if line.strip()]
    return bool(lines) and lines[-1].strip() == ">"


def say(terminal: Terminal, text: str) -> list[str]:
    """Type a line, and look at the screen when it was answered."""
    terminal.type(text, "Enter")
    terminal.wait_for(f"> {text}")
    terminal.wait_until(lambda: is_ready(terminal), f"{text} was not answered")
    return terminal.screen()


def test_a_wide_terminal_shows_both_answers_beside_each_other(talk: Talk) -> None:
    terminal = talk(100, 30)
    assert "temperature 0: greedy" in say(terminal, "/temperature 0")
    lines = say(terminal, "count to 7")
    heading = next(line for line in lines if line.startswith("base"))
    assert heading.split() == ["base", "trained", "(final)"]
    lengths = lines[lines.index("> count to 7") :]
    ends = next(line for line in lengths if line.startswith("12 tokens"))
    assert ends.index("12 tokens", 5) == heading.index("trained")
    assert any("no command /nothing" in line for line in say(terminal, "/nothing"))
    say(terminal, "/checkpoint 2")
    assert any("trained (step 2)" in line for line in say(terminal, "count to 7"))
    terminal.press("C-d")
    terminal.wait_until(lambda: terminal.status is not None, "Ctrl-D does not end it")
    assert terminal.status == 0


def test_a_narrow_terminal_shows_one_answer_below_the_other(talk: Talk) -> None:
    terminal = talk(60, 20)
    lines = say(terminal, "count to 7")
    starts = [line for line in lines if line.startswith(("base", "trained"))]
    assert starts == ["base", "trained (final)"]
    terminal.press("C-c")
    terminal.wait_until(lambda: terminal.status is not None, "Ctrl-C at the prompt does not end it")
    assert terminal.status == 0


def test_lines_are_edited_continued_and_pasted(talk: Talk) -> None:
    terminal = talk(100, 30)
    say(terminal, "/only base")
    terminal.type("/mx 9", "Left", "Left", "Left")
    terminal.type("a", "Enter")
    terminal.wait_for("at most 9 tokens")
    terminal.press("Up")
    terminal.wait_for("> /max 9")
    terminal.press("Up", "Enter")  # the first line, from the history
    terminal.wait_until(lambda: terminal.scrollback().count("only the base side answers") == 2, "there is no history")
    terminal.type("/syst", "Tab")
    terminal.type(" Be brief\\", "Enter")
    terminal.type("and kind.", "Enter")
    terminal.wait_for("new conversation with this system prompt")
    terminal.paste("one\ntwo\nthree")
    terminal.wait_for("three")
    assert not any("tokens" in line for line in terminal.screen()[-3:])  # nothing was sent yet
    terminal.press("Enter")
    terminal.wait_for("9 tokens")
    terminal.wait_until(lambda: is_ready(terminal), "the pasted lines were not answered")
    say(terminal, "/save chat.json")
    (base,) = json.loads((terminal.cwd / "chat.json").read_text())
    assert [message["content"] for message in base["messages"][:2]] == ["Be brief\nand kind.", "one\ntwo\nthree"]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(talk: Talk) -> None:
    terminal = talk(100, 30)
    say(terminal, "/max 480")
    terminal.type("count to 7", "Enter")
    terminal.wait_for("trained (final)")
    terminal.press("C-c")
    terminal.wait_for("stopped: the conversation goes on without this message")
    say(terminal, "/max 5")
    lines = say(terminal, "count to 7")
    assert any(line.startswith("5 tokens") for line in lines)
    say(terminal, "/save chat.json")
    text = (terminal.cwd / "chat.json").read_text()
    assert text.count("count to 7") == 2  # once on each side
