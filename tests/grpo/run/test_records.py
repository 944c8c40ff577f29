import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from made_episodes import DIALOGUE, TRACEBACK, VOID, call, completion_of, group_of, played

from rankup.grpo.common.files import atomic_write
from rankup.grpo.experience.step_metrics import completions_table
from rankup.grpo.run import run_folder
from rankup.grpo.run.completions import read_completions, write_completions
from rankup.grpo.run.records import RunRecorder, read_metrics
from rankup.grpo.run.run_folder import locked_folder
from rankup.rewards.combining import Scores

TABLE = {
    "prompt": ["What is 1 + 1?", "What is 1 + 1?"],
    "completion": ["2", "drei"],
    "advantage": [0.7, -0.7],
    "reward": [1.0, 0.0],
    "finish_reason": ["stop", "length"],
    "num_tokens": [2, 24],
}


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[RunRecorder]:
    with closing(RunRecorder(tmp_path / "runs" / "first", config_yaml="seed: 42\n")) as recorder:
        yield recorder


def strict_json(text: str):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_new_folder_has_the_configuration(recorder):
    assert (recorder.output_dir / "config.yaml").read_text() == "seed: 42\n"
    assert recorder.moved_aside is None
    assert recorder.adapter_dir == recorder.output_dir / "adapter"


def test_earlier_runs_are_moved_aside_unchanged(tmp_path):
    folder = tmp_path / "run"
    moved = []
    for seed in range(3):
        recorder = RunRecorder(folder, config_yaml=f"seed: {seed}\n")
        recorder.step(1, {"reward": float(seed)})
        moved.append(recorder.moved_aside)
        recorder.close()
    assert moved == [None, tmp_path / "run.1", tmp_path / "run.2"]
    for name, seed in (("run.1", 0), ("run.2", 1), ("run", 2)):
        assert (tmp_path / name / "config.yaml").read_text() == f"seed: {seed}\n"
        assert read_metrics(tmp_path / name) == [{"step": 1, "reward": float(seed)}]


def test_a_folder_without_a_run_is_not_moved(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert RunRecorder(tmp_path / "run", config_yaml="").moved_aside is None
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_linked_folder_keeps_its_link(tmp_path):
    (tmp_path / "big_disk").mkdir()
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "big_disk")
    RunRecorder(link, config_yaml="old").close()
    RunRecorder(link, config_yaml="new").close()
    assert link.is_symlink()
    assert (tmp_path / "big_disk" / "config.yaml").read_text() == "new"
    assert (tmp_path / "big_disk.1" / "config.yaml").read_text() == "old"


