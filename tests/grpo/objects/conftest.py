"""A cache of the test's own, and models as objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankup.grpo.common.quiet import quiet_stderr

TOKENS = torch.tensor([[1, 17, 99, 200, 4, 4, 31]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that objects are saved in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rankup"


@pytest.fixture
def load_model(tiny_model_path) -> Callable[..., PreTrainedModel]:
    """A function that loads a kind of tiny model."""

    def load(kind: str = "llama", *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        with quiet_stderr():
            return AutoModelForCausalLM.from_pretrained(tiny_model_path(kind), dtype=dtype)

    return load


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """A function that computes the logits of some tokens, of a model or of the one in a folder."""

    @torch.no_grad()
    def compute(model: object, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if isinstance(model, str | Path):
            with quiet_stderr():
                model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return model(TOKENS).logits  # type: ignore[operator]

    return compute
