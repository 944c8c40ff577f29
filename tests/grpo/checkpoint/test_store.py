"""Checkpoints on disk: atomic, and damage is detected. Real files, a real full disk."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankup.grpo.checkpoint.store import CheckpointError, CheckpointStore, DamagedCheckpointError, read_checkpoint
from rankup.grpo.common.errors import explain

TENSORS = {"weights": torch.arange(50_000, dtype=torch.float32)}


def fill(folder: Path) -> None:
    """Write tensors, text and a subfolder."""
    save_file(TENSORS, folder / "tensors.safetensors")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "config.json").write_text('{"r": 8}')


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2, keep_best=1)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_checkpoint_is_read_back(store: CheckpointStore):
    assert store.newest_complete() is None  # there is not even a folder
    path = store.write(10, fill, reward=0.25)
    checkpoint = store.newest_complete()
    assert checkpoint is not None and (checkpoint.path, checkpoint.step, checkpoint.reward) == (path, 10, 0.25)
    assert names(store) == ["step_000010"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"tensors.safetensors", "adapter/config.json"}


def truncate(path: Path) -> None:
    os.truncate(path / "tensors.safetensors", 100_000)


def flip_a_bit(path: Path) -> None:
    with (path / "tensors.safetensors").open("r+b") as file:
        file.seek(77_777)
        (byte,) = file.read(1)
        file.seek(77_777)
        file.write(bytes([byte ^ 0b100]))


def lose_a_file(path: Path) -> None:
    (path / "adapter" / "config.json").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_the_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 60)


def change_the_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 20', '"step": 21'))


def half_rename(path: Path) -> None:
    """Leave the new folder with the first files only, as a file system that renames file by file."""
    hidden = path.rename(path.with_name(f".{path.name}.partial"))
    path.mkdir()
    (hidden / "tensors.safetensors").rename(path / "tensors.safetensors")


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "tensors.safetensors has 100000 bytes instead of",
    flip_a_bit: "tensors.safetensors was changed",
    lose_a_file: "adapter/config.json is missing",
    lose_the_manifest: "manifest.json is missing",
    cut_the_manifest: "manifest.json cannot be read",
    change_the_manifest: "manifest.json was changed",
    half_rename: "manifest.json is missing",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
def test_a_damaged_checkpoint_is_skipped_with_the_reason(
    store: CheckpointStore, damage: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "rankup")
    store.write(10, fill)
    path = store.write(20, fill)
    damage(path)
    with pytest.raises(DamagedCheckpointError, match=re.escape(reason)):
        read_checkpoint(path)
    newest = store.newest_complete()
    assert newest is not None and newest.step == 10
    assert [line for line in caplog.messages if line.startswith(f"skipped {path}: {reason}")]
    caplog.clear()
    assert store.newest_complete(log_skipped=False) == newest and caplog.messages == []


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_a_run_resumes_before_a_damaged_checkpoint(store: CheckpointStore, damage: Callable[[Path], None]):
    store.write(10, fill)
    damage(store.write(20, fill))
    (aside,) = store.set_aside_after(10)
    assert aside.name == "step_000020.aside.1"
    store.write(20, fill)
    newest = store.newest_complete()
    assert newest is not None and newest.step == 20
    assert names(store) == ["step_000010", "step_000020", "step_000020.aside.1"]


def test_leftovers_of_a_killed_process_are_skipped_and_deleted(store: CheckpointStore, caplog: pytest.LogCaptureFixture):
    """The process is killed while it writes, twice."""
    caplog.set_level("INFO", "rankup")
    code = (
        "import os, signal, sys; from pathlib import Path; from rankup.grpo.checkpoint.store import CheckpointStore\n"
        "def fill(folder):\n"
        "    (folder / 'half').write_bytes(b'x' * 1000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "CheckpointStore(Path(sys.argv[1]), keep_last=2, keep_best=1).write(20, fill)\n"
    )
    store.write(10, fill)
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, store.folder], timeout=120).returncode == -9
    assert names(store) == [".step_000020.partial", "step_000010"]
    newest = store.newest_complete()
    assert newest is not None and newest.step == 10
    assert caplog.messages == [f"skipped {store.folder / '.step_000020.partial'}: the write was interrupted"]
    store.write(30, fill)
    assert names(store) == ["step_000010", "step_000030"]


def test_another_format_is_refused_with_its_name(store: CheckpointStore):
    store.write(10, fill)
    path = store.write(20, fill)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": "rankup-checkpoint-0", "rankup": "0.0.9"}))
    with pytest.raises(ValueError, match="format 'rankup-checkpoint-0', this rankup reads 'rankup-checkpoint-2'") as caught:
        store.newest_complete()
    assert "0.0.9" in str(caught.value) and not isinstance(caught.value, DamagedCheckpointError)


def test_the_last_and_the_best_are_kept(store: CheckpointStore):
    for step, reward in ((10, 0.1), (20, 0.9), (30, 0.2), (40, None), (50, 0.3)):
        store.write(step, fill, reward=reward)
    assert names(store) == ["step_000020", "step_000040", "step_000050"]
    store.write(60, fill, reward=0.9)  # a tie: the newer one is kept
    store.write(70, fill, reward=0.1)
    store.write(80, fill, reward=0.1)
    assert names(store) == ["step_000060", "step_000070", "step_000080"]


def test_a_damaged_checkpoint_is_never_the_best(store: CheckpointStore):
    cut_the_manifest(store.write(10, fill, reward=0.9))
    for step in (20, 30, 40):
        store.write(step, fill, reward=0.1 * step)
    assert "step_000010" not in names(store)


def test_steps_of_more_digits_are_newer(store: CheckpointStore):
    for step in (999_999, 1_000_000):
        store.write(step, fill)
    newest = store.newest_complete()
    assert newest is not None and newest.step == 1_000_000


def test_an_error_while_filling_leaves_nothing(store: CheckpointStore):
    def fails(folder: Path) -> None:
        fill(folder)
        raise OSError(5, "Input/output error")

    store.write(10, fill)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 20 could not be written.*Input/output error"):
        store.write(20, fails)
    assert names(store) == ["step_000010"]


def test_a_full_disk_leaves_earlier_checkpoints_complete(small_disk: Callable[[str], Path]):
    store = CheckpointStore(small_disk("512k") / "checkpoints", keep_last=3, keep_best=0)
    store.write(10, fill)  # 200 KB
    store.write(20, fill)
    with pytest.raises(CheckpointError, match=r"(?i)no space left") as caught:
        store.write(30, fill)
    text = explain(caught.value)
    assert text is not None and "no space left on the disk" in text
    newest = store.newest_complete()
    assert newest is not None and newest.step == 20
    assert names(store) == ["step_000010", "step_000020"]


def test_a_checkpoint_survives_a_kill_while_it_is_replaced(store: CheckpointStore):
    path = store.write(10, fill)
    store.write(10, fill, reward=0.5)
    newest = store.newest_complete()
    assert newest is not None and newest.reward == 0.5 and names(store) == ["step_000010"]
    path.rename(path.with_name(".step_000010.replaced"))  # killed between the two renames
    newest = store.newest_complete()
    assert newest is not None and newest.path == path
    assert names(store) == ["step_000010"]


def test_only_checkpoints_of_the_run_belong(store: CheckpointStore, tmp_path: Path):
    path = store.write(10, fill)
    assert store.validate_belongs(path) == path
    store.write(20, fill)
    (aside,) = store.set_aside_after(10)
    for other in (aside, tmp_path, store.folder / "step_000030"):
        with pytest.raises(ValueError, match="is not a checkpoint of this run"):
            store.validate_belongs(other)


def test_a_leftover_of_a_deletion_is_not_logged(store: CheckpointStore, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "rankup")
    path = store.write(10, fill)
    path.rename(path.with_name(".step_000010.deleted"))
    assert store.newest_complete() is None and caplog.messages == []
    store.write(20, fill)
    assert names(store) == ["step_000020"]


def test_an_interrupted_replacement_is_set_aside_too(store: CheckpointStore):
    """Otherwise it would be restored among the checkpoints of the resumed run."""
    store.write(4, fill)
    path = store.write(6, fill)
    path.rename(path.with_name(".step_000006.replaced"))
    assert [moved.name for moved in store.set_aside_after(4)] == ["step_000006.aside.1"]


def test_an_unreadable_checkpoint_is_damaged(store: CheckpointStore):
    store.write(10, fill)
    (store.folder / "step_000099").write_text("a file, no folder")
    newest = store.newest_complete()
    assert newest is not None and newest.step == 10
    store.write(20, fill)
