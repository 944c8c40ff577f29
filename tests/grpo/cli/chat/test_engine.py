"""A chat on vLLM: base model and policy in one batch, checkpoints in vLLM's buffers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankup.grpo.cli.chat.session import ChatSession, Progress
from rankup.grpo.cli.chat.stopping import Stopped
from rankup.grpo.cli.chat.target import find_target
from rankup.grpo.config import load_config
from rankup.grpo.update.resolve import engine_settings
from rankup.grpo.update.session import make_policy
from rankup.rollout.config import SamplingConfig

pytestmark = [pytest.mark.engine, pytest.mark.runs]

QUESTION = "count to 7"
TOKENS = 24


@pytest.fixture
def session(run: Path, engine_shelf) -> ChatSession:
    target = find_target(str(run), ["rollout.engine=vllm"], context=None)
    session = ChatSession(target, engine_shelf.get(engine_settings(target.config, target.model_path)), None)
    session.change(temperature=0.0, max_tokens=TOKENS)
    session.select("final")
    return session


def rollout(session: ChatSession, *, use_adapter: bool) -> str:
    """What a greedy rollout of its own gives for the question."""
    ids = session._prompter.prompt([], QUESTION, of="base").token_ids
    sampling = SamplingConfig(num_generations=1, temperature=0.0, max_completion_length=TOKENS)
    (group,) = session._engine.rollout([ids], sampling, use_adapter=use_adapter)
    return group.completions[0].text


def ask(session: ChatSession) -> dict[str, str]:
    session.reset()
    return {side: answer.text for side, answer in session.ask(QUESTION).answers.items()}


def test_both_sides_in_one_batch_answer_as_two_rollouts(session: ChatSession) -> None:
    answers = ask(session)
    assert answers == {"base": rollout(session, use_adapter=False), "trained": rollout(session, use_adapter=True)}
    assert answers["base"] != answers["trained"]


def test_a_checkpoint_answers_as_a_policy_with_its_adapter(session: ChatSession, run: Path) -> None:
    found = {}
    for name in ("1", "2", "3", "1"):
        session.select(name)
        found[name] = ask(session)["trained"]
    engine = session._engine
    policy = make_policy(load_config(run / "config.yaml"), session.target.model_path, engine)  # type: ignore[arg-type]
    for step in (1, 2, 3):
        policy.load_adapter(run / "checkpoints" / f"step_{step:06d}" / "adapter")
        engine.publish(policy.write_slots)
        assert found[str(step)] == rollout(session, use_adapter=True)
    assert len(set(found.values())) > 1


def test_an_answer_that_is_stopped_leaves_the_engine_idle(session: ChatSession) -> None:
    expected, seen = ask(session), []

    def watch(progress: Progress) -> None:
        seen.append(progress.text("base"))  # what little the tiny policy has learned may be the same token again and again
        if len(seen) >= 5 and seen[-1]:
            raise Stopped

    session.reset()
    with pytest.raises(Stopped):
        session.ask(QUESTION, watch)
    assert len(seen) < TOKENS and expected["base"].startswith(seen[-1])
    assert session.exchanges == [] and not session._engine._engine.has_unfinished_requests()  # type: ignore[attr-defined]
    assert ask(session) == expected
