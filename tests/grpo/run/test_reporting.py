"""Trackers, each in a separate process without network and login; their files are read back."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankup.grpo.run.reporting import check_reports

pytestmark = pytest.mark.slow

EVALUATION = "eval_pass@4"
"""A metric that the session logs: trackers take its name as it is."""

SESSION = """
import json, math, sys
from pathlib import Path
from rankup.grpo.run.reporting import check_reports, make_reports

names, last_step, failed = sys.argv[1].split(), int(sys.argv[2]), sys.argv[3] == "failed"
folder, saved = Path("run"), Path("states.json")
folder.mkdir(exist_ok=True)
states = json.loads(saved.read_text()) if saved.exists() else None
resume_step = last_step - 3 if states else 0
check_reports(names)
config = {"optim": {"max_steps": last_step}, "data": {"eval": None}}
reports = make_reports(
    names, output_dir=folder, run_name="sums", project="arithmetic", config=config, resume=states, resume_step=resume_step
)
for step in range(resume_step + 1, last_step + 1):
    for report in reports:
        report.log({"step": step, "reward": last_step + step / 10, "rewards/exact": None, "grad_norm": math.inf})
for report in reports:
    report.log({"step": last_step, "eval_pass@4": 0.5})
saved.write_text(json.dumps({report.name: report.state_dict() for report in reports}))
for report in reports:
    report.close(failed=failed)
    report.close()
