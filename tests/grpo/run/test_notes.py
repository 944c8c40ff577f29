"""Notes before the first step, and about the completions of the first ones."""

import dataclasses
from typing import Any

import pytest
from made_episodes import TRACEBACK, VOID, completion_of, group_of, played
from sample_groups import make_group
from tiny_models import tiny_tokenizer

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.prompts import PromptData
from rankup.grpo.data.run_inputs import RunInputs
from rankup.grpo.run import notes
from rankup.grpo.run.notes import SamplingNotes, step_notes
from rankup.rewards.combining import Scores


@pytest.mark.parametrize(("dtype", "native", "is_noted"), [
    ("bfloat16", "float32", True), ("bfloat16", "bfloat16", False), ("float32", "float32", False),
])  # fmt: skip
def test_emulated_bf16_is_noted(monkeypatch: pytest.MonkeyPatch, dtype: Any, native: str, is_noted: bool) -> None:
    monkeypatch.setattr(notes, "native_dtype", lambda: native)
    inputs = RunInputs(model_path="", tokenizer=None, train_prompts=PromptData(rows=[], dropped=0), eval_prompts=None)  # type: ignore[arg-type]
    found = list(notes.start_notes(GRPOConfig(dtype=dtype), inputs))
    assert any("model.dtype=float32" in note for note in found) == is_noted


@pytest.mark.parametrize("multiplies", [True, False])
def test_emulated_fp16_is_noted(monkeypatch: pytest.MonkeyPatch, multiplies: bool) -> None:
    monkeypatch.setattr(notes, "multiplies_fp16", lambda: multiplies)
    inputs = RunInputs(model_path="", tokenizer=None, train_prompts=PromptData(rows=[], dropped=0), eval_prompts=None)  # type: ignore[arg-type]
    found = list(notes.start_notes(GRPOConfig(dtype="float16"), inputs))
    assert any("no fp16 instructions" in note for note in found) != multiplies
    assert not any("no fp16 instructions" in note for note in notes.start_notes(GRPOConfig(dtype="bfloat16"), inputs))


def notes_of(**options: Any) -> SamplingNotes:
    return SamplingNotes(GRPOConfig(max_completion_length=9, **options), tiny_tokenizer())


CUT_OFF = [make_group([5], [[7, 8], [9]], truncated=(0, 1)), make_group([6], [[7], [8]], truncated=(0, 1))]
ENDED = [make_group([5], [[7, 8], [9]], truncated=(0,))]


def test_completions_that_are_all_cut_off_are_noted_once() -> None:
    noted = notes_of()
    assert list(noted.about("step 1", ENDED)) == []
    assert list(noted.about("step 2", CUT_OFF)) == [
        "step 2: all 4 completions were cut off at rollout.max_completion_length, which is 9: reward functions see unfinished "
        "answers; increase it, ask for shorter answers, or set rollout.stop to a text that ends them"
    ]
    assert list(noted.about("step 3", CUT_OFF)) == []


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"mask_truncated_completions": True}, "excludes all of them, so nothing is learned"),
        ({"stop": "x"}, "or check rollout.stop, which none of them has"),
        ({"generation_kwargs": {"ignore_eos": True}}, "; leave out rollout.generation_kwargs.ignore_eos"),
    ],
)
def test_the_note_says_what_else_matters(options: dict[str, Any], part: str) -> None:
    (note,) = notes_of(**options).about("evaluation", CUT_OFF)
    assert note.startswith("evaluation: all 4 completions were cut off") and part in note


def test_completions_of_other_workers_count_as_cut_off_too() -> None:
    remote = dataclasses.replace(CUT_OFF[0], completions=tuple(c.metadata() for c in CUT_OFF[0].completions), is_local=False)
    assert len(list(notes_of().about("step 1", [remote]))) == 1
    ended = dataclasses.replace(ENDED[0], completions=tuple(c.metadata() for c in ENDED[0].completions), is_local=False)
    assert list(notes_of().about("step 1", [CUT_OFF[0], ended])) == []


PAD, BOS, EOS, UNK = range(4)


@pytest.mark.parametrize("ids", [[[7, EOS], [8]], [[7, PAD], [8]], [[7, EOS, 9], [8]], [[7, UNK], [8]]])
def test_the_end_of_a_completion_is_no_dropped_tag(ids: list[list[int]]) -> None:
    assert list(notes_of().about("step 1", [make_group([5], ids)])) == []


def test_special_tokens_that_the_text_lacks_are_noted_once() -> None:
    noted, groups = notes_of(), [make_group([5], [[UNK, 7, BOS, 8, EOS], [7, 8, EOS]])]
    assert list(noted.about("step 1", groups)) == [
        "step 1: 1 of 2 completions have special tokens ('<bos>', '<unk>'), which are left out of the text that reward "
        "functions see: rollout.skip_special_tokens=false keeps them"
    ]
    assert list(noted.about("step 2", groups)) == []
    assert list(notes_of(skip_special_tokens=False).about("step 1", groups)) == []


# Episodes


def test_the_first_void_episode_is_noted_with_its_traceback_and_later_ones_are_counted() -> None:
    noted = notes_of()
    played_one, void_one = completion_of(played()), completion_of(VOID)
    assert list(noted.about("step 1", [group_of(played_one, played_one)])) == []
    (first,) = noted.about("step 2", [group_of(played_one, void_one, void_one)])
    assert first == f"step 2: 2 of 3 episodes are void, since their environment failed: {TRACEBACK}"
    (second,) = noted.about("step 3", [group_of(played_one, dataclasses.replace(void_one).metadata())])
    assert second == "step 3: 1 of 2 episodes are void, since their environment failed (3 so far)"


def test_void_episodes_are_not_those_to_which_no_function_applied() -> None:
    scores = Scores(total=[1.0, None], by_function={"exact": [1.0, None]}, extras={}, metrics={}, weights=[1.0])
    group = group_of(completion_of(played()), completion_of(VOID), scores=scores)
    assert list(step_notes(0, [group])) == []
    other = dataclasses.replace(group, completions=(completion_of(played()), completion_of(played())))
    (note,) = step_notes(0, [other])
    assert note == "step 1: no reward function applied to 1 completions (exact): nothing is learned from them"


def test_episodes_that_are_all_cut_off_by_turns_are_noted() -> None:
    cut_off = completion_of(played(), reason="turns")
    (note,) = notes_of(max_tool_calling_iterations=3).about("step 1", [group_of(cut_off, cut_off)])
    assert note == (
        "step 1: all 2 completions were cut off at rollout.max_tool_calling_iterations, which is 3: reward functions see "
        "unfinished episodes; increase it, or ask for fewer calls"
    )


def test_special_tokens_of_episodes_are_no_missing_text() -> None:
    """Markers of calls are read from the tokens, and each turn ends with a token of the template."""
    episode = dataclasses.replace(completion_of(played(), sampled=4, given=0), token_ids=(UNK, 7, BOS, 8))
    assert list(notes_of().about("step 1", [group_of(episode)])) == []
