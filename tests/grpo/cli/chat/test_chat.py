"""The command `rankup chat` without a terminal: messages as arguments and on standard input."""

from __future__ import annotations

import io
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import ROOT, code_blocks

from rankup.grpo.cli.chat.commands import HELP
from rankup.grpo.cli.chat.lines import piped_lines
from rankup.grpo.cli.main import main

pytestmark = pytest.mark.runs

Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def rankup(run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`rankup chat` with the run, arguments and standard input: status, lines of output, lines of errors."""

    def command(*arguments: str, typed: str = "") -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        status = main(["chat", str(run), *arguments])
        captured = capfd.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return command


def test_messages_are_answered_and_the_command_ends(rankup: Run) -> None:
    arguments = [word for line in ("/temperature 0", "count to 7", "/only trained", "and now?") for word in ("--message", line)]
    status, out, errors = rankup(*arguments)
    assert (status, errors) == (0, [])
    assert "base and trained (final) side by side; temperature 1, answers of at most 8 tokens" in out[1]
    headings = [line for line in out if line.endswith("]:")]
    assert [line.partition(" [")[0] for line in headings] == ["base", "trained (final)", "trained (final)"]
    asked = [line for line in out if line.startswith("> ")]
    assert asked == ["> /temperature 0", "> count to 7", "> /only trained", "> and now?"]


def test_a_pipe_is_read_line_by_line(rankup: Run) -> None:
    of_pipe = rankup(typed="/temperature 0\n\ncount \\\nto 7\n/quit\nnever\n")
    assert of_pipe[0] == 0 and "> count " in of_pipe[1] and "never" not in "".join(of_pipe[1])
    of_option = rankup("--message", "/temperature 0", "--message", "count \nto 7", "--message", "/quit")
    assert of_pipe == of_option


def test_what_cannot_be_done_ends_a_script_with_an_error(rankup: Run) -> None:
    status, out, errors = rankup("--message", "/temprature 0", "--message", "count to 7")
    assert status == 1
    assert errors == [
        "rankup: error: no command /temprature: /help lists them, and a message that begins with / is written with //"
    ]
    assert not any(line.endswith("]:") for line in out)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--context", "1"], "--context: must be at least 2"),
        (["rollout.temperatur=1"], "did you mean rollout.temperature?"),
        (["rollout.environment=worlds.py:Guess"], "act in an environment"),
        (["rollout.tools=tools.py:add"], "tools.py"),
    ],
)
def test_mistakes_are_one_line(rankup: Run, arguments: list[str], part: str) -> None:
    status, _, errors = rankup(*arguments, "--message", "count to 7")
    (line,) = errors
    assert status == 1 and line.startswith("rankup: error: ") and part in line


def test_overrides_apply(rankup: Run) -> None:
    _, out, _ = rankup("rollout.max_completion_length=3", "rollout.temperature=0.5", "--message", "/max")
    assert "temperature 0.5, answers of at most 3 tokens" in out[1]


def test_a_line_that_ends_with_a_backslash_goes_on() -> None:
    assert list(piped_lines(["one\\\n", "two\n", "three"])) == ["one\ntwo", "three"]
    assert list(piped_lines(["one\\\n"])) == ["one\n"]


# ------------------------------------------------------------------------------------------------------ documentation

PAGE = (ROOT / "docs" / "chat.md").read_text()


def documented() -> list[list[str]]:
    """The words of the commands in the documentation that answer messages and end."""
    lines = [line for language, block in code_blocks(PAGE) if language == "bash" for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("rankup chat") and "--message" in line]


@pytest.mark.parametrize("words", documented(), ids=shlex.join)
def test_documented_commands_answer(run: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert words[:2] == ["chat", "runs/quickstart"]
    assert main(["chat", str(run), *words[2:]]) == 0
    messages = [word for option, word in itertools.pairwise(words) if option == "--message" and not word.startswith("/")]
    assert capfd.readouterr().out.count("]:\n") >= len(messages) > 0


def test_the_documentation_has_every_command() -> None:
    table = [line for line in PAGE.splitlines() if line.startswith("| `/")]
    assert re.findall(r"`(/\w+)[ `]", " ".join(line.split(" | ")[0] for line in table)) == [one.split()[0] for one in HELP]
