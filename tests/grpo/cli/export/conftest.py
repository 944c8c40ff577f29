"""Folders of runs to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankup import GRPOConfig
from rankup.grpo.config import dump_config


@pytest.fixture
def save_run(make_policy: Callable[..., Any], tiny_model_path: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a run on a kind of tiny model: its configuration, and an adapter with no zeros. `base` replaces the
    model's folder in the configuration."""

    def save(kind: str = "llama", *, folder: Path = tmp_path / "run", base: Path | None = None, **lora: Any) -> Path:
        lora = {"rank": 16, "alpha": 8, **lora}
        policy = make_policy(kind, **lora)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for master in policy.masters:
                master.copy_(torch.randn(master.shape, generator=generator) * 0.2)
        folder.mkdir(parents=True)
        policy.save_adapter(folder / "adapter")
        config = GRPOConfig(model=str(base or tiny_model_path(kind)), lora=lora)  # type: ignore[arg-type]
        (folder / "config.yaml").write_text(dump_config(config))
        return folder

    return save
