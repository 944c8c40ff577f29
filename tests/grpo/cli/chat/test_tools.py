"""A chat with the tools of a run: both sides play episodes, in the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calling_models import make_calling_model

from rankup.configs.calculator import add
from rankup.grpo.cli.chat.commands import Commands
from rankup.grpo.cli.chat.session import ChatSession
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import LoraConfig
from rankup.grpo.model.policy import Policy

pytestmark = pytest.mark.slow

TOOLS = ("rollout.tools=rankup.configs.calculator:add", "rollout.engine=torch", "model.dtype=float32")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strong random adapter of a model that calls a calculator, which unlearns it."""
    folder = tmp_path_factory.mktemp("tools")
    model = make_calling_model(folder / "model", add, {"a": 12, "b": 30})
    with quiet_stderr():
        policy = Policy(str(model), lora=LoraConfig(rank=8), dtype="float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.master_b.copy_(torch.randn(layer.master_b.shape, generator=generator))
    policy.save_adapter(folder / "adapter")
    return folder / "adapter"


def test_each_side_plays_its_own_episode(adapter: Path, chat: Callable[..., ChatSession]) -> None:
    session = chat(adapter, *TOOLS)
    assert session.tools == ["add"]
    session.change(temperature=0.0, max_tokens=100)
    seen: list[str] = []
    exchange = session.ask("count to 7", lambda progress: seen.append(progress.text("base")))
    base, trained = exchange.answers["base"], exchange.answers["trained"]
    called, result, answer = base.messages
    assert called["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 12, "b": 30}}
    assert (result["role"], result["content"]) == ("tool", "42")
    assert answer["content"] == base.text == "The answer is 42."
    assert "The answer is 42." not in str(trained.messages)
    assert "tool_call" in seen[-1] or "The answer is 42" in seen[-1]
    assert [message["role"] for message in session.history("base")] == ["user", "assistant", "tool", "assistant"]
    Commands(session).run("/checkpoint base")
    session.reset()
    again = session.ask("count to 7").answers
    assert again["base"].messages == again["trained"].messages == base.messages


def test_a_conversation_with_calls_goes_on(adapter: Path, chat: Callable[..., ChatSession]) -> None:
    session = chat(adapter, *TOOLS)
    session.change(temperature=0.0, max_tokens=100)
    session.shown = ("base",)
    session.ask("count to 7")
    second = session.ask("count to 7").answers["base"]
    assert len(session.history("base")) == 5 + len(second.messages)
