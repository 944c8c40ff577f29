"""Rewards in processes are called in the same way as inline, and a failure affects only its rows."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time

import pytest
from scored import inputs, length, obeys, scorer_of

from rankup.rewards.config import RewardFunction
from rankup.rewards.contract import RewardError
from rankup.rewards.loading import load_object

# As inline


def test_the_same_scores_as_inline(make_scorer):
    def logs(completions, answer, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("parsed", [a * 2 for a in answer])
        log_metric("step", trainer_state.global_step)
        return [None if a is None else float(a) for a in (a if a != 2 else None for a in answer)]

    data = inputs("x", "yy", "zzz", answer=[1, 2, 3])
    functions = [logs, length, RewardFunction(function="rankup.rewards.answers:last_integer", weight=3.0)]
    inline = scorer_of(functions).score(data)
    assert make_scorer(functions).score(data) == inline
    assert inline.extras == {"parsed": [2, 4, 6], "extracted_answer": [None, None, None]}
    assert inline.metrics == {"rewards/logs/step": 3.0}
    assert inline.by_function["logs"] == [1.0, None, 3.0]


def test_functions_run_on_the_main_thread_of_another_process(make_scorer):
    def where(completions, **kwargs):
        previous = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(0)  # only allowed on a main thread
        signal.signal(signal.SIGALRM, previous)
        return [float(os.getpid()), float(threading.current_thread() is threading.main_thread())]

    process, is_main = make_scorer(where).score(inputs("a", "b")).total
    assert process != os.getpid() and is_main == 1.0


def test_processes_persist(make_scorer):
    def process(completions, **kwargs):
        return [float(os.getpid())]

    scorer = make_scorer(process, num_workers=1)
    assert scorer.score(inputs("a")).total == scorer.score(inputs("b")).total


def test_files_next_to_the_file_and_arguments_of_a_factory_reach_the_process(make_scorer, tmp_path):
    (tmp_path / "helper_of_a_reward.py").write_text("value = 7\n")
    (tmp_path / "reward.py").write_text(
        "import helper_of_a_reward\ndef plus(amount):\n    def reward(completions, **kwargs):\n"
        "        return [helper_of_a_reward.value + amount] * len(completions)\n    return reward\n"
    )
    entry = RewardFunction(function=f"{tmp_path}/reward.py:plus", kwargs={"amount": 2}, name="mine")
    scores = make_scorer(entry).score(inputs("a"))
    assert scores.by_function == {"mine": [9.0]}


def test_async_functions_run_in_the_trainer_s_process(make_scorer):
    async def process(completions, **kwargs):
        return [float(os.getpid())]

    assert make_scorer(process).score(inputs("a")).total == [float(os.getpid())]


def test_a_scorer_starts_again_after_it_was_closed(make_scorer):
    scorer = make_scorer(length)
    assert scorer.score(inputs("abc")).total == [3.0]
    scorer.close()
    scorer.close()
    assert scorer.score(inputs("ab")).total == [2.0]


# Faults


def test_an_exception_stops_with_function_rows_and_traceback(make_scorer):
    scorer = make_scorer(obeys)
    with pytest.raises(RewardError, match=r"'obeys' failed on rows 0 to 1 \(first prompt: 'p'\): KeyError: 'gold'") as caught:
        scorer.score(inputs("fine", "raise gold"))
    assert "in obeys" in str(caught.value) and "raise KeyError(argument)" in str(caught.value)
    assert "contract.py" not in str(caught.value), "only frames of the user's code"
    assert scorer.score(inputs("fine")).total == [1.0], "the process lives on"


def test_a_bad_value_is_a_value_error_as_inline(make_scorer):
    def few(completions):
        return []

    with pytest.raises(ValueError, match="'few' returned 0 rewards for 1 completions"):
        make_scorer(few).score(inputs("a"))


def test_a_call_that_hangs_is_killed_and_does_not_delay_the_others(make_scorer):
    scorer = make_scorer(obeys, timeout=1.0, on_error="none")
    scorer.score(inputs("fine"))  # the processes have started
    started = time.monotonic()
    hung = scorer.submit(inputs("sleep 600", "fine"))
    others = [scorer.submit(inputs("fine")) for _ in range(20)]
    assert [other.result().total for other in others] == [[1.0]] * 20
    assert not hung.is_finished()
    scores = hung.result()
    assert time.monotonic() - started < 30
    assert scores.total == [None, None]
    assert scores.errors == {"obeys": ["no answer in 1 s: its process was killed"] * 2}


def test_a_very_long_time_limit_works(make_scorer):
    assert make_scorer(length, timeout=1e9).score(inputs("ab")).total == [2.0]


def test_a_partial_of_a_function_from_a_file(make_scorer, tmp_path):
    text = "def scaled(completions, factor, **kwargs):\n    return [factor * len(c) for c in completions]\n"
    (tmp_path / "mine.py").write_text(text)
    scaled = load_object(f"{tmp_path}/mine.py:scaled")
    assert callable(scaled)
    assert make_scorer(functools.partial(scaled, factor=2.0)).score(inputs("abc")).total == [6.0]


def test_a_number_on_error_is_the_reward_of_the_call_s_rows(make_scorer):
    scorer = make_scorer([obeys, length], on_error=-1.0, weights=[1.0, 0.1])
    scores = scorer.score(inputs("raise it", "fine"))
    assert scores.by_function["obeys"] == [-1.0, -1.0]
    assert scores.total == pytest.approx([-1.0 + 0.8, -1.0 + 0.4])
    assert list(scores.errors) == ["obeys"]


def test_with_one_row_per_call_a_failure_costs_one_row(make_scorer):
    scorer = make_scorer(obeys, on_error="none", rows_per_call=1)
    scores = scorer.score(inputs("fine", "raise it", "fine"))
    assert scores.total == [1.0, None, 1.0]
    assert scores.errors == {"obeys": [None, "KeyError: 'it'", None]}
    stops = make_scorer(obeys, rows_per_call=1)
    with pytest.raises(RewardError, match="failed on row 1 "):
        stops.score(inputs("fine", "raise it"))


def test_retries(make_scorer, tmp_path):
    def at_last(completions, path, **kwargs):
        with open(path[0], "a") as file:
            file.write("x")
        with open(path[0]) as file:
            calls = len(file.read())
        if calls == 1:
            os._exit(1)
        if calls == 2:
            raise OSError
        return [float(calls)]

    path = [str(tmp_path / "calls")]
    assert make_scorer(at_last, retries=2).score(inputs("a", path=path)).total == [3.0]
    (tmp_path / "calls").unlink()
    with pytest.raises(RewardError, match="OSError"):
        make_scorer(at_last, retries=1).score(inputs("a", path=path))


def test_a_function_that_cannot_be_loaded_there_fails_only_its_calls(make_scorer, tmp_path):
    (tmp_path / "only_here.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: raise RuntimeError('not in this process')\ndef f(**kw): return [0.0]\n"
    )
    scorer = make_scorer([length, f"{tmp_path}/only_here.py:f"], on_error="none")
    scores = scorer.score(inputs("abc"))
    assert scores.total == [3.0] and list(scores.errors) == ["f"]
    assert "not in this process" in str(scores.errors)


def test_a_file_that_is_changed_during_the_run_fails_its_calls(make_scorer, tmp_path):
    text = "import os\ndef f(completions):\n    os._exit(1) if completions[0] == 'die' else None\n    return [1.0]\n"
    (tmp_path / "mine.py").write_text(text)
    scorer = make_scorer(f"{tmp_path}/mine.py:f", num_workers=1, on_error="none")
    assert scorer.score(inputs("a")).total == [1.0]
    (tmp_path / "mine.py").write_text("def f(completions): return [7.0]\n")
    scorer.score(inputs("die"))
    assert "has changed since the run began" in str(scorer.score(inputs("a")).errors)


def test_a_function_that_cannot_be_pickled_is_an_error_that_names_it():
    lock = threading.Lock()

    def holds(completions, **kwargs):
        return [float(lock.locked())]

    with pytest.raises(ValueError, match=r"'holds' cannot be sent to a process.*inline"):
        scorer_of(holds, isolation="process")
    holds.isolation = "inline"  # type: ignore[attr-defined]
    assert scorer_of(holds, isolation="process").score(inputs("a")).total == [0.0]
