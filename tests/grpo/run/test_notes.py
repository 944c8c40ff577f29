"""Notes before the first step."""

from typing import Any

import pytest

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.prompts import PromptData
from rankup.grpo.data.run_inputs import RunInputs
from rankup.grpo.run import notes


@pytest.mark.parametrize(("dtype", "native", "is_noted"), [
    ("bfloat16", "float32", True), ("bfloat16", "bfloat16", False), ("float32", "float32", False),
])  # fmt: skip
def test_emulated_bf16_is_noted(monkeypatch: pytest.MonkeyPatch, dtype: Any, native: str, is_noted: bool) -> None:
    monkeypatch.setattr(notes, "native_dtype", lambda: native)
    inputs = RunInputs(model_path="", tokenizer=None, train_prompts=PromptData(rows=[], dropped=0), eval_prompts=None)  # type: ignore[arg-type]
    found = list(notes.start_notes(GRPOConfig(dtype=dtype), inputs))
    assert any("model.dtype=float32" in note for note in found) == is_noted
