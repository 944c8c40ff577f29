"""An episode in an environment: what it says, how it ends, what is shared, and what becomes of its failures."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from scripted_episodes import call, script

END = "<|im_end|>"


class Game:
    """Answers every text; three answers make a game."""

    def reset(self, **row: Any) -> str | None:
        self.said: list[str] = []
        return None

    def respond(self, text: str) -> str | None:
        self.said.append(text)
        return None if text == "stop" else f"answer {len(self.said)}"

    @property
    def done(self) -> bool:
        return len(self.said) == 3

    def get_reward(self) -> float | None:
        return float(len(self.said))


@pytest.mark.parametrize("member", ["reset", "respond", "get_reward", "done"])
@pytest.mark.parametrize("how", ["raises", "exits", "nonsense"])
def test_an_environment_that_fails_makes_the_episode_void_and_leaves_the_others(member: str, how: str) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        if how == "exits":
            raise SystemExit(1)
        if how == "raises":
            raise RuntimeError("the world is broken")
        return object()

    class Fragile(Game):
        instances = 0

        def __init__(self) -> None:
            Fragile.instances += 1
            self.is_broken = Fragile.instances == 2  # the first one is looked at when the run starts, and used first

        def _own_done(self) -> bool:
            return len(self.said) == 3

    def broken(name: str) -> Callable[..., Any]:
        original = getattr(Game, name)

        def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
            if self.is_broken:
                return fail()
            return self._own_done() if name == "done" else original(self, *arguments, **named)

        return wrapped

    setattr(Fragile, member, property(broken(member)) if member == "done" else broken(member))
    if member == "done" and how == "nonsense":
        pytest.skip("anything is true or false")
    played = script([["a" + END, "b" + END, "c" + END]] * 3, environment=Fragile)
    first, void, third = played.completions
    assert [one.is_void for one in played.completions] == [False, True, False]
    assert void.finish_reason == "failed" and void.token_ids == () and void.episode is not None
    assert member in str(void.episode.failure) and "Fragile" in str(void.episode.failure)
    if how == "raises":
        assert "the world is broken" in str(void.episode.failure) and "Traceback" in str(void.episode.failure)
    assert first.finish_reason == third.finish_reason == "done"


def test_a_lost_connection_of_the_environment_makes_the_episode_void() -> None:
    class Remote:
        def reset(self, **row: Any) -> None: ...

        def look(self) -> str:
            """Looks."""
            raise ConnectionError("the server is gone")

    played = script([[call("look") + END]], environment=Remote)
    episode = played.completions[0].episode
    assert played.completions[0].is_void and episode is not None and "the server is gone" in str(episode.failure)


# ------------------------------------------------------------------------------------------------------- environments


def test_an_environment_answers_turns_until_it_is_done() -> None:
    played = script([["one" + END, "two" + END, "three" + END], ["one" + END, "stop" + END]], environment=Game)
    done, ended = played.completions
    assert done.finish_reason == ended.finish_reason == "done"
    user = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert played.given() == [user.format("answer 1"), user.format("answer 2")]
    assert done.episode is not None and done.episode.rewards == {"Game": 3.0}
    assert ended.episode is not None and ended.episode.rewards == {"Game": 2.0}
    assert [message["content"] for message in done.episode.messages][-2:] == ["three", "answer 3"]  # said, and not given


def test_check_13_a_reward_of_none_is_none() -> None:
    class Unscored(Game):
        def get_reward(self) -> None:
            return None

    played = script([["stop" + END]] * 2, environment=Unscored)
    assert [one.episode.rewards for one in played.completions if one.episode] == [{"Unscored": None}] * 2


def test_check_14_all_resets_of_a_prompt_get_one_seed_and_another_prompt_another() -> None:
    seeds: list[tuple[str, int]] = []

    class Seeded(Game):
        def reset(self, **row: Any) -> str:
            super().reset()
            seeds.append((row["prompt"][0]["content"], row["seed"]))
            return f" Seed {row['seed']}."

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "b")]
    played = script([["stop" + END]] * 6, environment=Seeded, rows=rows, seeds=[2**52 + 5, 77])
    by_prompt = {text: {seed for one, seed in seeds if one == text} for text in ("a", "b")}
    assert len(by_prompt["a"]) == len(by_prompt["b"]) == 1 and by_prompt["a"] != by_prompt["b"]
    assert all(0 <= seed < 2**31 for _, seed in seeds)
    content = played.groups[1].contents[0]
    assert isinstance(content, list) and content[-1]["content"] == "b Seed 77."
    assert all(one.given == () for one in played.completions)  # the same prompt for all: nothing is given
    assert "Seed 77." in played.tokenizer.decode(list(played.groups[1].prompt.token_ids))


def test_what_prompts_of_a_group_do_not_share_is_given_in_each_completion() -> None:
    words = iter(["left", "right", "straight"])

    class Differs(Game):
        def reset(self, **row: Any) -> str:
            super().reset()
            return f" Go {next(words)}!"

    played = script([["one" + END, "stop" + END]] * 3, environment=Differs)
    (group,) = played.groups.values()
    for place, word in enumerate(("left", "right", "straight")):
        completion, request = group.completions[place], played.engine.asked[place][0]
        (start, end), _ = completion.given
        assert start == 0 and (*group.prompt.token_ids, *completion.token_ids[:end]) == request.prompt_token_ids
        assert word in played.tokenizer.decode(list(request.prompt_token_ids))
        assert len(completion.logprobs) == completion.num_tokens == len(completion.sampled)


def test_check_20_nothing_of_an_episode_is_left_in_a_reused_instance() -> None:
    made: list[object] = []

    class Counted(Game):
        def __init__(self) -> None:
            made.append(self)

    rows = [{"prompt": [{"role": "user", "content": str(number)}]} for number in range(4)]
    played = script([["one" + END, "stop" + END]] * 8, environment=Counted, rows=rows)
    assert all(one.episode is not None and one.episode.rewards == {"Counted": 2.0} for one in played.completions)
    assert len(made) <= 8
    again = script([["stop" + END]] * 2, environment=Counted)
    assert all(one.episode is not None and one.episode.rewards == {"Counted": 1.0} for one in again.completions)


def test_reward_functions_see_the_instance_of_their_completion_before_it_is_used_again() -> None:
    seen: list[list[str]] = []
    rows = [{"prompt": [{"role": "user", "content": str(number)}]} for number in range(3)]
    script(
        [[f"of {number}" + END, "stop" + END] for number in range(6)],
        environment=Game,
        rows=rows,
        between=lambda group: seen.extend([one.said for one in group.environments]),  # type: ignore[union-attr]
    )
    assert sorted(seen) == [[f"of {number}", "stop"] for number in range(6)]


def test_tools_that_are_known_at_run_time_are_in_the_prompt_and_can_be_called() -> None:
    class Dynamic:
        tools: Any = ()

        def reset(self, **row: Any) -> None:
            self.tools = [("open_door", "Opens it.", {"type": "object", "properties": {}}, lambda: "it is open")]

    played = script([[call("open_door") + END, "fine" + END]], environment=Dynamic)
    assert played.results() == ["it is open"]
    assert "open_door" in played.tokenizer.decode(list(played.engine.asked[0][0].prompt_token_ids))


def test_tools_that_nothing_announced_make_the_episode_void_with_a_hint() -> None:
    class Sudden:
        def reset(self, **row: Any) -> None:
            self.tools = [("open_door", "Opens it.", {"type": "object", "properties": {}}, lambda: "it is open")]

    episode = script([["hello" + END]], environment=Sudden).completions[0].episode
    assert episode is not None and "declare `tools` in the class" in str(episode.failure)


def test_several_environments_are_chosen_by_the_row_with_their_own_tools() -> None:
    class Red:
        def reset(self, **row: Any) -> None: ...

        def red(self) -> str:
            """Red."""
            return "r"

    class Blue:
        def reset(self, **row: Any) -> None: ...

        def blue(self) -> str:
            """Blue."""
            return "b"

    rows = [{"prompt": [{"role": "user", "content": "?"}], "environment": name} for name in ("red", "blue")]
    turns = [[call("red") + END, "ok" + END], [call("red") + END, "ok" + END]]
    played = script(turns, environment={"red": Red, "blue": Blue}, rows=rows)
    assert played.results(0) == ["r"] and "no tool is called 'red'" in played.results(1)[0]
    prompts = [played.tokenizer.decode(list(played.engine.asked[key][0].prompt_token_ids)) for key in (0, 1)]
    assert ["Blue." in prompt for prompt in prompts] == [False, True]


def test_user_code_neither_changes_nor_depends_on_the_generators_of_the_run() -> None:
    drawn: list[list[float]] = []

    class Reseeds(Game):
        def reset(self, **row: Any) -> None:
            super().reset()
            self._drawn = [random.random()]
            drawn.append(self._drawn)

        def respond(self, text: str) -> str | None:
            self._drawn.append(random.random())
            random.seed(0)
            return super().respond(text)

    for start in (1, 2):
        random.seed(start)
        before = random.getstate()
        script([["one" + END, "stop" + END]] * 2, environment=Reseeds, seeds=[5])
        assert random.getstate() == before
    first, second, again, _ = drawn[0], drawn[1], drawn[2], drawn[3]
    assert first == again and first[0] == second[0]  # the seed of a reset is the group's
    assert first[1] != second[1]  # that of other calls their own


def test_an_environment_is_told_a_turn_without_the_stop_string_that_ended_it() -> None:
    """As the messages have it."""
    heard: list[str] = []

    class Listens(Game):
        def respond(self, text: str) -> str | None:
            heard.append(text)
            return super().respond(text)

    played = script([["Left.\nUser:", "Right." + END, "Up.\nUser:"]], environment=Listens, stop="\nUser:")
    assert heard == ["Left.", "Right.", "Up."]
    episode = played.completions[0].episode
    assert episode is not None
    assert [one["content"] for one in episode.messages if one["role"] == "assistant"] == heard
