"""Rewards in a Ray cluster of several nodes: called in the same way as inline, none lost and none counted twice."""

from __future__ import annotations

import inspect
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scored import inputs, length, obeys, scorer_of

from rankup.rewards.config import RewardFunction
from rankup.rewards.contract import RewardError
from rankup.rewards.runner import Scorer

pytestmark = pytest.mark.ray

NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """Three nodes of two CPUs. One scorer holds the connection, so that Ray's workers live through all tests."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_ADDRESS", str(nodes.address))
        for _ in range(2):
            nodes.add_node(**NODE)
        nodes.wait_for_nodes()
        holder = scorer_of(length, isolation="ray")
        holder.start()
        yield nodes
        holder.close()
        nodes.shutdown()


@pytest.fixture
def make_ray_scorer(cluster, make_scorer) -> Callable[..., Scorer]:
    return partial(make_scorer, isolation="ray")


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def free_cpus() -> float:
    import ray

    return ray.available_resources().get("CPU", 0)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids_of(folder: Path, count: int) -> list[int]:
    """Process ids that `count` calls of `waits_for_go` have written."""
    wait_until(lambda: len(list(folder.glob("pid_*"))) >= count)
    return [int(file.name.removeprefix("pid_")) for file in folder.glob("pid_*")]


def waits_for_go(completions, folder, **kwargs):
    """Returns once there is a file `go`. A file `pid_<its process>` has Ray's process of the node in it."""
    mark = Path(folder[0], f"mark_{os.getpid()}")
    mark.write_text(os.environ["RAY_RAYLET_PID"])
    mark.rename(Path(folder[0], f"pid_{os.getpid()}"))
    while not Path(folder[0], "go").exists():
        time.sleep(0.02)
    return [float(len(completion)) for completion in completions]


# As inline


