"""Evaluation files: what is written is read back, and a resumed run drops those that it makes again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.algorithm.estimates import Estimate
from rankup.grpo.run.evaluation_files import (
    EVALUATIONS,
    EvaluationRecord,
    PromptResult,
    SetResult,
    own_files,
    own_name,
    read_evaluation,
    remove_after,
    write_evaluation,
)
from rankup.grpo.run.evaluation_records import prompt_hash

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
REWARDS = st.none() | st.floats(-2, 2)
PROMPTS = TEXTS | st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=2)
NUMBERS = st.floats(allow_infinity=False)
ESTIMATES = st.builds(Estimate, mean=NUMBERS, low=NUMBERS, high=NUMBERS)
SETS = st.builds(
    SetResult,
    prompts=st.integers(0, 9),
    completions=st.integers(0, 9),
    estimates=st.dictionaries(TEXTS, ESTIMATES, max_size=2),
    functions=st.dictionaries(TEXTS, NUMBERS, max_size=2),
)


@st.composite
def results(draw: st.DrawFn) -> PromptResult:
    count = draw(st.integers(1, 3))

    def several(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
        return st.lists(values, min_size=count, max_size=count)

    return PromptResult(
        eval_set=draw(st.none() | TEXTS),
        hash=draw(TEXTS),
        prompt=draw(PROMPTS),
        rewards=draw(several(REWARDS)),
        texts=draw(several(TEXTS)),
        answers=draw(st.none() | several(st.none() | TEXTS)),
        functions=draw(st.dictionaries(TEXTS, several(REWARDS), max_size=2)),
    )


RECORDS = st.builds(
    EvaluationRecord,
    about=st.dictionaries(TEXTS, st.none() | TEXTS | st.integers(), max_size=3),
    settings=st.dictionaries(TEXTS, st.none() | TEXTS | st.booleans(), max_size=3),
    metrics=st.dictionaries(TEXTS, NUMBERS, max_size=3),
    all=SETS,
    sets=st.dictionaries(TEXTS, SETS, max_size=2),
    prompts=st.lists(results(), max_size=3),
)


def same(a: Any, b: Any) -> bool:
    """Equality in which NaN equals itself."""
    return repr(a) == repr(b)


@settings(max_examples=20, deadline=None)
@given(RECORDS)
def test_a_file_holds_the_record(tmp_path_factory: pytest.TempPathFactory, record: EvaluationRecord):
    path = tmp_path_factory.mktemp("evaluations") / "new" / "one.json"
    write_evaluation(path, record)
    assert same(read_evaluation(path), record)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "rankup-evaluation-0"}', "\x00"])
def test_another_file_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "one.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"one\.json"):
        read_evaluation(path)
    with pytest.raises(ValueError, match=r"two\.json"):
        read_evaluation(tmp_path / "two.json")


def test_a_resumed_run_drops_the_evaluations_that_it_makes_again(tmp_path: Path):
    empty = EvaluationRecord(
        about={}, settings={}, metrics={"eval_reward": math.nan}, sets={}, prompts=[],
        all=SetResult(prompts=0, completions=0, estimates={}, functions={}),
    )  # fmt: skip
    names = [own_name(step, "during") for step in (0, 20, 40)] + [own_name(40, "after"), "eval_adapter_greedy.json"]
    for name in names:
        write_evaluation(tmp_path / EVALUATIONS / name, empty)
    assert [path.name for path in own_files(tmp_path)] == names[:4], "the last one last"
    remove_after(tmp_path, 20)
    assert sorted(path.name for path in (tmp_path / EVALUATIONS).iterdir()) == ["eval_adapter_greedy.json", *names[:2]]
    remove_after(tmp_path / "none", 20)


def test_a_prompt_is_known_by_its_content():
    messages = [{"role": "user", "content": "1 + 1?"}]
    assert prompt_hash(messages) == prompt_hash([dict(messages[0])]) != prompt_hash("1 + 1?")
    assert prompt_hash("half of a pair \ud83d") == prompt_hash("half of a pair \ud83d")
