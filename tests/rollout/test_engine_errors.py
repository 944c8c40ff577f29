"""vLLM's errors about lengths and memory, with the names of the options here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from rankup.rollout.config import RolloutConfig
from rankup.rollout.engine_errors import in_our_names

ROLLOUT = RolloutConfig(gpu_memory_utilization=0.45, kv_cache_gib=1.5)
SEE = "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
OF_CACHE = (
    "To serve at least one request with the model's max seq len (768), (0.75 GiB KV cache is needed, which is larger than the "
    "available KV cache memory (0.5 GiB). {}Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
    f"backend) or decreasing `max_model_len` when initializing the engine. {SEE}"
)
LENGTHS = "rollout.max_prompt_length + rollout.max_completion_length"


@pytest.mark.parametrize(
    ("text", "on_cpu", "expected"),
    [
        (
            OF_CACHE.format("Based on the available memory, the estimated maximum model length is 512. "),
            True,
            f"the KV cache has 0.5 GiB, and a sequence of 768 tokens ({LENGTHS}) needs 0.75 GiB: raise rollout.kv_cache_gib, "
            "or lower the lengths to at most 512 tokens together",
        ),
        (
            OF_CACHE.format(""),
            False,
            f"the KV cache has 0.5 GiB, and a sequence of 768 tokens ({LENGTHS}) needs 0.75 GiB: raise "
            "rollout.gpu_memory_utilization, or lower the lengths",
        ),
        (
            f"No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing. {SEE}",
            False,
            "rollout.gpu_memory_utilization 0.45 leaves no memory for vLLM's KV cache: raise it, or use a smaller model",
        ),
        (
            "Free memory on device cuda:0 (20.1/79.2 GiB) on startup is less than desired GPU memory utilization "
            "(0.45, 35.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
            False,
            "rollout.gpu_memory_utilization 0.45 is 35.6 GiB, and 20.1 of 79.2 GiB are free: lower it, or end what else uses "
            "the device",
        ),
        (
            "Available memory on node 0 (3.2/8.0 GiB) on kv cache allocation is less than requested memory for kv (16.0 GiB). "
            "Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.",
            True,
            "rollout.kv_cache_gib is 16.0, and 3.2 GiB of memory are free: lower it",
        ),
        (
            "1 validation error for ModelConfig\n  Value error, Model architectures ['Qwen3_5ForCausalLM'] failed to be "
            "inspected. Please check the logs for more details. [type=value_error, input_value=ArgsKwargs((), {'model': ...})]",
            True,
            "vLLM cannot import its code for Qwen3_5ForCausalLM: a package that it needs is missing (such as torchvision on "
            "CPU). Install it, or set rollout.engine=torch",
        ),
        (
            "1 validation error for VllmConfig\n  Assertion failed, Chunked prefill is required for mamba cache mode 'align'. "
            "[type=assertion_error, input_value=ArgsKwargs((), {'model': ...})]\n    For further information visit",
            True,
            "vLLM refuses this configuration: Chunked prefill is required for mamba cache mode 'align'.",
        ),
        (
            "1 validation error for ModelConfig\n  Value error, User-specified max_model_len (768) is greater than the derived "
            "max_model_len (max_position_embeddings=512.0 or model_max_length=None in model's config.json). To allow",
            True,
            f"{LENGTHS} is 768 tokens, and the model's context ends at 512 (max_position_embeddings): lower one of them",
        ),
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity",
            False,
            "there was too little memory to start vLLM: lower rollout.gpu_memory_utilization (now 0.45), rollout.max_num_seqs "
            f"or the lengths ({LENGTHS}), or set model.load_in=nf4 (CUDA out of memory. Tried to allocate 2.00 GiB.)",
        ),
    ],
)
def test_the_error_names_the_options(text: str, on_cpu: bool, expected: str) -> None:
    with pytest.raises(ValueError) as caught, in_our_names(ROLLOUT, on_cpu=on_cpu):
        raise RuntimeError(text)
    assert str(caught.value) == expected
    assert str(caught.value.__cause__) == text


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^something else$"), in_our_names(ROLLOUT, on_cpu=True):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("module", "texts"),
    [
        ("v1/core/kv_cache_utils.py", ["No available memory for the cache blocks", "max seq len ", "maximum model length is"]),
        ("v1/worker/utils.py", ["Free memory on device", "GiB) on startup ", "is less than desired GPU memory utilization"]),
        ("v1/worker/cpu_worker.py", ["GiB) on kv cache", " allocation is less than requested memory for kv "]),
        ("config/model.py", ["User-specified max_model_len (", "than the derived max_model_len ("]),
    ],
)
def test_the_installed_vllm_has_these_errors(module: str, texts: list[str]) -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.origin).parent / module).read_text(encoding="utf-8")
    assert [text for text in texts if text not in source] == []
