"""A chat without a terminal, with a run of a tiny model on the torch engine."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model, tiny_tokenizer

from rankup.grpo.cli.chat.adapters import Adapters
from rankup.grpo.cli.chat.session import ChatSession, Progress
from rankup.grpo.cli.chat.target import find_target
from rankup.grpo.config import load_config
from rankup.grpo.run.completions import write_completions
from rankup.grpo.update.session import engine_and_policy
from rankup.rollout.config import SamplingConfig

pytestmark = pytest.mark.runs

Open = Callable[..., ChatSession]
QUESTION = "count to 7"


def ask(session: ChatSession, message: str = QUESTION, **settings: float | None) -> dict[str, str]:
    session.change(**{"temperature": 0.0, **settings})
    return {side: answer.text for side, answer in session.ask(message).answers.items()}


def greedy(engine: Any, session: ChatSession, message: str = QUESTION, *, use_adapter: bool = True) -> str:
    """What a rollout of its own gives for a first message."""
    ids = session._prompter.prompt([], message, of="base").token_ids
    sampling = SamplingConfig(num_generations=1, temperature=0.0, max_completion_length=session.settings.max_tokens)
    (group,) = engine.rollout([ids], sampling, use_adapter=use_adapter)
    return group.completions[0].text


# ------------------------------------------------------------------------------------------------------------- sides


def test_both_sides_answer_as_rollouts_of_their_own(run: Path, chat: Open) -> None:
    session = chat(run)
    answers = ask(session)
    assert answers == {
        "base": greedy(session._engine, session, use_adapter=False),
        "trained": greedy(session._engine, session, use_adapter=True),
    }
    assert answers["base"] != answers["trained"]


def test_each_side_goes_on_with_its_own_answers(run: Path, chat: Open) -> None:
    session = chat(run)
    first, second = ask(session), ask(session, "and now?")
    for side in ("base", "trained"):
        assert [message["content"] for message in session.history(side)] == [QUESTION, first[side], "and now?", second[side]]
    session.reset()
    assert ask(session) == first


def test_a_side_that_is_not_shown_does_not_see_the_message(run: Path, chat: Open) -> None:
    session = chat(run)
    session.shown = ("trained",)
    assert list(ask(session)) == ["trained"]
    assert session.history("base") == [] and len(session.history("trained")) == 2


def test_the_same_seed_gives_the_same_answers(run: Path, chat: Open) -> None:
    session = chat(run)
    answers = []
    for seed in (5, 5, 6):
        session.reset()
        answers.append(ask(session, temperature=1.0, seed=seed))
    assert answers[0] == answers[1] != answers[2]
    session.select("base")
    session.reset()
    both = ask(session, temperature=1.0, seed=5)
    assert both["base"] == both["trained"] == answers[0]["base"]  # the same random numbers on both sides


def test_what_stops_an_answer_leaves_the_conversation_as_it_was(run: Path, chat: Open) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    session = chat(run)
    ask(session)
    seen: list[tuple[str, str]] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.text("base"), progress.text("trained")))
        if len(seen) == 4:
            raise Enough

    before = session.history("trained")
    with pytest.raises(Enough):
        session.ask("and now?", watch)
    assert session.history("trained") == before
    assert all(later.startswith(earlier) for (earlier, _), (later, _) in itertools.pairwise(seen))
    assert len(seen[-1][0]) > len(seen[0][0])
    assert len(ask(session, "and now?")) == 2


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_answers_as_a_policy_with_its_adapter(run: Path, chat: Open) -> None:
    session = chat(run)
    found = {name: ask_anew(session, name)["trained"] for name in ("1", "2", "3", "1", "final", "base")}
    assert len({found["1"], found["2"], found["3"]}) > 1
    assert found["final"] == found["3"] and found["base"] == greedy(session._engine, session, use_adapter=False)
    config = load_config(run / "config.yaml")
    with engine_and_policy(config, session.target.model_path) as (engine, policy):
        for step in (1, 2, 3):
            policy.load_adapter(run / "checkpoints" / f"step_{step:06d}" / "adapter")
            engine.publish(policy.write_slots)
            assert found[str(step)] == greedy(engine, session)


def ask_anew(session: ChatSession, checkpoint: str) -> dict[str, str]:
    session.select(checkpoint)
    session.reset()
    return ask(session)


def test_a_checkpoint_is_read_once(run: Path, chat: Open) -> None:
    session = chat(run)
    assert session.checkpoint == "final"
    assert session.select("2").read_seconds is not None
    assert session.select("final").read_seconds is None
    assert session.select("step 2").read_seconds is None
    assert session.checkpoint == "step 2"


def test_best_and_last_are_those_of_the_manifests(run: Path) -> None:
    adapters = Adapters.of_run(run)
    listed = {one.name: one for one in adapters.listed()}
    assert list(listed) == ["final", "1", "2", "3"]
    assert adapters.find("last") == listed["3"]
    assert adapters.find("best") == max(list(listed.values())[1:], key=lambda one: (one.reward, one.step))
    with pytest.raises(ValueError, match="no checkpoint '7': there are base, final, 1, 2, 3, last and best"):
        adapters.find("7")


def test_a_damaged_checkpoint_is_refused_and_the_selected_one_stays(run: Path, chat: Open, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    weights = copy / "checkpoints" / "step_000002" / "adapter" / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    (copy / "checkpoints" / "step_000001" / "manifest.json").write_text("{}")
    session = chat(copy)
    before = ask(session)
    with pytest.raises(ValueError, match="was changed: its checksum differs"):
        session.select("2")
    with pytest.raises(ValueError, match="has the format None"):
        session.select("1")
    with pytest.raises(ValueError, match="was changed: its checksum differs"):  # before an engine starts
        find_target(str(copy / "checkpoints" / "step_000002"), [], context=None)
    session.reset()
    assert session.checkpoint == "final" and ask(session) == before
    assert session.target.adapters is not None and session.target.adapters.find("last").name == "3"


def test_a_run_that_was_killed_begins_with_its_newest_checkpoint(run: Path, chat: Open, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("adapter_*", "step_000003")))
    shutil.copytree(run / "checkpoints" / "step_000002", copy / "checkpoints" / "step_000002", dirs_exist_ok=True)
    (copy / "checkpoints" / "step_000001" / "manifest.json").write_text("{}")
    assert chat(copy).checkpoint == "step 2"


def test_a_checkpoint_of_a_run_is_a_place_to_begin_with(run: Path, chat: Open) -> None:
    session = chat(run / "checkpoints" / "step_000002")
    assert session.checkpoint == "step 2"
    assert session.select("final").label == "final"


# ------------------------------------------------------------------------------------------------- models and adapters


def test_an_adapter_by_itself_answers_as_the_run_does(run: Path, chat: Open) -> None:
    of_run = ask(chat(run))
    session = chat(run / "adapter", "rollout.engine=torch", "model.dtype=float32")
    assert session.checkpoint == "adapter"
    assert ask(session, max_tokens=8) == of_run


def test_a_model_alone_has_one_side(run: Path, chat: Open, tiny_model_path) -> None:
    session = chat(tiny_model_path("llama"), "rollout.engine=torch", "model.dtype=float32")
    assert ask(session, max_tokens=8) == {"base": ask(chat(run))["base"]}
    with pytest.raises(ValueError, match="a model without an adapter"):
        session.select("final")


def test_without_a_chat_template_each_message_is_a_prompt_of_its_own(chat: Open, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "plain", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    shutil.rmtree(folder / "chat_template.jinja", ignore_errors=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    session = chat(folder, "rollout.engine=torch", "model.dtype=float32")
    assert session.target.text_reason == "the model has no chat template"
    assert ask(session, max_tokens=8) == ask(session, max_tokens=8)
    with pytest.raises(ValueError, match="a system prompt needs a conversation"):
        session.set_system("Be brief.")


def test_a_run_on_plain_text_is_asked_in_plain_text(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "completions")
    write_completions(copy / "completions" / "step_000001.parquet", 1, {"prompt": ["1 + 1 ="], "completion": ["2"]})
    assert "plain text" in str(find_target(str(copy), [], context=None).text_reason)
    assert find_target(str(copy), ["data.system_prompt=Be brief."], context=None).text_reason is None
    assert find_target(str(run), [], context=None).text_reason is None


# ----------------------------------------------------------------------------------------------------------- settings


def test_a_system_prompt_begins_a_new_conversation(run: Path, chat: Open) -> None:
    session = chat(run)
    before = ask(session)
    session.set_system("Be brief.")
    assert session.exchanges == []
    assert ask(session)["base"] != before["base"]
    assert session.history("base")[0] == {"role": "system", "content": "Be brief."}


def test_a_conversation_without_room_for_an_answer_is_refused(run: Path, chat: Open) -> None:
    session = chat(run, context=64)
    assert session.context == 64
    with pytest.raises(ValueError, match=r"the conversation of the base side has \d+ tokens .* has room for 64"):
        ask(session, "x" * 50)
    assert ask(session, "x" * 20, max_tokens=63)
    with pytest.raises(ValueError, match="max: must be less than 64"):
        session.change(max_tokens=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be at least 0"),
        ({"temperature": 1e-5}, "temperature: must be at least 0.001"),
        ({"top_p": 1.5}, "top_p: must be at most 1"),
    ],
)
def test_a_setting_that_the_engine_cannot_sample_at_is_refused(run: Path, chat: Open, settings: Any, message: str) -> None:
    session = chat(run)
    before = session.settings
    with pytest.raises(ValueError, match=message):
        session.change(**settings)
    assert session.settings == before


# ----------------------------------------------------------------------------------------------------------- refusals


def refusal(name: Path | str, *overrides: str, context: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        find_target(str(name), overrides, context=context)
    return str(caught.value)


def test_what_cannot_be_talked_to_is_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is no run folder (config.yaml), no adapter (adapter_config.json) and no model" in refusal(empty)
    assert "is a file: give a run folder" in refusal(run / "config.yaml")
    assert "act in an environment" in refusal(run, "rollout.environment=worlds.py:Guess")
    assert "must be at most 512, the context of the model" in refusal(run, context=513)
    bare = Path(shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("adapter", "checkpoints")))
    assert f"no adapter in {bare}" in refusal(bare)


def test_an_adapter_without_the_name_of_its_base_model_needs_one(run: Path, tmp_path: Path, tiny_model_path) -> None:
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "names no base model: add model=NAME" in refusal(folder)
    assert find_target(str(folder), [f"model={tiny_model_path('llama')}"], context=None).kind == "adapter"
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/model"}))
    assert "the base model of" in refusal(folder)
