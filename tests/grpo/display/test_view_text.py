import math

import pytest

from rankup.grpo.display.view_text import (
    as_number,
    decimal,
    dialogue,
    duration,
    evaluation_rewards,
    evaluation_text,
    guards_text,
    one_line,
    phases_of,
    seconds_text,
    shorten,
    sparkline,
    step_seconds,
    summary_text,
    whole,
    workers_text,
)


def test_one_line_replaces_control_characters():
    assert one_line("a\r\nb\tc\x1b[31m\u202ed") == "a⏎b c·[31m·d"


def test_shorten_keeps_both_ends():
    text = shorten("start" + "x" * 100 + "answer 42", 30)
    assert len(text) == 30
    assert text.startswith("start")
    assert text.endswith("answer 42")
    assert shorten("short", 30) == "short"


def test_sparkline_shows_the_complete_history_on_one_scale():
    assert sparkline([0.0, 0.5, 1.0], width=20) == "▁▅█"
    assert sparkline([0.0] * 50 + [1.0] * 50, width=4) == "▁▁██"
    assert sparkline([-2.0, 5.0, math.nan], width=20) == "▁█ "
    assert sparkline([3.0, 3.0], width=20) == "▁▁"
    assert sparkline([], width=20) == sparkline([math.nan], width=20) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (44.6, "45s"), (60, "1m00s"), (370, "6m10s"), (3600, "1h00m"), (90061, "25h01m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_guards_text_counts_alarms_and_actions():
    assert guards_text({"reward": 0.5, "guards/alarms": 0.0, "guards/learning_rate_factor": 1.0}) == ""
    counts = {"guards/alarms": 3.0, "guards/skipped_steps": 1.0, "guards/restores": 1.0}
    assert guards_text(counts) == "3 alarms, 1 skip, 1 restore"


@pytest.mark.parametrize(
    ("of_each", "text"),
    [
        ([], ""),
        ([812.4, 798], "812, 798 tok/s"),
        ([812, 798, 805, 12799], "812, 798, 805, 12799 tok/s"),
        ([812, 798, 805, 799, 0], "5 workers, 0 (rank 4) to 812 (rank 0) tok/s"),
        ([820, 800, 801, 780, 805, 806, 807, 808], "8 workers, 780 (rank 3) to 820 (rank 0) tok/s"),
        ([1200] * 11 + [900, 12000], "13 workers, 900 (rank 11) to 12,000 (rank 12) tok/s"),
    ],
)
def test_workers_text_is_by_rank_or_of_the_slowest_and_the_fastest(of_each, text):
    by_rank = [(f"workers/{rank}/tokens_per_second", speed) for rank, speed in enumerate(of_each)]
    in_another_order = dict(sorted(by_rank, reverse=True))
    assert workers_text({"tokens_per_second/rollout": 9000.0} | in_another_order) == text


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_an_unknown_number_is_a_dash(unknown):
    assert decimal(unknown) == whole(unknown) == "-"


def test_numbers_as_text():
    assert (decimal(0.4071), decimal(0.4071, 3), decimal(13, 1)) == ("0.41", "0.407", "13.0")
    assert (whole(812.4), whole(12045.6)) == ("812", "12,046")
    assert (seconds_text(3.14), seconds_text(0.1), seconds_text(0.012)) == ("3.1", "0.1", "0.01")
    assert as_number(2) == 2.0 and math.isnan(as_number(None))


def test_the_seconds_of_a_step_are_its_total_if_present():
    assert step_seconds({"rollout": 3.0, "train": 2.0}) == 5.0
    overlapping = {"rollout": 3.0, "train": 2.0, "total": 4.0}
    assert step_seconds(overlapping) == 4.0
    assert phases_of(overlapping) == {"rollout": 3.0, "train": 2.0}


@pytest.mark.parametrize(
    ("step", "when", "text"),
    [(0, "before", "before training"), (20, "during", "at step 20"), (80, "after", "after training")],
)
def test_evaluation_text(step, when, text):
    one_function = {"eval_reward": 0.57, "eval_rewards/exact/mean": 0.57, "eval_runtime": 3.0}
    assert evaluation_text(step, one_function, when) == f"evaluation {text}: reward 0.570"


TWO_FUNCTIONS = {"eval_reward": 0.4, "eval_rewards/answer/mean": 0.3, "eval_rewards/form/at/mean": 0.5}
TWO_SETS = {
    "eval_easy_reward": 0.6, "eval_easy_rewards/answer/mean": 0.5, "eval_easy_rewards/form/at/mean": 0.7,
    "eval_a_rewards_reward": 0.2, "eval_a_rewards_rewards/answer/mean": math.nan, "eval_a_rewards_rewards/form/at/mean": 0.2,
}  # fmt: skip


def test_an_evaluation_of_several_functions_and_sets_names_each():
    assert evaluation_text(8, TWO_FUNCTIONS, "during") == (
        "evaluation at step 8: reward 0.400 (answer 0.300, form/at 0.500)"
    )
    assert evaluation_text(8, TWO_FUNCTIONS | TWO_SETS, "during") == (
        "evaluation at step 8: reward 0.400 (answer 0.300, form/at 0.500); easy 0.600 (answer 0.500, form/at 0.700); "
        "a_rewards 0.200 (answer -, form/at 0.200)"
    )
    assert evaluation_text(8, {"eval_reward": 0.4, "eval_easy_reward": 0.6, "eval_hard_reward": 0.2}, "during") == (
        "evaluation at step 8: reward 0.400; easy 0.600; hard 0.200"
    )


def test_the_line_of_an_evaluation_has_its_interval_and_what_several_completions_say():
    bounds = {"eval_reward_low": 0.31, "eval_reward_high": 0.49}
    attempts = {"eval_pass@1": 0.4, "eval_pass@1_low": 0.3, "eval_pass@4": 0.7, "eval_maj@4": 0.45, "eval_easy_pass@4": 0.9}
    assert evaluation_text(8, TWO_FUNCTIONS | bounds | attempts, "during") == (
        "evaluation at step 8: reward 0.400 [0.310, 0.490] (answer 0.300, form/at 0.500); "
        "pass@1 0.400, pass@4 0.700, maj@4 0.450"
    )
    unknown = {"eval_reward": math.nan, "eval_reward_low": math.nan, "eval_reward_high": math.nan}
    assert evaluation_text(8, unknown, "during") == "evaluation at step 8: reward -"


def test_the_rewards_of_an_evaluation_have_the_form_of_the_summary():
    assert evaluation_rewards(TWO_FUNCTIONS) == {"reward": 0.4, "rewards": {"answer": 0.3, "form/at": 0.5}}
    sets = evaluation_rewards(TWO_FUNCTIONS | TWO_SETS)["sets"]
    assert list(sets) == ["easy", "a_rewards"]
    assert sets["easy"] == {"reward": 0.6, "rewards": {"answer": 0.5, "form/at": 0.7}}


def test_summary_text():
    rewards = {"before": {"reward": 0.109}, "after": {"reward": 0.86}}
    assert summary_text({"steps": 3, "seconds": {"total": 370}, "evaluation": rewards}) == (
        "done: 3 steps in 6m10s, evaluation reward 0.109 → 0.860"
    )
    before = {"reward": 0.2, "rewards": {"answer": 0.1, "form": 0.3}}
    after = {"reward": 0.5, "rewards": {"answer": 0.1, "form": 0.9}}
    with_sets = {"before": before, "after": {**after, "sets": {"easy": after}}}  # the run before had no names of sets
    assert summary_text({"steps": 3, "evaluation": with_sets}) == (
        "done: 3 steps in -, evaluation reward 0.200 → 0.500 (answer 0.100 → 0.100, form 0.300 → 0.900); "
        "easy - → 0.500"
    )
    only_before = {"before": before, "after": {"reward": None, "rewards": {}}}
    assert summary_text({"steps": 3, "evaluation": only_before}) == "done: 3 steps in -"
    only_after = {"steps": 3, "seconds": {"total": 370}, "evaluation": {"after": {"reward": 0.86}}}
    assert summary_text(only_after) == "done: 3 steps in 6m10s, evaluation reward 0.860"
    assert summary_text({"steps": 2, "interrupted": True}) == "stopped: 2 steps in -"


def called(name: str, arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_dialogue_has_one_line_for_each_message() -> None:
    messages = [
        {"role": "assistant", "content": "I\nadd.", "tool_calls": [called("add", {"a": 1, "b": "süß\n"}), called("now", None)]},
        {"role": "tool", "name": "add", "content": [{"type": "text", "text": "3\x1b[2J"}]},
        {"role": "tool", "content": ""},
        {"role": "user", "content": "higher"},
        {"role": "assistant", "tool_calls": [called("add", "{broken"), {"name": "flat", "arguments": {}}]},
        {"role": "assistant", "content": None},
    ]
    assert dialogue(messages) == [
        ("assistant", 'I⏎add.  add(a=1, b="süß\\n")  now()'),
        ("add", "3·[2J"),
        ("tool", "(nothing)"),
        ("user", "higher"),
        ("assistant", "add({broken)  flat()"),
        ("assistant", "(nothing)"),
    ]


@pytest.mark.parametrize("most", [3, 4, 7])
def test_a_long_dialogue_keeps_its_beginning_and_its_end(most: int) -> None:
    lines = dialogue([{"role": "user", "content": str(i)} for i in range(9)], most=most)
    assert len(lines) == most and lines[0] == ("user", "0") and lines[-1] == ("user", "8")
    assert ("", f"… {9 - most + 1} more messages") in lines