def test_the_current_folder_is_never_moved_aside(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("another file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give another folder"):
        RunRecorder(Path("."), config_yaml="")
    assert (tmp_path / "config.yaml").read_text() == "another file"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunRecorder(tmp_path / "run", config_yaml="")


def test_metrics_are_lines_of_strict_json(recorder):
    recorder.step(1, {"reward": math.nan, "kl": math.inf, "num_tokens": np.int64(7), "entropy": np.float32(0.5)})
    recorder.evaluation(1, {"eval_reward": 0.25, "eval_completions/mean_length": 9.5}, when="during")
    lines = (recorder.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [strict_json(line) for line in lines] == [
        {"step": 1, "reward": None, "kl": None, "num_tokens": 7, "entropy": 0.5},
        {"step": 1, "eval_reward": 0.25, "eval_completions/mean_length": 9.5},
    ]


def test_metrics_can_be_read_after_each_step(recorder):
    for step in (1, 2):
        recorder.step(step, {"reward": 0.5})
        assert [row["step"] for row in read_metrics(recorder.output_dir)][-1] == step


def test_an_incomplete_last_line_is_left_out(recorder):
    recorder.step(1, {"reward": 0.5})
    with (recorder.output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert read_metrics(recorder.output_dir) == [{"step": 1, "reward": 0.5}]


def test_a_folder_without_metrics_is_not_a_run(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        read_metrics(tmp_path)


def test_completions_have_one_column_for_each_reward_and_extra(recorder):
    path = recorder.completions(10, TABLE, rewards={"exact": [1.0, None]}, extras={"parsed": ["2", None]})
    assert path == recorder.output_dir / "completions" / "step_000010.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert rows[0] == {
        "step": 10,
        **{name: values[0] for name, values in TABLE.items()},
        "exact": 1.0,
        "parsed": "2",
    }
    assert rows[1]["exact"] is None
    assert rows[1]["parsed"] is None


def test_a_reward_with_the_name_of_a_column_gets_another_column(recorder):
    path = recorder.completions(1, TABLE, rewards={"reward": [3.0, 4.0]}, extras={"prompt": ["a", "b"]})
    table = pyarrow.parquet.read_table(path)
    assert table["reward"].to_pylist() == [1.0, 0.0]
    assert table["rewards/reward"].to_pylist() == [3.0, 4.0]
    assert table["extras/prompt"].to_pylist() == ["a", "b"]


def test_files_of_all_steps_read_as_one_table(recorder):
    """The type of a column does not change if a function applied to no row of a step, or returned only integers."""
    recorder.completions(1, TABLE, rewards={"exact": [None, None]}, extras={"score": [1, 2]})
    recorder.completions(2, TABLE, rewards={"exact": [1, 0.5]}, extras={"score": [0.5, None]})
    table = pyarrow.parquet.read_table(recorder.output_dir / "completions")
    assert table["exact"].to_pylist() == [None, None, 1.0, 0.5]
    assert table["score"].to_pylist() == [1.0, 2.0, 0.5, None]


def test_values_without_a_plain_type_are_kept_as_json(recorder):
    path = recorder.completions(1, TABLE, extras={"trace": [{}, [1, "two"]]})
    assert pyarrow.parquet.read_table(path)["trace"].to_pylist() == ["{}", '[1, "two"]']


def test_the_summary_has_the_documented_fields(recorder):
    recorder.evaluation(0, {"eval_reward": 0.11}, when="before")
    for step in (1, 2):
        recorder.step(step, {"reward": 0.5, "time/rollout": 3.0, "time/train": 2.0})
    recorder.evaluation(1, {"eval_reward": 0.3}, when="during")
    recorder.evaluation(2, {"eval_reward": 0.86}, when="after")
    written = recorder.summary({"run_name": "first", "seconds": {"publish": 0.5}, "broken": math.nan})

    summary = strict_json((recorder.output_dir / "summary.json").read_text())
    assert summary == written
    assert summary["evaluation"] == {"before": {"reward": 0.11, "rewards": {}}, "after": {"reward": 0.86, "rewards": {}}}
    total = summary["seconds"].pop("total")
    assert 0 < total < 60
    assert summary["seconds"] == {"rollout": 6.0, "reward": 0.0, "train": 4.0, "publish": 0.5, "checkpoint": 0.0}
    assert summary["steps"] == 2
    assert summary["peak_memory_bytes"] > 10_000_000
    assert summary["run_name"] == "first"
    assert summary["broken"] is None


def test_the_summary_has_the_mean_of_each_function_and_each_set(recorder):
    means = {"eval_reward": 0.5, "eval_rewards/exact/mean": math.nan, "eval_rewards/form/mean": 0.5}
    recorder.evaluation(0, means, when="before")
    easy = {"eval_easy_reward": 0.7, "eval_easy_rewards/form/mean": 0.7}
    recorder.evaluation(2, means | easy | {"eval_runtime": 2.0}, when="after")
    before = {"reward": 0.5, "rewards": {"exact": None, "form": 0.5}}
    evaluation = recorder.summary({})["evaluation"]
    assert evaluation["before"] == before
    assert evaluation["after"] == before | {"sets": {"easy": {"reward": 0.7, "rewards": {"form": 0.7}}}}


def test_a_summary_without_an_evaluation_has_the_same_fields(recorder):
    nothing = {"reward": None, "rewards": {}}
    assert recorder.summary({})["evaluation"] == {"before": nothing, "after": nothing}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_raises_the_error_of_the_system(recorder):
    (recorder.output_dir / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        recorder.step(1, {"reward": 0.5})


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path):
    path = tmp_path / "summary.json"
    atomic_write(path, b"old")
    (tmp_path / ".summary.tmp.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left|Invalid argument"):
        atomic_write(path, b"new" * 100_000)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


# ------------------------------------------------------------------------------------------- resuming


def make_run(folder: Path, steps: range, *, resume: dict | None = None) -> dict:
    """Record these steps with completions, and an evaluation at the end; returns the recorder's state."""
    with RunRecorder(folder, config_yaml="seed: 1\n", resume=resume) as recorder:
        assert resume is None or recorder.resume()
        for step in steps:
            recorder.step(step, {"reward": step / 10, "time/rollout": 2.0})
            recorder.completions(step, TABLE)
        recorder.evaluation(steps[-1], {"eval_reward": 0.5}, when="during")
        return json.loads(json.dumps(recorder.state_dict()))


def test_a_resumed_run_removes_later_records_and_continues_the_sums(tmp_path: Path):
    state = make_run(tmp_path / "run", range(1, 4))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    make_run(tmp_path / "run", range(4, 6), resume=state)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "rew')  # killed in the middle of a line
    with RunRecorder(tmp_path / "run", config_yaml="seed: 2\n", resume=state) as recorder:
        assert recorder.moved_aside is None
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() != metrics, "nothing changes before resume()"
        assert recorder.resume()
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
        assert sorted(path.name for path in (tmp_path / "run" / "completions").iterdir()) == [
            f"step_{step:06d}.parquet" for step in (1, 2, 3)
        ]
        recorder.step(4, {"reward": 0.4, "time/rollout": 2.0})
        recorder.add_seconds("checkpoint", 0.25)
        summary = recorder.summary({})
    assert summary["steps"] == 4
    assert summary["seconds"]["rollout"] == 8.0 and summary["seconds"]["checkpoint"] == 0.25
    assert summary["seconds"]["total"] >= state["elapsed"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 2\n"
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 3, 4]


def test_a_resumed_run_keeps_the_first_evaluation(tmp_path: Path):
    with RunRecorder(tmp_path / "run", config_yaml="") as recorder:
        recorder.evaluation(0, {"eval_reward": 0.5, "eval_rewards/form/mean": 0.5}, when="before")
        state = json.loads(json.dumps(recorder.state_dict()))
    with RunRecorder(tmp_path / "run", config_yaml="", resume=state) as recorder:
        summary = recorder.summary({})
    nothing = {"reward": None, "rewards": {}}
    assert summary["evaluation"] == {"before": {"reward": 0.5, "rewards": {"form": 0.5}}, "after": nothing}
    earlier = state | {"evaluation": {"before": 0.5, "after": None}}  # a checkpoint of an earlier version
    with RunRecorder(tmp_path / "run", config_yaml="", resume=earlier) as recorder:
        summary = recorder.summary({})
    assert summary["evaluation"] == {"before": {"reward": 0.5, "rewards": {}}, "after": nothing}


def test_a_checkpoint_is_ranked_by_its_evaluation_or_by_the_last_ten_steps(recorder):
    assert recorder.reward_at(0, by_evaluation=False) is None
    for step in range(1, 13):
        recorder.step(step, {"reward": float(step)})
    assert recorder.reward_at(12, by_evaluation=False) == sum(range(3, 13)) / 10
    assert recorder.reward_at(12, by_evaluation=True) is None
    recorder.evaluation(12, {"eval_reward": 0.75}, when="during")
    assert recorder.reward_at(12, by_evaluation=True) == 0.75
    assert recorder.reward_at(13, by_evaluation=True) is None
    recorder.step(13, {"reward": math.nan})
    assert recorder.reward_at(13, by_evaluation=False) == 7.5, "no reward says nothing about the policy"
    recorder.step(14, {"reward": 100.0, "reward_without_failures": 13.0})
    assert recorder.reward_at(14, by_evaluation=False) == sum(range(4, 14)) / 10
    recorder.evaluation(14, {"eval_reward": 0.9}, when="during", is_complete=False)
    assert recorder.reward_at(14, by_evaluation=True) is None


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from rankup.grpo.run.records import RunRecorder\n"
        "recorder = RunRecorder(Path(sys.argv[1]), config_yaml='')\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        for resume in (None, {}):
            with pytest.raises(ValueError, match="another process is writing to"):
                RunRecorder(tmp_path / "run", config_yaml="", resume=resume)
        other.kill()
    assert not (tmp_path / "run.1").exists()
    RunRecorder(tmp_path / "run", config_yaml="").close()  # a killed process holds no lock


def test_a_lock_is_waited_for_until_the_timeout(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from rankup.grpo.run.run_folder import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])): print('open', flush=True); time.sleep(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="another process is writing to"), locked_folder(tmp_path, timeout=0.1):
            pass
        with locked_folder(tmp_path, timeout=60):
            assert other.wait(10) == 0


def test_missing_rows_are_reported(tmp_path: Path):
    state = make_run(tmp_path / "run", range(1, 4))
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"")
    with RunRecorder(tmp_path / "run", config_yaml="", resume=state) as recorder:
        assert not recorder.resume()
        (tmp_path / "run" / "metrics.jsonl").unlink()
        assert not recorder.resume()
        assert recorder.rows() == []


