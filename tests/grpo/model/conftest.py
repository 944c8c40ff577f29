"""Adapters of stock PEFT that training starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stock_adapters import save_stock_adapter

from rankup import GRPOConfig
from rankup.grpo.model.start import StartAdapter, resolve_start


@pytest.fixture
def save_stock(tiny_model_path, tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter of stock PEFT with random A and B to a folder."""

    def save(kind: str = "llama", **options: Any) -> Path:
        return save_stock_adapter(tiny_model_path(kind), tmp_path / "sft", **options)

    return save


@pytest.fixture
def resolve(tiny_model_path) -> Callable[..., tuple[GRPOConfig, StartAdapter]]:
    """The configuration and the adapter of a run that starts from the adapter in a folder."""

    def resolve(folder: Path, kind: str = "llama", **options: Any) -> tuple[GRPOConfig, StartAdapter]:
        values: dict[str, Any] = {"start_from": str(folder), **options}
        config, start = resolve_start(GRPOConfig(**values), str(tiny_model_path(kind)))
        assert start is not None
        return config, start

    return resolve