"""

FIRST_AND_RESUMED = [(1, 4.1), (2, 4.2), (3, 4.3), (4, 4.4), (3, 5.3), (4, 5.4), (5, 5.5)]  # (step, reward) in order


def run(folder: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in `folder` as a user without any tracker settings."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_", "HF_", "XDG_", "NETRC"))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**others, "HOME": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all trackers that failed after 4 steps and was resumed from step 2 to step 5, without output."""
    folder = tmp_path_factory.mktemp("resumed")
    for arguments in (("4", "failed"), ("5", "ended")):
        environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
        done = run(folder, SESSION, "tensorboard wandb trackio", *arguments, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def state(folder: Path, name: str) -> dict[str, str]:
    return json.loads((folder / "states.json").read_text())[name]


def wandb_records(path: Path) -> Iterator:
    """The records of a `.wandb` file, which is a LevelDB log (blocks of 32 KiB; crc, length and type before each chunk)."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] -- made at import

    data, at, chunks = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        chunks += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last chunk
            yield Record.FromString(chunks)
            chunks = b""


def wandb_history(records: list) -> list[dict[str, float]]:
    """Logged rows, without the columns that wandb adds."""
    rows = []
    for record in records:
        items = {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return [row for row in rows if row]


def test_tensorboard_shows_the_resumed_run(resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed / "run" / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward", EVALUATION]
    rewards = {event.step: event.value for event in events.Scalars("reward")}
    assert rewards == pytest.approx({1: 4.1, 2: 4.2, 3: 5.3, 4: 5.4, 5: 5.5})
    assert [event.step for event in events.Scalars(EVALUATION)] == [5]
    (tag,) = events.Tags()["tensors"]
    assert tag == "config/text_summary"
    assert b"    optim:\n      max_steps: 4" in events.Tensors(tag)[0].tensor_proto.string_val[0]


def test_wandb_resumes_the_same_run_offline(resumed: Path) -> None:
    files = sorted((resumed / "run" / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    first, second = [list(wandb_records(file)) for file in files]
    (run_id,) = {record.run.run_id for record in [*first, *second] if record.run.run_id}
    assert state(resumed, "wandb") == {"id": run_id}
    (of_run,) = [record.run for record in first if record.run.run_id]
    assert (of_run.project, of_run.display_name) == ("arithmetic", "sums")
    assert {"key": "optim", "value": {"max_steps": 4}} in [
        {"key": update.key, "value": json.loads(update.value_json)} for update in of_run.config.update
    ]
    rows = wandb_history([*first, *second])
    assert [(row["step"], row["reward"]) for row in rows if "reward" in row] == FIRST_AND_RESUMED
    assert [row for row in rows if EVALUATION in row] == [
        {"step": 4, EVALUATION: 0.5},
        {"step": 5, EVALUATION: 0.5},
    ]
    assert {key for row in rows for key in row} == {"step", "reward", EVALUATION}
    exits = [record.exit.exit_code for record in [*first, *second] if record.HasField("exit")]
    assert exits == [1, 0]
    drawn_over = {(r.metric.glob_name or r.metric.name): r.metric.step_metric for r in first if r.HasField("metric")}
    assert drawn_over["*"] == "step"


def test_trackio_resumes_the_same_run(resumed: Path) -> None:
    with sqlite3.connect(resumed / "trackio" / "arithmetic.db") as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        configs = [json.loads(config) for (config,) in database.execute("SELECT config FROM configs")]
    database.close()
    logged = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
    assert [(step, metrics["reward"]) for step, metrics in logged if "reward" in metrics] == FIRST_AND_RESUMED
    assert [step for step, metrics in logged if metrics == {EVALUATION: 0.5}] == [4, 5]
    assert len({run_id for run_id, *_ in rows}) == 1
    (name,) = {name for _, name, *_ in rows}
    assert name.startswith("sums-") and state(resumed, "trackio") == {"name": name}
    assert configs[-1]["optim"] == {"max_steps": 5}


def test_a_new_run_of_the_same_name_is_another_run_in_trackio(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "states.json").unlink(missing_ok=True)
        assert run(tmp_path, SESSION, "trackio", "1", "ended", TRACKIO_DIR=str(tmp_path / "trackio")).returncode == 0
    with sqlite3.connect(tmp_path / "trackio" / "arithmetic.db") as database:
        (count,) = database.execute("SELECT COUNT(DISTINCT run_id) FROM metrics").fetchone()
    database.close()
    assert count == 2


def test_a_missing_library_is_an_error_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder_of_that_name").mkdir()  # like the folder that wandb makes in the current one
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="and folder_of_that_name not installed: pip install no_such_tracker folder_of"):
        check_reports(["no_such_tracker", "tensorboard", "folder_of_that_name"])
    check_reports([])
    check_reports(["tensorboard", "trackio"])


def test_wandb_without_a_login_is_refused_without_a_prompt(tmp_path: Path) -> None:
    done = run(tmp_path, SESSION, "wandb", "1", "ended")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ValueError: logging.report_to: not logged in to wandb: run `wandb login`, or `wandb offline` to use none"
    )


def test_wandb_without_a_reachable_server_is_refused(tmp_path: Path) -> None:
    done = run(
        tmp_path, SESSION, "wandb", "1", "ended",
        WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40, WANDB_INIT_TIMEOUT="1",
    )  # fmt: skip
    assert done.returncode == 1
    assert "ValueError: logging.report_to: wandb cannot start: " in done.stderr


@pytest.mark.parametrize(
    ("name", "what_fails"),
    [
        ("tensorboard", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))"),  # like a full disk
        (
            "wandb",
            "import os, signal, time\n"
            "for pid in open(f'/proc/self/task/{os.getpid()}/children').read().split():\n"
            "    os.kill(int(pid), signal.SIGKILL)\n"
            "time.sleep(0.5)",
        ),
    ],
)
def test_a_failing_tracker_logs_one_warning_and_the_run_continues(tmp_path: Path, name: str, what_fails: str) -> None:
    failing = SESSION.replace("for step in", f"{what_fails}\nfor step in") + "\nprint('the run continued')"
    done = run(tmp_path, failing, name, "60", "ended", WANDB_MODE="offline")
    assert (done.returncode, done.stdout) == (0, "the run continued\n"), done.stderr
    assert done.stderr.count(f"{name} gets no further rows; metrics.jsonl has them all: ") == 1
