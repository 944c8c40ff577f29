"""A run of a tiny model with three checkpoints, to talk to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny_runs import ROWS, many_low_ids, tiny_config

from rankup import GRPOTrainer
from rankup.grpo.cli.chat.session import ChatSession, open_chat
from rankup.grpo.cli.chat.target import find_target

CONVERSATIONS = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
Open = Callable[..., ChatSession]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_path) -> Path:
    """Checkpoints after each of three steps, of which each changes what is sampled."""
    folder = tmp_path_factory.mktemp("chat") / "mine"
    config = tiny_config(
        folder, max_steps=3, save_steps=1, keep_last=3, keep_best=1, learning_rate=5e-2, completions_steps=1, eval_before=False
    )
    trainer = GRPOTrainer(
        model=str(tiny_model_path("llama")), reward_funcs=many_low_ids, args=config, train_dataset=CONVERSATIONS
    )
    with trainer:
        trainer.train()
    return folder


@pytest.fixture
def chat() -> Iterator[Open]:
    """A function that opens a session with what it names; sessions are closed after the test."""
    with ExitStack() as stack:

        def opened(name: Path | str, *overrides: str, context: int | None = None) -> ChatSession:
            return stack.enter_context(open_chat(find_target(str(name), overrides, context=context)))

        yield opened
