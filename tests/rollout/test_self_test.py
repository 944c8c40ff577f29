"""The self-test of vLLM's internals: all uses work with the installed vLLM, and a missing attribute is named."""

import pytest
import torch

from rankup.rollout.self_test import self_test, vllm_device


@pytest.mark.slow
def test_all_uses_of_this_vllm_work() -> None:
    assert vllm_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    errors = self_test()
    assert {"engine arguments", "adapter slots", "base weights", "dense LoRA"} <= errors.keys()
    assert {use: error for use, error in errors.items() if error is not None} == {}


@pytest.mark.slow
def test_a_missing_attribute_is_the_error_of_its_use_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_device()
    from vllm.platforms import current_platform

    monkeypatch.delattr(type(current_platform), "get_punica_wrapper")
    monkeypatch.delattr(type(current_platform).__mro__[1], "get_punica_wrapper", raising=False)
    errors = {use: str(error) for use, error in self_test().items() if error is not None}
    assert errors.keys() == {"dense LoRA"} and "get_punica_wrapper" in errors["dense LoRA"]
