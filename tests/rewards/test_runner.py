import asyncio
import functools
import math
import threading
import time

import numpy as np
import pytest
import torch
from scored import scorer_of

from rankup.rewards.contract import Inputs


def score(functions, completions=("a", "bb", "ccc"), *, weights=None, trainer_state=None, **columns):
    return scorer_of(functions, weights=weights).score(inputs(completions, trainer_state=trainer_state, **columns))


def inputs(completions=("a", "bb", "ccc"), *, trainer_state=None, **columns):
    return Inputs(
        prompts=["p"] * len(completions),
        completions=list(completions),
        completion_ids=[[1] * len(c) for c in completions],
        columns=columns,
        trainer_state=trainer_state or {},
    )


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


# ------------------------------------------------------------------------------------------ the call


def test_everything_is_passed_by_keyword():
    seen = {}

    def reward(*args, **kwargs):
        seen.update(kwargs, args=args)
        return [0.0, 0.0]

    score(reward, ["x", "y"], answer=[4, 5], level=["easy", "hard"], trainer_state={"global_step": 3})
    assert set(seen) == {
        *("args", "prompts", "completions", "completion_ids"),
        *("answer", "level", "trainer_state", "log_extra", "log_metric"),
    }
    assert seen["args"] == ()
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (["p", "p"], ["x", "y"], [[1], [1]])
    assert (seen["answer"], seen["level"]) == ([4, 5], ["easy", "hard"])
    assert seen["trainer_state"].global_step == 3


def test_a_function_without_kwargs_gets_the_arguments_that_it_names():
    def reward(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    assert score(reward, ["x", "y"], answer=["x", "x"], unused=[0, 0]).total == [1.0, 0.0]


def test_a_partial_and_a_method_and_an_object_can_be_rewards():
    class Judge:
        def __call__(self, completions, **kwargs):
            return [1.0 for _ in completions]

        def method(self, completions):
            return [2.0 for _ in completions]

    def scaled(completions, factor, **kwargs):
        return [factor for _ in completions]

    scores = score([functools.partial(scaled, factor=3.0), Judge(), Judge().method], ["x"])
    assert scores.by_function == {"scaled": [3.0], "Judge": [1.0], "method": [2.0]}
    assert scores.total == [6.0]


def test_a_column_that_is_missing_is_named():
    def reward(completions, solution, **kwargs):
        return [0.0]

    with pytest.raises(ValueError, match=r"'reward' requires 'solution', which is not a column .*\(columns: answer\)"):
        score(reward, ["x"], answer=[1])
    with pytest.raises(ValueError, match="'solution'"):
        scorer_of(reward).check_columns(["answer"])
    scorer_of(reward).check_columns(["solution"])


def test_a_column_cannot_replace_an_argument():
    with pytest.raises(ValueError, match="data column 'completions' has the name of"):
        scorer_of(length).check_columns(["answer", "completions"])


def test_columns_of_another_length_are_an_error():
    with pytest.raises(ValueError, match="answer has 1 values for 2 completions"):
        score(length, ["x", "y"], answer=[1])


# ------------------------------------------------------------------------------------------ sums


def test_weights_and_none():
    def even_only(completions, **kwargs):
        return [None if len(c) % 2 else 10.0 for c in completions]

    def never(completions, **kwargs):
        return [None for _ in completions]

    scores = score([length, even_only, never], weights=[1.0, 0.5, 7.0])
    assert scores.total == [1.0, 7.0, 3.0]
    assert scores.by_function["even_only"] == [None, 10.0, None]
    assert score([even_only, never]).total == [None, 10.0, None]


def test_functions_of_one_name_stay_apart():
    def named(name, value):
        def function(completions, **kwargs):
            return [value] * len(completions)

        function.__name__ = name
        return function

    functions = [named("f", 1.0), named("f", 2.0), named("f_2", 4.0), named("f", 8.0)]
    scores = score(functions, ["x"])
    assert list(scores.by_function) == scorer_of(functions).names
    assert scores.by_function == {"f": [1.0], "f_3": [2.0], "f_2": [4.0], "f_4": [8.0]}
    assert scores.total == [15.0]


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.0, True],
        (1.0, 0.0, 1.0),
        np.array([1.0, 0.0, 1.0], dtype=np.float32),
        [np.int64(1), np.float16(0), np.bool_(True)],
        torch.tensor([1.0, 0.0, 1.0]),
        [torch.tensor(1.0), torch.tensor(0), torch.tensor(True)],
        (float(x) for x in (1, 0, 1)),
    ],
)
def test_numbers_of_all_kinds_become_floats(values):
    total = score(lambda completions: values).total
    assert total == [1.0, 0.0, 1.0]
    assert all(type(value) is float for value in total)


