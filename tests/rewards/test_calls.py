"""One call of a reward function, inline, async, in a process: its own copies of the arguments, and failures by exit."""

import asyncio
import functools
import os
import signal
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scored import inputs, scorer_of

from rankup.grpo.common.interrupts import Interrupts, RunInterrupted
from rankup.rewards.contract import History, Inputs, RewardError, call


def run(function: Any, isolation: str, **options: Any) -> Any:
    """A scorer of the function (as an async one, inline, or in a process), closed by the caller."""
    if isolation == "async":

        @functools.wraps(function)
        async def runs(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            return function(*args, **kwargs)

        return scorer_of(runs, **options)
    return scorer_of(function, isolation=isolation, num_workers=1, **options)


@pytest.fixture(params=["inline", "async", "process"])
def isolation(request: pytest.FixtureRequest) -> str:
    return request.param


# -------------------------------------------------------------------------------------------------------- copies


def spoils(prompts, completions, completion_ids, tests, facts, trainer_state, **kwargs):
    """Pops and sets whatever it can reach; its rewards tell that it was the first to do so."""
    rewards = []
    for prompt, completion, ids, codes, fact in zip(prompts, completions, completion_ids, tests, facts, strict=True):
        complete = (
            len(prompt) == len(completion) == 1 and len(codes) == 2 and fact["deep"] == ([1], {"x": 2}) and ids[-1:] == [9]
        )
        rewards.append(float(complete and trainer_state.log_history == [{"reward": 1.0}]))
        prompt[0]["content"] = completion[0]["content"] = "spoiled"
        prompt.pop()
        completion.pop()
        ids.clear()
        codes.pop()
        fact["deep"][0].clear()
        fact["deep"][1].clear()
    prompts.clear()
    tests.clear()
    trainer_state.log_history[0].clear()
    return rewards


def test_no_call_changes_what_other_completions_functions_and_the_caller_see(isolation: str):
    prompt, tests, fact = [{"role": "user", "content": "?"}], ["a", "b"], {"deep": ([1], {"x": 2})}
    data = Inputs(
        prompts=[prompt] * 3,  # as the trainer passes them: one object for all completions of a prompt
        completions=[[{"role": "assistant", "content": "!"}] for _ in range(3)],
        completion_ids=[[1, 9]] * 3,
        columns={"tests": [tests] * 3, "facts": [fact] * 3},
        trainer_state={"log_history": History([{"reward": 1.0}])},
    )

    def again(*args: Any, **kwargs: Any) -> Any:
        return spoils(*args, **kwargs)

    scorer = run(spoils, isolation)
    try:
        for _ in range(2):
            assert scorer.score(data).total == [1.0, 1.0, 1.0]
        assert scorer_of([spoils, again]).score(data).total == [2.0, 2.0, 2.0]
    finally:
        scorer.close()
    assert (prompt, tests, fact) == ([{"role": "user", "content": "?"}], ["a", "b"], {"deep": ([1], {"x": 2})})
    assert data.completions[0] == [{"role": "assistant", "content": "!"}]


def test_copies_of_large_columns_are_cheap():
    def reads(completions, tests, **kwargs):
        return [0.0] * len(completions)

    tests = [f"assert f({number}) == {number}" + " " * 1000 for number in range(100)]
    data = inputs(*["x"] * 256, tests=[tests] * 256)
    call("reads", reads, data)
    started = time.perf_counter()
    call("reads", reads, data)
    assert time.perf_counter() - started < 0.1, "256 copies of a list of 100 texts of 1 kB"


# -------------------------------------------------------------------------------------------------------- exits


class Ends(BaseException):
    """As pytest's or trio's: no Exception."""


def ends(completions, **kwargs):
    how = completions[0]
    if how == "code":
        exec("import sys\nsys.exit()")
    if how == "raise":
        raise SystemExit("enough")
    if how == "other":
        raise Ends("of its own")
    if how == "generator":
        raise GeneratorExit
    return [1.0]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("code", r"SystemExit: .*sys\.exit\(\) was called"),
        ("raise", "SystemExit: enough"),
        ("other", "Ends: of its own"),
        ("generator", "GeneratorExit"),
    ],
)
def test_an_exit_is_a_failure_of_the_function_by_name(isolation: str, how: str, reason: str):
    scorer = run(ends, isolation)
    try:
        with pytest.raises(RewardError, match=rf"(?s)reward function 'ends' failed on row 0 .*{reason}"):
            scorer.score(inputs(how))
        assert scorer.score(inputs("fine")).total == [1.0]
    finally:
        scorer.close()


