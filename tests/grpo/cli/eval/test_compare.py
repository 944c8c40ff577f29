"""What `rankup compare` says of made-up evaluations: pairs, differences, prompts won and lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.algorithm.estimates import Estimate
from rankup.grpo.cli.eval.compare import comparison_text, find_results
from rankup.grpo.cli.eval.comparison import answers_of, compare
from rankup.grpo.run.evaluation_files import EvaluationRecord, PromptResult, SetResult

Row = tuple[str | None, str, Sequence[float | None], Sequence[str | None] | None]
FILES = [Path("a.json"), Path("b.json")]


def record_of(*rows: Row, pass_reward: float = 1.0, seed: int = 1, names: tuple[str, ...] = ("reward",)) -> EvaluationRecord:
    """A row is a prompt's set, its content, and rewards and answers of its completions."""
    prompts = [
        PromptResult(
            eval_set=name, hash=content, prompt=content, rewards=list(rewards), texts=["text"] * len(rewards),
            answers=None if answers is None else list(answers),
            functions={},
        )
        for name, content, rewards, answers in rows
    ]  # fmt: skip
    estimates = {name: Estimate(mean=0.0, low=0.0, high=0.0) for name in names}
    return EvaluationRecord(
        about={}, settings={"pass_reward": pass_reward, "seed": seed}, metrics={}, sets={}, prompts=prompts,
        all=SetResult(prompts=len(prompts), completions=0, estimates=estimates, functions={}),
    )  # fmt: skip


def test_prompts_are_paired_by_set_and_content():
    first = record_of(("x", "p", [0.0], None), ("y", "p", [1.0], None), (None, "only a", [1.0], None))
    second = record_of(("y", "p", [0.0], None), ("x", "p", [1.0], None), ("z", "p", [1.0], None))
    found = compare(first, second)
    assert (found.only_first, found.only_second) == (1, 1)
    assert [pair.first.eval_set for pair in found.won] == ["x"] and [pair.first.eval_set for pair in found.lost] == ["y"]
    assert list(found.sets) == ["x", "y"] and found.sets["x"]["reward"].difference.mean == 1.0


def test_the_same_prompt_several_times_is_paired_in_order():
    first = record_of(*[(None, "p", [float(n)], None) for n in range(3)])
    second = record_of(*[(None, "p", [float(n)], None) for n in range(2)])
    found = compare(first, second)
    assert len(found.equal) == 2 and found.only_first == 1


def test_a_prompt_without_a_reward_decides_nothing():
    first, second = record_of((None, "p", [None, 0.5], None)), record_of((None, "p", [None], None))
    found = compare(first, second)
    assert found.without_reward == 1 and found.all == {} and not (found.won or found.lost or found.equal)
    assert "there is nothing to compare" in comparison_text(FILES, found, most=5)


def test_pass_at_k_and_the_majority_are_compared_too():
    names = ("reward", "pass@1", "pass@2", "maj@2")
    first = record_of((None, "p", [0.0, 1.0], ["a", "b"]), pass_reward=1.0, names=names)
    second = record_of((None, "p", [0.5, 0.5], ["b", "b"]), pass_reward=0.5, names=names)
    found = compare(first, second)
    assert {name: (one.first, one.second) for name, one in found.all.items()} == {
        "reward": (0.5, 0.5), "pass@1": (0.5, 1.0), "pass@2": (1.0, 1.0), "maj@2": (0.5, 1.0),
    }  # fmt: skip
    assert found.settings == {"pass_reward": (1.0, 0.5)}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), max_size=12), st.integers(0, 12))
def test_every_prompt_is_counted_once(rows: list[tuple[int, float]], cut: int):
    first = record_of(*[(None, f"p{n}", [reward], None) for n, reward in rows])
    second = record_of(*[(None, f"p{n}", [1 - reward], None) for n, reward in rows[cut:]])
    found = compare(first, second)
    paired = len(found.won) + len(found.lost) + len(found.equal)
    assert paired + found.only_first == len(rows) and paired + found.only_second == len(rows[cut:])
    opposite = compare(second, first)
    assert len(opposite.won) == len(found.lost) and len(opposite.lost) == len(found.won)
    for name, one in found.all.items():
        difference = one.difference
        assert difference.low <= difference.mean <= difference.high
        assert opposite.all[name].difference.mean == pytest.approx(-difference.mean)


def test_the_text_shows_some_prompts_with_their_answers():
    rows = [(None, f"question {n}", [0.0, 0.0], ["3", None]) for n in range(7)]
    first = record_of(*rows)
    second = record_of(*[(None, content, [1.0, 0.0], ["4", "4"]) for _, content, *_ in rows])
    found = compare(first, second)
    text = comparison_text(FILES, found, most=5)
    assert "7 prompts in both\n" in text and "B against A: won 7, lost 0, equal 0" in text
    assert "won, the first 5 of 7 (--all shows all):\n  question 0\n    A 0.00  3 ×1, (no answer) ×1\n    B 0.50  4 ×2" in text
    assert "question 5" not in text and "question 6" in comparison_text(FILES, found, most=None)
    assert "reward  0.000  0.500  +0.500 [+0." in text


def test_answers_of_a_single_completion_have_no_number():
    assert answers_of(record_of((None, "p", [1.0], ["4"])).prompts[0]) == "4"
    assert answers_of(record_of((None, "p", [1.0], None)).prompts[0]) == "text"


def test_results_of_a_folder(tmp_path: Path):
    folder = tmp_path / "run" / "evaluations"
    folder.mkdir(parents=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000020"
    checkpoint.mkdir(parents=True)
    for path in (tmp_path / "run", checkpoint):
        with pytest.raises(ValueError, match="has no results of an evaluation: rankup eval"):
            find_results(path)
    for name in ("eval_step_000020_greedy", "step_000020", "step_000040", "eval_adapter_greedy"):
        (folder / f"{name}.json").touch()
    assert find_results(tmp_path / "run").name == "step_000040.json"
    assert find_results(checkpoint).name == "step_000020.json"
    (folder / "step_000040_after.json").touch()
    assert find_results(tmp_path / "run").name == "step_000040_after.json"
    (folder / "step_000020.json").unlink()
    assert find_results(checkpoint).name == "eval_step_000020_greedy.json"
