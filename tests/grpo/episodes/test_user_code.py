"""What users' code does in an episode: its records, its order, its random numbers."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from typing import Any

import pytest
from scripted_episodes import call, script

from rankup.grpo.episodes.dialect import Dialect

END = "<|im_end|>"
ADD = call("add", a=2, b=3) + END


def add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


class Game:
    """Answers every text; three answers make a game."""

    def reset(self, **row: Any) -> str | None:
        self.said: list[str] = []
        return None

    def respond(self, text: str) -> str | None:
        self.said.append(text)
        return None if text == "stop" else f"answer {len(self.said)}"


def test_a_tool_that_changes_its_arguments_changes_no_record() -> None:
    def push(items: list) -> str:
        """Push.

        Args:
            items: Where to.
        """
        items.append("more")
        return str(len(items))

    played = script([[call("push", items=["a"]) + END, "ok" + END]], tools=[push])
    episode = played.completions[0].episode
    assert episode is not None and episode.calls[0].result == "2" and episode.calls[0].arguments == {"items": ["a"]}
    assert episode.messages[0]["tool_calls"][0]["function"]["arguments"] == {"items": ["a"]}


@pytest.mark.parametrize("kind", ["inline", "threads", "async"])
def test_calls_of_an_environment_are_made_one_after_the_other_in_their_order(kind: str) -> None:
    class Board(Game):
        def reset(self, **row: Any) -> None:
            self.moves: list[int] = []
            self.is_moving = False
            self.said = []

        def _begin(self) -> None:
            assert not self.is_moving
            self.is_moving = True

        def _end(self, to: int) -> str:
            self.is_moving = False
            self.moves.append(to)
            return str(self.moves)

    class Waits(Board):
        def move(self, to: int) -> str:
            """Move.

            Args:
                to: Where to.
            """
            self._begin()
            threading.Event().wait(0.02 / to)
            return self._end(to)

    class Awaits(Board):
        async def move(self, to: int) -> str:
            """Move.

            Args:
                to: Where to.
            """
            self._begin()
            await asyncio.sleep(0.02 / to)
            return self._end(to)

    calls = "\n".join(call("move", to=to) for to in (1, 2, 3))
    environment = Awaits if kind == "async" else Waits
    played = script([[calls + END, "stop" + END]] * 2, environment=environment, tool_workers=3 * (kind == "threads"))
    assert played.results() == ["[1]", "[1, 2]", "[1, 2, 3]"]


def test_a_value_without_a_text_counts_as_a_failure() -> None:
    def power() -> int:
        """A large number."""
        return 10**6000

    played = script([[call("power") + END, "ok" + END]], tools=[power])
    episode = played.completions[0].episode
    assert episode is not None and episode.calls[0].error == "raised" and "error" in json.loads(episode.calls[0].result)


def test_check_8_a_result_of_megabytes_is_not_even_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> str:
        """Read a file."""
        return "word " * 1_000_000

    def bridge(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Dialect, "bridge", bridge)
    played = script([[call("read") + END]], tools=[read])
    assert played.completions[0].finish_reason == "length"


@pytest.mark.parametrize("kind", ["inline", "threads", "async"])
def test_users_code_draws_other_numbers_in_each_rollout(kind: str) -> None:
    drawn: list[float] = []

    async def draw_async() -> str:
        """Draw."""
        drawn.append(random.random())
        return "drawn"

    def draw() -> str:
        """Draw."""
        drawn.append(random.random())
        return "drawn"

    tools = [draw_async if kind == "async" else draw]
    for seeds in ([5], [6], None, None, [5]):
        turns = [[call(tools[0].__name__) + END, "ok" + END]] * 2
        script(turns, tools=tools, seeds=seeds, tool_workers=int(kind == "threads"))
    assert len(set(drawn)) == 8 and drawn[:2] == drawn[-2:]


def test_reward_functions_draw_as_in_a_run_without_episodes() -> None:
    expected = random.Random(3)
    random.seed(3)
    drawn: list[float] = []
    for _ in range(2):
        script([[ADD, "5." + END]] * 2, tools=[add], seeds=[1], between=lambda group: drawn.append(random.random()))
    assert drawn == [expected.random(), expected.random()]


def test_the_prompt_of_a_group_is_recorded_with_what_reset_says() -> None:
    class Says(Game):
        def reset(self, **row: Any) -> str:
            super().reset()
            return f" Number {row['seed']}."

    played = script([["stop" + END]] * 2, environment=Says, seeds=[7])
    group = played.groups[0]
    assert group.prompt.content == group.contents[0] == [{"role": "user", "content": "What is 2 + 3? Number 7."}]
