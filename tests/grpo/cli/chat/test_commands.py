"""The commands of a chat: what they change, what they answer, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rankup.grpo.cli.chat.commands import HELP, Commands, QuitChat, as_message, is_command
from rankup.grpo.cli.chat.session import ChatSession

pytestmark = pytest.mark.runs


@pytest.fixture
def session(run: Path, chat: Callable[..., ChatSession]) -> ChatSession:
    return chat(run)


@pytest.fixture
def commands(session: ChatSession) -> Commands:
    return Commands(session)


def test_the_help_has_every_command(commands: Commands) -> None:
    shown = commands.run("/help")
    assert [usage.split()[0] for usage in HELP] == commands.names
    assert all(name in shown for name in commands.names)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/temperature 0", "temperature 0: greedy"),
        ("/temperature", "temperature 1"),
        ("/top_p 0.9", "top_p 0.9"),
        ("/max 5", "at most 5 tokens for an answer"),
        ("/max", "at most 8 tokens for an answer"),
        ("/seed 7", "seed 7"),
        ("/seed", "no seed: other answers each time"),
        ("/only trained", "only the trained side answers; the conversation of the other one stays as it is"),
        ("/only BOTH", "both sides answer"),
        ("/system", "no system prompt"),
        ("/system Be brief.", "new conversation with this system prompt"),
        ("/reset", "new conversation"),
        ("/checkpoint base", "the trained side answers with base"),
    ],
)
def test_a_command_says_what_holds_now(commands: Commands, line: str, shown: str) -> None:
    assert commands.run(line) == shown


def test_settings_reach_the_next_answer(commands: Commands, session: ChatSession) -> None:
    for line in ("/temperature 0.5", "/top_p 0.8", "/max 3", "/seed 11", "/only trained"):
        commands.run(line)
    exchange = session.ask("count to 7")
    assert (exchange.settings.temperature, exchange.settings.top_p, exchange.settings.seed) == (0.5, 0.8, 11)
    assert list(exchange.answers) == ["trained"]
    assert exchange.answers["trained"].num_tokens <= 3


def test_checkpoints_are_listed_with_their_rewards(commands: Commands) -> None:
    base, final, first, *_ = commands.run("/checkpoint").splitlines()
    assert base.startswith("  base") and final.startswith("* final") and "1        checkpoint, reward 0." in first
    assert commands.run("/checkpoint best").startswith("the trained side answers with step ")
    assert "\n* " in commands.run("/checkpoint")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/temprature 1", "no command /temprature: /help lists them"),
        ("/temperature warm", "temperature: must be a number"),
        ("/temperature -1", "temperature: must be at least 0"),
        ("/top_p 0", "top_p: must be above 0"),
        ("/max 0", "max: must be at least 1"),
        ("/max 9999", "max: must be less than 512"),
        ("/seed x", "seed: must be an integer"),
        ("/only left", "/only takes base, trained or both"),
        ("/checkpoint 99", "no checkpoint '99'"),
        ("/reset now", "/reset takes no value"),
        ("/save", "/save needs the name of a file"),
        ("/save chat.txt", "give a file that ends in .json or .jsonl"),
        ("/save no/such/folder/chat.json", "cannot be written: No such file or directory"),
    ],
)
def test_a_wrong_command_is_a_sentence_and_changes_nothing(
    commands: Commands, session: ChatSession, line: str, reason: str
) -> None:
    before = session.settings, session.shown, session.checkpoint
    with pytest.raises(ValueError) as caught:
        commands.run(line)
    assert reason in str(caught.value)
    assert (session.settings, session.shown, session.checkpoint) == before


def test_a_message_may_begin_with_a_slash(commands: Commands) -> None:
    assert is_command("/help") and not is_command("//help") and not is_command("help")
    assert as_message("//help") == "/help" and as_message("1 / 2") == "1 / 2"


def test_quitting(commands: Commands) -> None:
    with pytest.raises(QuitChat):
        commands.run("/quit")


def test_a_conversation_is_saved_with_its_settings_and_checkpoints(
    commands: Commands, session: ChatSession, tmp_path: Path
) -> None:
    first = session.ask("count to 7")
    commands.run("/checkpoint 2")
    commands.run("/temperature 0")
    commands.run("/only trained")
    second = session.ask("and now?")
    assert commands.run(f"/save {tmp_path / 'chat.json'}") == f"written: {tmp_path / 'chat.json'}"
    base, trained = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in base["messages"]] == ["user", "assistant"]
    assert trained["messages"] == session.history("trained")
    assert trained["messages"][-1]["content"] == second.answers["trained"].text
    assert base["messages"][-1]["content"] == first.answers["base"].text
    assert [answer["checkpoint"] for answer in trained["answers"]] == ["final", "step 2"]
    assert [answer["checkpoint"] for answer in base["answers"]] == ["base"]
    assert [answer["temperature"] for answer in trained["answers"]] == [1.0, 0.0]
    commands.run(f"/save {tmp_path / 'chat.jsonl'}")
    lines = (tmp_path / "chat.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [base, trained]


def test_a_file_of_somebody_else_is_not_replaced(commands: Commands, session: ChatSession, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("[]")
    with pytest.raises(ValueError, match="exists already"):
        commands.run(f"/save {mine}")
    assert mine.read_text() == "[]"
    other = tmp_path / "other.json"
    commands.run(f"/save {other}")
    session.ask("count to 7")
    commands.run(f"/save {other}")  # the same chat again
    assert len(json.loads(other.read_text())[0]["messages"]) == 2