def test_the_same_scores_as_inline(make_ray_scorer):
    def logs(completions, answer, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("parsed", [a * 2 for a in answer])
        log_metric("step", trainer_state.global_step)
        return [None if a == 2 else float(a) for a in answer]

    data = inputs("x", "yy", "zzz", answer=["1", "2", "3"])
    functions = [logs, length, RewardFunction(function="last_integer", weight=3.0), "rankup.rewards.answers:exact_match"]
    assert make_ray_scorer(functions).score(data) == scorer_of(functions).score(data)


def test_results_come_in_the_order_of_the_calls(make_ray_scorer):
    def sleeps(completions, **kwargs):
        time.sleep(float(completions[0]))
        return [float(completions[0])]

    delays = [random.Random(seed).random() / 5 for seed in range(40)]
    assert make_ray_scorer(sleeps, rows_per_call=1, num_workers=6).score(inputs(*map(str, delays))).total == delays


def test_ray_and_processes_and_inline_together(make_ray_scorer):
    def process(completions, **kwargs):
        return [float(os.getpid())]

    functions = [partial(process) for _ in range(3)]
    for function, isolation in zip(functions, ("ray", "process", "inline"), strict=True):
        function.isolation = isolation  # type: ignore[attr-defined]
    by_function = make_ray_scorer(functions).score(inputs("a")).by_function
    assert len({rewards[0] for rewards in by_function.values()}) == 3
    assert by_function["process_3"] == [float(os.getpid())]


def test_a_function_and_the_files_it_imports_need_no_file_on_the_node(make_ray_scorer, tmp_path):
    (tmp_path / "neighbour_of_a_reward.py").write_text("value = 7\ndef length(text): return len(text)\n")
    (tmp_path / "reward.py").write_text(
        "import threading, neighbour_of_a_reward\nlock = threading.Lock()\n"
        "class Plus:\n"
        "    def __init__(self, amount): self.amount, self.cannot_be_sent = amount, threading.Lock()\n"
        "    def __call__(self, completions, **kwargs):\n"
        "        return [len(c) + neighbour_of_a_reward.value + self.amount for c in completions]\n"
        "def plain(completions):\n    from neighbour_of_a_reward import length\n"
        "    return [float(length(c)) for c in completions]\n"
    )
    file = tmp_path / "reward.py"
    entries = [RewardFunction(function=f"{file}:Plus", kwargs={"amount": 20}, name="plus"), f"{file}:plain"]
    scorer = make_ray_scorer(entries)
    for file in tmp_path.glob("*.py"):
        file.unlink()
    assert scorer.score(inputs("abc")).by_function == {"plus": [30.0], "plain": [3.0]}


def test_a_function_that_cannot_be_sent_is_an_error_that_names_it():
    lock = threading.Lock()

    def locked(completions):
        return [float(lock.locked())]

    with pytest.raises(ValueError, match=r"'locked' cannot be sent to other machines.*lock.*name it as file\.py:name.*inline"):
        scorer_of(locked, isolation="ray")


def test_processes_persist_and_concurrent_calls_are_limited(make_ray_scorer, tmp_path):
    def counts(completions, folder, log_extra, **kwargs):
        mark = Path(folder[0], completions[0])
        mark.touch()
        time.sleep(0.05)
        num_calls = len(list(mark.parent.iterdir()))
        mark.unlink()
        log_extra("pid", [os.getpid()])
        return [float(num_calls)]

    names = [str(number) for number in range(60)]
    data = inputs(*names, folder=[str(tmp_path)] * 60)
    scores = make_ray_scorer(counts, rows_per_call=1, num_workers=3).score(data)
    assert set(scores.total) <= {1.0, 2.0, 3.0} and 3.0 in scores.total
    assert len(set(scores.extras["pid"])) <= 6, "not one a call, but one a CPU"


def test_calls_run_where_trainers_hold_every_cpu(make_ray_scorer):
    from ray.util import placement_group, remove_placement_group

    held = placement_group([{"CPU": 2}] * 3)
    assert held.wait(60)
    wait_until(lambda: free_cpus() == 0)
    assert make_ray_scorer(length).score(inputs("abc")).total == [3.0]
    remove_placement_group(held)
    wait_until(lambda: free_cpus() == 6)


# Faults


@pytest.mark.slow
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_of_many_calls_none_is_lost_or_counted_twice_though_processes_are_killed(make_ray_scorer, tmp_path, count: int):
    """5 % of the calls kill, at the first attempt, their own process or the Ray worker that it belongs to."""

    def returns_its_number(completions, folder, **kwargs):
        number = int(completions[0])
        mark = Path(folder[0], str(number))
        if number % 18 == 0 and number < 0.9 * count and not mark.exists():
            mark.touch()
            os.kill(os.getpid() if number % 36 == 0 else os.getppid(), signal.SIGKILL)
            time.sleep(60)  # a process outlives its Ray worker for a moment
        time.sleep(0.05)
        with open(Path(folder[0], "ended"), "a") as file:
            file.write(f"{number}\n")
        return [float(number)]

    scorer = make_ray_scorer(returns_its_number, num_workers=6, retries=1)
    pending = [scorer.submit(inputs(str(number), folder=[str(tmp_path)])) for number in range(count)]
    assert [one.result().total for one in pending] == [[float(number)] for number in range(count)]
    assert len(list(tmp_path.iterdir())) == count // 20 + 1
    assert Counter(map(int, (tmp_path / "ended").read_text().split())) == Counter(range(count))


def test_calls_on_a_node_that_dies_are_made_again_elsewhere(cluster, make_ray_scorer, tmp_path):
    node = cluster.add_node(**NODE)
    raylet = str(node.all_processes["raylet"][0].process.pid)
    wait_until(lambda: free_cpus() == 8)
    scorer = make_ray_scorer(waits_for_go, num_workers=8)
    pending = [scorer.submit(inputs("x" * number, folder=[str(tmp_path)])) for number in range(12)]
    there = [pid for pid in pids_of(tmp_path, 8) if (tmp_path / f"pid_{pid}").read_text() == raylet]
    assert len(there) == 2
    cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: not any(runs(pid) for pid in there))
    (tmp_path / "go").touch()
    assert [one.result().total for one in pending] == [[float(number)] for number in range(12)]


def test_a_call_that_hangs_is_killed_and_does_not_delay_the_others(make_ray_scorer):
    scorer = make_ray_scorer(obeys, timeout=1.0, on_error="none")
    hung = scorer.submit(inputs("sleep 600", "fine"))
    others = [scorer.submit(inputs("fine")) for _ in range(20)]
    assert [other.result().total for other in others] == [[1.0]] * 20
    assert hung.result().total == [None, None]
    assert hung.result().errors == {"obeys": ["no answer in 1 s: its process was killed"] * 2}


def test_a_failed_call_is_reported_for_its_rows(make_ray_scorer):
    scorer = make_ray_scorer(obeys, on_error="none", rows_per_call=1, memory_gib=0.5)
    scores = scorer.score(inputs("fine", "raise it", "kill it", "exit 3", "allocate 2000"))
    assert scores.total == [1.0, None, None, None, None]
    assert scores.errors["obeys"][:4] == [
        None,
        "KeyError: 'it'",
        "its process died (killed by signal 9)",
        "its process died (exit status 3)",
    ]
    assert "MemoryError" in str(scores.errors["obeys"][4])


def test_an_exception_stops_with_function_rows_and_traceback(make_ray_scorer):
    with pytest.raises(RewardError, match=r"'obeys' failed on rows 0 to 1 \(first prompt: 'p'\): KeyError: 'gold'") as caught:
        make_ray_scorer(obeys).score(inputs("fine", "raise gold"))
    assert "raise KeyError(argument)" in str(caught.value) and "ray_pool" not in str(caught.value)


