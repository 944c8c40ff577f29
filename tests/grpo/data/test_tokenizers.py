"""The tokenizer of a run: where it is found, and what is said if there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.tokenizers import load_tokenizer


def error_of(config: GRPOConfig, model_path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(config, str(model_path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_without_a_tokenizer_is_refused_in_one_line(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("tokenizer*")
    bare = shutil.copytree(tiny_model_path("llama"), tmp_path / "bare", ignore=ignored)
    message = error_of(GRPOConfig(model=str(bare)), bare)
    assert message.startswith(f"model {bare}: no tokenizer in its folder (model.tokenizer can name another one): ")
    load_tokenizer(GRPOConfig(tokenizer=str(tiny_model_path("llama"))), str(bare))


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "~no_such_user"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(name: str, tmp_path: Path) -> None:
    message = error_of(GRPOConfig(tokenizer=name), tmp_path)
    assert message.startswith("model.tokenizer: ") and message.endswith("absent: no such folder") == ("absent" in name)