# ------------------------------------------------------------------------------------------ wrong results


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, []])
def test_a_wrong_length_names_the_function(values):
    def short(completions):
        return values

    with pytest.raises(ValueError, match=rf"'short' returned {len(values)} rewards for 3 completions"):
        score(short)


@pytest.mark.parametrize("value", ["1.0", "no", math.nan, math.inf, [1.0], {}, 1j, object(), torch.zeros(2)])
def test_the_error_for_a_value_that_is_not_a_finite_number_names_function_and_row(value):
    def odd(completions):
        return [0.0, value, 0.0]

    with pytest.raises(ValueError, match=r"'odd' returned .* for row 1: return a finite number"):
        score(odd)


@pytest.mark.parametrize("value", [None, 1.0, "abc", {0: 1.0, 1: 1.0, 2: 1.0}])
def test_the_error_for_a_result_that_is_not_a_list_names_the_function(value):
    def single(completions):
        return value

    with pytest.raises(
        ValueError, match=r"'single' returned .*: return a list with one number or None for each of the 3"
    ):
        score(single)


def test_an_exception_names_function_rows_and_prompt_and_keeps_its_cause():
    def broken(completions):
        raise KeyError("gold")

    async def broken_async(completions):
        raise KeyError("gold")

    for function in (broken, broken_async):
        expected = rf"'{function.__name__}' failed on rows 0 to 2 \(first prompt: 'p'\): KeyError: 'gold'"
        with pytest.raises(RuntimeError, match=expected) as caught:
            score([length, function])
        assert isinstance(caught.value.__cause__, KeyError)


def test_the_error_of_a_function_that_expects_texts_says_how_to_read_messages():
    def strips(completions, **kwargs):
        return [float(completion.strip() == "4") for completion in completions]

    with pytest.raises(RuntimeError, match=r"completions are messages here: use `completion\[-1\]\[\"content\"\]`"):
        score(strips, [conversation("4")])

    def sees_something_else(completions, **kwargs):
        return [["a list"].strip()]  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match="no attribute 'strip'") as caught:
        score(sees_something_else, ["4"])
    assert "messages" not in str(caught.value)


def test_functions_and_weights_are_checked_by_the_constructor():
    with pytest.raises(ValueError, match="no reward functions"):
        scorer_of([])
    with pytest.raises(ValueError, match="1 reward weights for 2 reward functions"):
        scorer_of([length, length], weights=[1.0])
    with pytest.raises(ValueError, match="finite number"):
        scorer_of([length], weights=[math.nan])
    with pytest.raises(FileNotFoundError):
        scorer_of(["no_such_file.py:f"])


# ------------------------------------------------------------------------------------------ async


def test_async_functions_of_all_kinds_run_together():
    running = 0
    most = 0

    async def wait(completions, value, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return [value] * len(completions)

    class Judge:
        async def __call__(self, completions, **kwargs):
            return await wait(completions, 4.0)

    judge = Judge()
    scores = score([functools.partial(wait, value=1.0), length, judge, functools.partial(judge)], ["x"])
    assert most == 3
    assert scores.by_function == {"wait": [1.0], "length": [1.0], "Judge": [4.0], "Judge_2": [4.0]}


def test_closing_cancels_async_calls_and_ends_their_thread():
    before = set(threading.enumerate())
    started, ended = threading.Event(), threading.Event()

    async def waits(completions):
        started.set()
        try:
            await asyncio.sleep(30 if completions[0] == "long" else 0)
        except asyncio.CancelledError:
            ended.set()
            raise
        return [1.0]

    scorer = scorer_of(waits, retries=2)
    scorer.submit(inputs(["long"]))
    assert started.wait(60)
    scorer.close()
    assert ended.is_set() and set(threading.enumerate()) <= before
    assert scorer.score(inputs(["short"])).total == [1.0]
    scorer.close()


def test_an_isolation_that_does_not_exist_is_refused_on_a_callable_too():
    def length(completions):
        return [1.0]

    length.isolation = "proces"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'length': isolation must be inline, process or ray \(got 'proces'\)"):
        scorer_of(length)


def test_async_functions_run_on_the_same_event_loop_in_every_call():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0]

    scorer = scorer_of(reward)
    for _ in range(2):
        scorer.score(inputs(["c"]))
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


