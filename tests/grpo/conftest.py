"""Run files for the tests of the configuration, and trainers of a tiny model."""

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from resumed import OPTIONS, low_ids_with_noise
from tiny_runs import ROWS, many_low_ids, tiny_config

from rankup.grpo.config import GRPOConfig, load_config


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., GRPOConfig]:
    """Load a run file `mine.yaml` with this text, and overrides."""

    def load_text(text: str = "", *overrides: str) -> GRPOConfig:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def error_of(load: Callable[..., GRPOConfig]) -> Callable[..., str]:
    """What a run file and overrides that are wrong are answered with."""

    def message(text: str = "", *overrides: str) -> str:
        with pytest.raises(ValueError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return message


@pytest.fixture
def make_trainer(tiny_model_path, tmp_path: Path):
    """A trainer of a tiny Llama in fp32; flat names change its configuration (`tiny_runs.tiny_config`)."""
    from rankup import GRPOTrainer

    def make(reward=many_low_ids, rows=ROWS, callbacks=None, **changes) -> GRPOTrainer:
        config = tiny_config(changes.pop("output_dir", tmp_path / "run"), **changes)
        return GRPOTrainer(
            model=str(tiny_model_path("llama")),
            reward_funcs=reward,
            args=config,
            train_dataset=rows,
            eval_dataset=rows[:4],
            callbacks=callbacks,
        )

    return make


@pytest.fixture
def vllm_engine(engine_shelf, tiny_model_path):
    """The session's vLLM for runs of `make_trainer` with `engine="vllm"` and otherwise its settings."""
    from rankup.grpo.update.resolve import engine_settings

    settings = engine_settings(tiny_config(Path("unused"), engine="vllm"), str(tiny_model_path("llama")))
    return engine_shelf.get(settings)


@pytest.fixture
def train(make_trainer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Make a run in a folder of that name, from the same seed of Python's generator unless it is resumed."""

    def run(name: str, *, reward=low_ids_with_noise, vllm: Any = None, **changes: Any):
        resume, allow_changes = changes.pop("resume", False), changes.pop("allow_changes", False)
        random.seed(99 if resume else 7)
        options = OPTIONS | {"engine": "torch" if vllm is None else "vllm"} | changes
        trainer = make_trainer(reward=reward, output_dir=tmp_path / name, **options)
        trainer.train(engine=vllm, resume_from_checkpoint=resume, allow_changes=allow_changes)
        return trainer.summary

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that makes a file system of a size such as `4m`, as the only one of the test."""
    folder = tmp_path / "disk"

    def make(size: str) -> Path:
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("a file system can be mounted by root only")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)
