"""Fixtures that start vLLM, and how tests are divided among processes.

A process has one vLLM at a time: another one starts only after the last one was closed. The tests of a file run in one process,
so that they share it. Every process computes with one thread: tiny models gain nothing from more, and two processes with two
threads each slow each other many times over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import HealthCheck, settings
from tiny_models import make_tiny_model

if TYPE_CHECKING:
    from rankup.rollout.engine import EngineSettings, RolloutEngine

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch, and by the processes that tests start
# By Ray's default, 15, its workers would wait for all other processes of this machine, such as other tests.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray's spelling
# It misses a package of kernels and says so when it is imported, which may be after the summary.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# How fast a machine draws inputs says nothing about the code.
settings.register_profile("rankup", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rankup")

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


ROOT = Path(__file__).resolve().parents[1]
EARLY = ("grpo/cluster", "bench", "configs", "grpo", "scripts")
"""Folders of tests in the order that they run in, before all others: files that take minutes start early, so that no process is
left with one of them at the end, and the two longest, of clusters and of submitted jobs, do not start together."""


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "also run tests marked exhaustive in this folder or file; may be repeated"
    parser.addoption("--exhaustive", action="append", default=[], metavar="PATH", help=text)


def pytest_itemcollected(item: pytest.Item) -> None:
    if "make_trainer" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.runs)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _place(item.path))
    folders = [(ROOT / path).resolve() for path in config.getoption("exhaustive") or ()]
    left_out = [
        item
        for item in items
        if item.get_closest_marker("exhaustive") is not None and not any(item.path.is_relative_to(f) for f in folders)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _place(path: Path) -> int:
    """The place of a test file's folder in `EARLY`."""
    return next((n for n, name in enumerate(EARLY) if path.is_relative_to(ROOT / "tests" / name)), len(EARLY))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory):
    """A function from a kind ("llama", "qwen2", "qwen3", ...) to the folder of a tiny random model of that kind."""
    made: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny_model(tmp_path_factory.mktemp(kind) / kind, kind)
        return made[kind]

    return path


@dataclass
class EngineShelf:
    """Holds at most one engine, so that tests with the same settings share it."""

    engine: RolloutEngine | None = None

    def get(self, settings: EngineSettings) -> RolloutEngine:
        from rankup.grpo.common.quiet import quiet_stderr
        from rankup.rollout.engine import RolloutEngine
        from rankup.rollout.vllm_compat import collections_skipped

        if self.engine is None or self.engine.settings.differences(settings):
            with collections_skipped():  # the next engine collects garbage before it starts
                self.close()
            with quiet_stderr():
                self.engine = RolloutEngine(settings)
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None


@pytest.fixture(scope="session")
def engine_shelf() -> Iterator[EngineShelf]:
    shelf = EngineShelf()
    yield shelf
    shelf.close()


@pytest.fixture
def make_engine(engine_shelf: EngineShelf, tiny_model_path):
    """A function that gives the engine for a kind of tiny model, in fp32 by default."""
    from rankup.rollout.config import RolloutConfig
    from rankup.rollout.engine import EngineSettings

    def make(kind: str = "llama", *, lora_path: Literal["auto", "dense", "punica"] = "auto", **changes):
        rollout = RolloutConfig(max_prompt_length=128, max_completion_length=128, kv_cache_gib=1 / 64, lora_path=lora_path)
        defaults = {
            "model": str(tiny_model_path(kind)),
            "target_modules": ALL_LINEAR,
            "rollout": rollout,
            "dtype": "float32",
            "max_num_seqs": 32,
        }
        return engine_shelf.get(EngineSettings(**{**defaults, **changes}))

    return make


@pytest.fixture
def make_policy(tiny_model_path):
    """A function that gives a policy on a kind of tiny model, with a strong random adapter in its masters."""

    def make(kind: str = "llama", *, seed: int = 1, strength: float = 0.3, dtype: str = "float32", **lora):
        import torch

        from rankup.grpo.common.quiet import quiet_stderr
        from rankup.grpo.config import LoraConfig
        from rankup.grpo.model.policy import Policy

        with quiet_stderr():
            policy = Policy(
                str(tiny_model_path(kind)), lora=LoraConfig(**{"rank": 16, "alpha": 8, **lora}), dtype=dtype
            )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in policy.layers.values():
                b = layer.master_b
                b.copy_(
                    torch.randn(b.shape, generator=generator) * strength / layer.scaling["default"] / b.shape[1] ** 0.5
                )
        return policy

    return make
