"""Turns that a stop string ended: what an environment is told of them."""

from __future__ import annotations

from typing import Any

from scripted_episodes import script


def test_an_environment_is_told_a_turn_without_the_stop_string_that_ended_it() -> None:
    """As the messages have it."""
    heard: list[str] = []

    class Listens:
        def reset(self, **row: Any) -> None: ...

        def respond(self, text: str) -> str | None:
            heard.append(text)
            return "Go on." if len(heard) < 3 else None

    played = script([["Left.\nUser:", "Right.<|im_end|>", "Up.\nUser:"]], environment=Listens, stop="\nUser:")
    assert heard == ["Left.", "Right.", "Up."]
    episode = played.completions[0].episode
    assert episode is not None
    assert [one["content"] for one in episode.messages if one["role"] == "assistant"] == heard