def test_a_failed_recorder_unlocks_the_folder(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.tmp.yaml").mkdir()  # the temporary path of the configuration
    with pytest.raises(OSError):
        RunRecorder(tmp_path / "run", config_yaml="")
    assert not run_folder._LOCKED
    with locked_folder(tmp_path / "run"), locked_folder(tmp_path / "run"):  # one process may lock it twice
        assert run_folder._LOCKED
    assert not run_folder._LOCKED


@pytest.mark.parametrize(
    "values",
    [
        [b"\xff", None],
        ["\ud800", "a"],
        [2**70, 1],
        [Decimal("12.50"), 12.5],
        [1, 1.0],
        [True, 1],
        [{1: "a"}, {"1": "a"}],
        [[b"x", {"a": Decimal("1.0")}], []],
        ["1", 1],
        [None, None],
        ["", None],
        [{"$rankup.bytes": "eA=="}, {}],
    ],
)
def test_columns_of_the_data_are_read_as_they_were_written(tmp_path: Path, values: list[Any]):
    path = tmp_path / "step_000001.parquet"
    write_completions(path, 1, {"prompt": ["a", "b"], "completion": ["c", "d"]}, data={"answer": values})
    assert repr([row["data"]["answer"] for row in read_completions(path)]) == repr(values)


EPISODE_NAMES = {"messages", "tool_calls", "sampled_spans", "num_given", "failure"}


def test_episodes_are_read_as_they_were_written(tmp_path: Path):
    failed = call("süß", error="timeout", seconds=9.5)
    odd = {"role": "tool", "name": "add", "content": [{"type": "text", "text": "\ud800 \x00"}]}
    completions = (
        completion_of(played(calls=[call(), failed], messages=[*DIALOGUE, odd]), sampled=4, given=2),
        completion_of(VOID, sampled=1, given=0),
        completion_of(None, sampled=2, given=0),
    )
    scores = Scores(total=[1.0, None, 0.0], by_function={}, extras={}, metrics={}, weights=[])
    table = completions_table([group_of(*completions, scores=scores, advantages=(0.5, 0.0, -0.5))])
    path = tmp_path / "step_000001.parquet"
    extras = {"failure": [1, 2, 3], "messages": ["a", "b", "c"]}
    write_completions(path, 1, table.table, extras=extras, data={"messages": [["x"]] * 3})
    first, second, third = read_completions(path)
    assert EPISODE_NAMES.isdisjoint(first) and first["extras/failure"] == 1.0 and first["data"] == {"messages": ["x"]}
    episode = first["episode"]
    assert episode["messages"][:3] == list(DIALOGUE)
    assert episode["messages"][3]["content"] == [{"type": "text", "text": "? \x00"}]
    assert episode["tool_calls"] == [
        {"name": "add", "arguments": {"a": 741, "b": 295}, "result": "1036", "seconds": 0.5, "error": None},
        {"name": "süß", "arguments": {"a": 741, "b": 295}, "result": "1036", "seconds": 9.5, "error": "timeout"},
    ]
    assert (episode["sampled_spans"], episode["num_given"], episode["failure"]) == ([[0, 1], [3, 6]], 2, None)
    assert (first["num_tokens"], len(first["completion_ids"])) == (4, 6)
    assert second["episode"]["failure"] == TRACEBACK and second["finish_reason"] == "failed"
    assert third["episode"]["messages"] is third["episode"]["tool_calls"] is None


def test_files_without_episodes_have_no_columns_of_them(tmp_path: Path):
    scores = Scores(total=[1.0], by_function={}, extras={}, metrics={}, weights=[])
    table = completions_table([group_of(completion_of(given=0), scores=scores, advantages=(0.0,))])
    path = tmp_path / "step_000001.parquet"
    write_completions(path, 1, table.table, extras={"failure": ["mine"], "messages": ["mine"]})
    (row,) = read_completions(path)
    assert "episode" not in row and row["failure"] == row["messages"] == "mine"
    assert json.loads(pyarrow.parquet.read_metadata(path).metadata[b"rankup.columns"]) == {"rewards": {}, "data": {}}
