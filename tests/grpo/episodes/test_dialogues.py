"""Episodes of a run that is closed and used again, as a trainer does between `evaluate` and `train`."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from dialects import CHATML, dialect_tokenizer
from scripted_episodes import Script

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.prompts import prepare_prompts
from rankup.grpo.episodes.actions import Actions
from rankup.grpo.episodes.dialogues import Dialogues

CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>'


class Room:
    """Counts its instances that were not closed."""

    open_now = 0

    def __init__(self) -> None:
        Room.open_now += 1

    def reset(self) -> None: ...

    def look(self) -> str:
        """Look around."""
        return "a door"

    def close(self) -> None:
        Room.open_now -= 1


class AsyncRoom(Room):
    async def look(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Look around."""
        return "a door"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("environment", [Room, AsyncRoom])
def test_episodes_that_were_closed_can_be_played_again(environment: type[Room], workers: int) -> None:
    tokenizer: Any = dialect_tokenizer(CHATML)
    rollout: Any = {"num_generations": 2, "max_prompt_length": 2000, "tool_workers": workers, "tool_timeout": 20}
    config = GRPOConfig(rollout=rollout)
    Room.open_now, before = 0, set(threading.enumerate())
    actions = Actions.load(config, environments=environment)
    assert actions is not None
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    dialogues = Dialogues(actions, config, tokenizer, eos_token_ids=[end])
    rows = [{"prompt": [{"role": "user", "content": "What is in the room?"}]}]
    prompts = prepare_prompts(rows, tokenizer, config.data, max_prompt_length=2000, tools=actions.schemas).rows
    for _ in range(3):
        engine: Any = Script(tokenizer, [[CALL, "A door.<|im_end|>"]] * 2, [end])
        (group,) = dialogues.play(engine, prompts, config.rollout)
        episodes = [completion.episode for completion in group.completions]
        assert [one.calls[0].result for one in episodes if one is not None] == ["a door"] * 2
        group.release()
        dialogues.close()
        assert Room.open_now == 0
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
