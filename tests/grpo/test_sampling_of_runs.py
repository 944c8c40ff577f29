"""What a run's reward functions see of its completions, and what is refused before its engine starts."""

from __future__ import annotations

from typing import Any

import pytest

from rankup.rollout.engine import RolloutEngine

UNK = 3


class Seen:
    """A reward function that keeps what it gets."""

    __name__ = "seen"

    def __init__(self) -> None:
        self.rows: list[tuple[str, list[int]]] = []

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.rows += zip(completions, completion_ids, strict=True)
        return [float(ids[0]) for ids in completion_ids]


@pytest.fixture
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("vLLM was started")

    monkeypatch.setattr(RolloutEngine, "__init__", started)


def lines_of(trainer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    trainer.train()
    return " ".join(capsys.readouterr().out.split())


def test_a_run_says_once_that_completions_are_cut_off_and_lack_special_tokens(make_trainer, capsys) -> None:
    shown = lines_of(make_trainer(max_completion_length=6, num_generations=16, eval_before=False, max_steps=3), capsys)
    assert shown.count("were cut off at rollout.max_completion_length, which is 6") <= 1
    assert shown.count("rollout.skip_special_tokens=false keeps them") == 1
    shown = lines_of(make_trainer(max_completion_length=1, generation_kwargs={"ignore_eos": True}, max_steps=3), capsys)
    assert shown.count("were cut off at rollout.max_completion_length, which is 1") == 1


def test_rewards_see_special_tokens_and_stop_strings_if_they_are_wanted(make_trainer) -> None:
    options: dict[str, Any] = {"max_completion_length": 48, "num_generations": 16, "max_steps": 1, "stop": "<unk>"}
    rows = {}
    for wanted in (False, True):
        seen = Seen()
        changes = {"skip_special_tokens": not wanted, "include_stop_str_in_output": wanted}
        make_trainer(seen, **options, **changes, eval_before=False).train()
        rows[wanted] = seen.rows
    ended = {wanted: [text for text, ids in found if ids[-1] == UNK] for wanted, found in rows.items()}
    assert [ids for _, ids in rows[True]] == [ids for _, ids in rows[False]], "the same tokens"
    assert len(ended[True]) > 2 and all(text.endswith("<unk>") for text in ended[True])
    assert not any("<unk>" in text for text in ended[False])
    assert any("<bos>" in text for text, _ in rows[True]) and not any("<bos>" in text for text, _ in rows[False])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prompt_length": 600}, r"^rollout\.max_prompt_length \+ rollout\.max_completion_length: must be at most 512"),
        ({"stop": "<eos>\n"}, r"^rollout\.stop: '<eos>\\n' has the special token"),
        ({"generation_kwargs": {"stop_token_ids": [999]}}, r"^rollout\.generation_kwargs\.stop_token_ids: must be token ids"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "torch"])
def test_what_the_model_cannot_sample_is_refused_when_the_run_is_prepared(
    make_trainer, without_engine, engine: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(engine=engine, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 2.5}, r"^temperature: must be 0\.01 to 2 with vLLM"),
        ({"temperature": 0.005}, r"^temperature: must be 0\.01 to 2 with vLLM"),
        ({"temperature": -1.0}, r"^temperature: must be at least 0\.0 \(got -1\.0\)"),
        ({"temperature": float("nan")}, r"^temperature: must be a finite number"),
        ({"max_completion_length": 0}, r"^max_completion_length: must be at least 1"),
        ({"max_completion_length": 3}, r"^generation_kwargs\.min_tokens: must be at most max_completion_length, which is 3"),
    ],
)
def test_what_generate_cannot_sample_is_refused_before_the_engine_starts(
    make_trainer, without_engine, options: dict[str, Any], message: str
) -> None:
    trainer = make_trainer(engine="vllm", generation_kwargs={"min_tokens": 4})
    with pytest.raises(ValueError, match=message):
        trainer.generate("a question", **options)


def test_a_short_context_shortens_the_default_of_prompts_and_not_an_explicit_one(make_trainer, tiny_model_path) -> None:
    from rankup import GRPOConfig, GRPOTrainer

    rows = [{"prompt": "x" * length} for length in (5, 100, 400, 500)]

    def prepared(**options: Any) -> GRPOTrainer:
        args = GRPOConfig(engine="torch", dtype="float32", max_completion_length=40, **options)
        return GRPOTrainer(model=str(tiny_model_path("llama")), reward_funcs=Seen(), args=args, train_dataset=rows)

    setup = prepared().setup
    assert (setup.config.rollout.max_prompt_length, setup.inputs.train_prompts.dropped) == (472, 1)
    assert any("rollout.max_prompt_length is 472" in note for note in setup.config.notes)
    assert prepared(max_prompt_length=450).setup.inputs.train_prompts.dropped == 1
    with pytest.raises(ValueError, match=r"must be at most 512"):
        prepared(max_prompt_length=500)
