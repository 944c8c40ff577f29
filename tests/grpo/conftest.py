"""Run files for the tests of the configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rankup.grpo.config import GRPOConfig, load_config


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., GRPOConfig]:
    """Load a run file `mine.yaml` with the given text, and overrides."""

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
