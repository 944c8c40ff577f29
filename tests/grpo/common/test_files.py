"""Folders that are written atomically: permissions of their files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankup.grpo.common.files import atomic_folder


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_files_have_the_permissions_of_new_ones(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "folder") as partial:
            save_file({"a": torch.zeros(2)}, partial / "model.safetensors")
            (partial / "inside").mkdir()
            save_file({"a": torch.zeros(2)}, partial / "inside" / "model.safetensors")
            (partial / "config.json").touch()
            (partial / "link").symlink_to("/etc/hostname")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "folder").rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