def test_async_functions_run_where_the_caller_has_an_event_loop():
    async def reward(completions):
        return [2.0]

    async def notebook():
        return score(reward, ["x"])

    assert asyncio.run(notebook()).total == [2.0]


def test_one_async_failure_leaves_nothing_running():
    finished = []

    async def fails(completions):
        raise ValueError("no")

    async def slow(completions):
        await asyncio.sleep(0.05)
        finished.append(time.monotonic())
        return [0.0]

    with pytest.raises(RuntimeError, match="'fails'"):
        score([slow, fails], ["x"])
    assert finished


# ------------------------------------------------------------------------------------------ logs


def test_extra_columns_and_metrics_are_collected():
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("parsed", [c.upper() for c in completions])
        log_metric("accuracy", 0.0)
        log_metric("accuracy", 1)
        return [0.0] * len(completions)

    async def judge(completions, log_extra, log_metric):
        log_extra("verdict", np.array([1, 2, 3]))
        log_metric("cost", np.float32(2))
        return [0.0] * len(completions)

    scores = score([reward, judge])
    assert scores.extras == {"parsed": ["A", "BB", "CCC"], "verdict": [1, 2, 3]}
    assert scores.metrics == {"accuracy": 0.5, "cost": 2.0}


def test_an_extra_column_of_the_wrong_length_is_an_error():
    def reward(completions, log_extra):
        log_extra("parsed", ["only one"])
        return [0.0] * len(completions)

    with pytest.raises(RuntimeError, match=r"log_extra\('parsed'\) in reward function 'reward' got 1 values for 3"):
        score(reward)


# ------------------------------------------------------------------------------------------ TRL's functions


def conversation(text):
    return [{"role": "assistant", "content": text}]


def test_trl_think_format_reward_runs_by_import_path():
    completions = [conversation("<think>\n3 + 4\n</think>\n7"), conversation("7")]
    scores = score("trl.rewards:think_format_reward", completions)
    assert scores.by_function == {"think_format_reward": [1.0, 0.0]}


def test_trl_accuracy_reward_runs_by_import_path():
    pytest.importorskip("math_verify")
    completions = [conversation(r"\boxed{42}"), conversation(r"\boxed{41}")]
    assert score("trl.rewards:accuracy_reward", completions, solution=["$42$", "$42$"]).total == [1.0, 0.0]


def test_trl_reward_objects_run_from_a_users_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment\n"
        "overlong = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)\n"
        "repetition = get_repetition_penalty_reward(ngram_size=1, max_penalty=-1.0)\n"
    )
    scores = score([f"{file}:overlong", f"{file}:repetition"], ["a", "aaa", "aaaaa"])
    overlong, repetition = scores.by_function.values()
    assert overlong == [0.0, -0.5, -1.0]
    assert repetition == pytest.approx([0.0, -2 / 3, -4 / 5])


def test_timeouts_and_cancellations_inside_an_async_function_are_its_failures():
    async def inner_limit(completions, **kwargs):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)

    async def cancels(completions, **kwargs):
        task = asyncio.create_task(asyncio.sleep(10))
        task.cancel()
        await task

    async def slow(completions, **kwargs):
        await asyncio.sleep(60)

    scores = scorer_of([inner_limit, cancels, slow], timeout=1.0, on_error="none").score(inputs(["a"]))
    assert scores.total == [None]
    assert scores.errors["inner_limit"] == ["TimeoutError: "]
    assert "CancelledError" in str(scores.errors["cancels"])
    assert scores.errors["slow"] == ["no answer in 1 s: it was cancelled"]