def test_a_call_that_takes_every_ray_worker_with_it_fails_in_the_end(make_ray_scorer):
    def kills_its_ray_worker(completions, **kwargs):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    scores = make_ray_scorer(kills_its_ray_worker, on_error="none").score(inputs("a"))
    assert scores.errors == {"kills_its_ray_worker": ["Ray could not run it (WorkerCrashedError)"]}


# Ends


def test_cancelled_calls_are_not_made(make_ray_scorer, tmp_path):
    def appends(completions, folder, **kwargs):
        Path(folder[0], completions[0]).touch()
        return waits_for_go(completions, folder)

    scorer = make_ray_scorer(appends, num_workers=1)
    first, *others = [scorer.submit(inputs(name, folder=[str(tmp_path)])) for name in "abcd"]
    pids_of(tmp_path, 1)
    for pending in others:
        pending.cancel()
    (tmp_path / "go").touch()
    assert first.result().total == [1.0]
    assert scorer.score(inputs("e", folder=[str(tmp_path)])).total == [1.0]
    assert {file.name for file in tmp_path.iterdir() if len(file.name) == 1} == {"a", "e"}


def test_closing_leaves_no_call_and_no_process_of_one(make_ray_scorer, tmp_path):
    def has_a_child(completions, folder, **kwargs):
        Path(folder[0], f"pid_{subprocess.Popen(['sleep', '600']).pid}").touch()
        return waits_for_go(completions, folder)

    scorer = make_ray_scorer(has_a_child, num_workers=3)
    pending = [scorer.submit(inputs("a", folder=[str(tmp_path)])) for _ in range(10)]
    pids = pids_of(tmp_path, 6)
    scorer.close()
    assert all(one.is_finished() for one in pending)
    wait_until(lambda: not any(runs(pid) for pid in pids))
    assert len(list(tmp_path.glob("pid_*"))) == 6, "no call began after the end"


def test_a_scorer_starts_again_after_it_was_closed(make_ray_scorer):
    scorer = make_ray_scorer(length)
    assert scorer.score(inputs("abc")).total == [3.0]
    scorer.close()
    scorer.close()
    assert scorer.score(inputs("ab")).total == [2.0]


def test_calls_end_with_a_trainer_that_is_killed(cluster, tmp_path):
    trainer = start_script(tmp_path, "scorer.submit(data).result()")
    pids = pids_of(tmp_path, 1)
    trainer.kill()
    trainer.communicate()
    wait_until(lambda: not any(runs(pid) for pid in pids))


@pytest.mark.slow
def test_a_cluster_started_by_the_scorer_is_quiet_and_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "go").touch()
    lines = """
        import ray, signal
        answer = lambda *_: None
        signal.signal(signal.SIGTERM, answer)
        print(scorer.submit(data).result().total)
        print("SIGTERM is left alone:", signal.getsignal(signal.SIGTERM) is answer)
        scorer.close()
        print("connected:", ray.is_initialized())
    """
    output, errors = start_script(tmp_path, lines).communicate(timeout=120)
    assert (output.splitlines(), errors) == (["[1.0]", "SIGTERM is left alone: True", "connected: False"], "")
    wait_until(lambda: not any(runs(int(file.read_text())) for file in tmp_path.glob("pid_*")))


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    script = start_script(tmp_path, "with contextlib.closing(scorer): scorer.submit(data).result()")
    pids = pids_of(tmp_path, 1)
    os.killpg(script.pid, signal.SIGINT)
    output, errors = script.communicate(timeout=60)
    assert output == "" and errors.splitlines()[-1] == "KeyboardInterrupt"
    pids += [int(file.read_text()) for file in tmp_path.glob("pid_*")]
    wait_until(lambda: not any(runs(pid) for pid in pids))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_does_not_answer_is_an_error_in_one_line(tmp_path, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    (tmp_path / "data.jsonl").write_text('{"completion": "1", "answer": "1"}\n')
    code = "import sys; from rankup.grpo.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["reward", "last_integer", "--data", "data.jsonl", "--isolation", "ray"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and f"no Ray cluster answers at RAY_ADDRESS={address}" in result.stderr


def start_script(folder: Path, lines: str) -> subprocess.Popen[str]:
    """A program with a scorer of `waits_for_go`, in a new session."""
    text = f"""
        import contextlib, os, sys, time
        from pathlib import Path
        from rankup.rewards import Inputs, RewardsConfig, Scorer
        data = Inputs(prompts=["p"], completions=["c"], completion_ids=[[1]], columns={{"folder": [{str(folder)!r}]}})
        config = RewardsConfig(functions={f"{folder}/reward.py:waits_for_go"!r}, isolation="ray", num_workers=2)
        scorer = Scorer(config)
    """
    (folder / "reward.py").write_text("import os, time\nfrom pathlib import Path\n\n" + inspect.getsource(waits_for_go))
    (folder / "script.py").write_text(textwrap.dedent(text) + textwrap.dedent(lines))
    return subprocess.Popen(
        [sys.executable, folder / "script.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