def test_a_task_of_an_async_function_that_exits_does_not_end_the_event_loop():
    async def gathers(completions, **kwargs):
        async def exits():
            raise SystemExit(3)

        if completions[0] == "exit":
            await asyncio.gather(exits())
        return [1.0]

    scorer = scorer_of(gathers, on_error="none")
    try:
        assert scorer.score(inputs("exit")).errors == {"gathers": ["SystemExit: 3 (sys.exit() was called)"]}
        assert scorer.score(inputs("fine")).total == [1.0]
    finally:
        scorer.close()


def test_keyboard_interrupt_of_a_function_is_its_failure_where_ctrl_c_has_a_handler():
    def raises(completions, **kwargs):
        raise KeyboardInterrupt

    interrupts = Interrupts()
    with interrupts.handled(), interrupts.deferred(), pytest.raises(RewardError, match="KeyboardInterrupt"):
        scorer_of(raises).score(inputs("x"))
    with pytest.raises(KeyboardInterrupt):  # Python's own handler: it may be Ctrl-C
        scorer_of(raises).score(inputs("x"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_call_is_no_failure(number: signal.Signals):
    def is_interrupted(completions, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(5)
        return [1.0]

    interrupts, scorer = Interrupts(), scorer_of(is_interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        with interrupts.handled(), interrupts.deferred(), interrupts.interruptible(), pytest.raises(RunInterrupted):
            scorer.score(inputs("x"))
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                scorer.score(inputs("x"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_fork_that_exits_inside_a_function_does_not_go_on_as_the_trainer(tmp_path):
    def forks(completions, **kwargs):
        child = os.fork()
        if child == 0:
            raise SystemExit(7)
        return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))]

    test = os.getpid()
    try:
        assert scorer_of(forks).score(inputs("x")).total == [7.0]
    except SystemExit as error:  # here is the child
        os._exit(int(error.code or 0) if os.getpid() != test else 99)
    scorer = scorer_of(forks, isolation="process", num_workers=1)
    assert scorer.score(inputs("x")).total == [7.0]
    scorer.close()


# -------------------------------------------------------------------------------------------------------- hints


def spread(completions, **kwargs):
    return [statistics.stdev([len(c) for c in completions])] * len(completions)


def divides(completions, **kwargs):
    return [1.0 / (len(completions) - 1)] * len(completions)


def nan(completions, **kwargs):
    return [np.std([len(c) for c in completions], ddof=1)] * len(completions) if len(completions) > 1 else [float("nan")]


@pytest.mark.parametrize("function", [spread, divides, nan])
def test_a_spread_over_a_single_completion_is_explained(isolation: str, function: Any):
    scorer = run(function, isolation)
    try:
        with pytest.raises((RewardError, ValueError), match=r"single completion, .*data\.eval_samples"):
            scorer.score(inputs("x"))
        assert len(scorer.score(inputs("x", "yy", "zzz")).total) == 3
    finally:
        scorer.close()


def test_other_failures_of_a_single_completion_have_no_such_hint():
    with pytest.raises(RewardError) as caught:
        scorer_of(ends).score(inputs("raise"))
    assert "single completion" not in str(caught.value)


def test_trainer_state_is_an_object_of_its_own():
    seen = []

    def keeps(completions, trainer_state, **kwargs):
        assert isinstance(trainer_state, SimpleNamespace)
        seen.append(trainer_state)
        trainer_state.global_step += 1
        return [0.0]

    scorer = scorer_of(keeps)
    for _ in range(2):
        scorer.score(inputs("x"))
    assert [state.global_step for state in seen] == [4, 4]
