"""How completions are sampled, and which engines can serve which runs. Starts no engine."""

import dataclasses

import pytest
from pydantic import ValidationError

from rankup.rollout.config import RolloutConfig, SamplingConfig
from rankup.rollout.dense_lora import is_dense
from rankup.rollout.engine import EngineSettings, engine_args
from rankup.rollout.engine_settings import capture_sizes

SETTINGS = EngineSettings(model="model", rollout=RolloutConfig(), target_modules=("q_proj",))


def test_evaluation_samples_one_greedy_completion():
    rollout = RolloutConfig(max_completion_length=9, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop="end")  # type: ignore[arg-type]
    greedy = SamplingConfig(num_generations=1, max_completion_length=9, temperature=0.0, stop=["end"])
    assert rollout.greedy() == greedy


@pytest.mark.parametrize("option", [{"num_generations": 1}, {"temperature": 0.0}])
def test_training_needs_groups_and_a_temperature(option: dict[str, float]):
    SamplingConfig(**option)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        RolloutConfig(**option)  # type: ignore[arg-type]


def test_an_engine_serves_runs_that_sample_differently():
    """Sampling options are arguments of each rollout, and every request has a seed."""
    rollout = RolloutConfig(num_generations=2, temperature=0.5, max_prompt_length=256, max_completion_length=512)
    assert SETTINGS.differences(dataclasses.replace(SETTINGS, rollout=rollout, seed=3)) == []


def test_an_engine_that_returns_experts_serves_a_run_that_drops_them():
    assert dataclasses.replace(SETTINGS, returns_experts=True).differences(SETTINGS) == []


@pytest.mark.parametrize(
    ("needed", "difference"),
    [
        ({"max_rank": 128}, "max_rank 64 instead of 128"),
        ({"tokenizer": "mine"}, "tokenizer None instead of mine"),
        ({"rollout": RolloutConfig(max_prompt_length=100)}, "max_model_length 768 instead of 356"),
        ({"rollout": RolloutConfig(kv_cache_gib=2.0)}, "kv_cache_gib 1.0 instead of 2.0"),
        ({"rollout": RolloutConfig(lora_path="punica")}, "lora_path auto instead of punica"),
        ({"rollout": RolloutConfig(model_runner="v2")}, "model_runner v1 instead of v2"),
        ({"rollout": RolloutConfig(release_kv_cache=False)}, "release_kv_cache None instead of False"),
        ({"returns_experts": True}, "returns_experts False instead of True"),
        ({"nf4_weights": ("w" * 99,)}, f"nf4_weights () instead of ('{'w' * 78} ..."),
    ],
)
def test_an_engine_with_other_settings_names_the_differences(needed: dict, difference: str):
    assert SETTINGS.differences(dataclasses.replace(SETTINGS, **needed)) == [difference]


@pytest.mark.parametrize(
    ("lora_path", "on_cpu", "dtype", "expected"),
    [
        ("auto", True, "bfloat16", True),
        ("auto", True, "float32", True),
        ("punica", True, "float32", False),
        ("auto", False, "bfloat16", False),
        ("auto", False, "float16", False),
        ("auto", False, "float32", True),
        ("dense", False, "bfloat16", True),
    ],
)
def test_vllms_lora_kernels_compute_in_16_bits_on_cuda(lora_path, on_cpu: bool, dtype: str, expected: bool):
    assert is_dense(lora_path, on_cpu=on_cpu, dtype=dtype) is expected


def test_vllms_lora_kernels_are_refused_in_float32_on_cuda():
    with pytest.raises(ValueError, match=r"rollout\.lora_path: punica .* model\.dtype is float32: use auto or dense"):
        is_dense("punica", on_cpu=False, dtype="float32")


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 20, 64, 100, 128, 250, 512])
def test_every_number_of_sequences_has_a_graph_that_is_little_larger(largest: int):
    sizes = capture_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest and len(sizes) <= 30
    for number in range(1, largest + 1):
        padded = next(size for size in sizes if size >= number)
        assert padded < number + max(8, number / 4)


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "expected"), [(None, "model"), ("mine", "mine")])
def test_vllm_decodes_with_the_tokenizer_of_the_settings(tokenizer: str | None, expected: str, tiny_model_path):
    model = str(tiny_model_path("llama"))
    settings = dataclasses.replace(SETTINGS, model=model, tokenizer=tokenizer)
    args = engine_args(settings, on_cpu=True)
    assert (args.tokenizer or args.model) == {"model": model}.get(expected, expected)
