"""How answers are drawn: beside each other where there is room, and harmless whatever a model writes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rankup.grpo.cli.chat.answers import Answer
from rankup.grpo.cli.chat.screen import LineScreen, TerminalScreen
from rankup.grpo.cli.chat.session import ChatSession, Exchange, Settings

pytestmark = pytest.mark.runs

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 30}}}


def answer(text: str, *, finish_reason: str = "stop", tokens: int = 8, messages: tuple[dict, ...] = ()) -> Answer:
    said = messages or ({"role": "assistant", "content": text},)
    return Answer(text=text, messages=said, finish_reason=finish_reason, num_tokens=tokens)  # type: ignore[arg-type]


def exchange(base: Answer, trained: Answer) -> Exchange:
    settings = Settings(temperature=1.0, top_p=1.0, max_tokens=8)
    return Exchange(message="?", answers={"base": base, "trained": trained}, checkpoint="step 2", settings=settings)


@pytest.fixture
def session(run: Path, chat: Callable[..., ChatSession]) -> ChatSession:
    return chat(run)


def drawn(session: ChatSession, one: Exchange, *, width: int, height: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, no_color=True, highlight=False)
    TerminalScreen(console).show(session, one)
    return [line.rstrip() for line in console.file.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()]  # type: ignore[attr-defined]


def test_a_wide_terminal_has_two_columns(session: ChatSession) -> None:
    lines = drawn(session, exchange(answer("one two " * 12), answer("42")), width=100)
    assert lines[0].split() == ["base", "trained", "(step", "2)"]
    column = lines[0].index("trained")
    assert column == 50 and lines[1].startswith("one two") and lines[1][column:] == "42"
    assert all(len(line) <= 97 for line in lines)


def test_a_narrow_terminal_has_one_below_the_other(session: ChatSession) -> None:
    lines = drawn(session, exchange(answer("one two"), answer("42")), width=60)
    assert [line.split("\x1b")[0] for line in lines if line.startswith(("base", "one", "trained", "42"))] == [
        "base", "one two", "trained (step 2)", "42",
    ]  # fmt: skip


def test_why_an_answer_ends_is_said(session: ChatSession) -> None:
    text = "\n".join(drawn(session, exchange(answer("a", finish_reason="length"), answer("b", tokens=1)), width=60))
    assert "8 tokens, cut off: /max allows more" in text and "1 token" in text and "1 tokens" not in text


def test_calls_and_results_are_a_dialogue(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    messages = (
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    )
    one = exchange(answer("hm"), answer("It is 42.", messages=messages))
    text = "\n".join(drawn(session, one, width=60))
    assert "→ add(a=12, b=30)" in text and "← 42" in text and "It is 42." in text
    LineScreen().show(session, one)
    assert "  assistant: add(a=12, b=30)\n  add: 42\n  It is 42.\n" in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 100])
def test_what_a_model_writes_is_neither_markup_nor_control(session: ChatSession, width: int) -> None:
    lines = drawn(session, exchange(answer("[bold]x[/bold]\x1b[2J\x07"), answer("[/]")), width=width)
    text = "\n".join(lines)
    assert "[bold]x[/bold]·[2J·" in text and "[/]" in text and "\x1b[2J" not in text
