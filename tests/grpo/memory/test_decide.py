"""What a run decides before its engine starts: vLLM's share, the size of a pack, and the line that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  # now: imported while a GPU seems to be there, it would look for its kernels
import pytest
import torch
from model_shapes import write_qwen_7b

from rankup.grpo.common.log import log_to
from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory import decide, parts
from rankup.grpo.memory.decide import decide_budget, decide_memory
from rankup.grpo.memory.parts import GIB
from rankup.grpo.memory.shapes import ModelShape, read_shape


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Qwen2.5-7B, with a pass of 3 MiB a token."""

    def pass_parts(_shape: ModelShape, config: GRPOConfig, _device: str) -> dict[str, int]:
        return {"activations": 3 * 2**20 * (config.optim.tokens_per_pack or 0)}

    monkeypatch.setattr(parts, "pass_parts", pass_parts)
    return write_qwen_7b(tmp_path)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of 48 GiB with that many free."""

    def has_free(gib: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * GIB), 48 * GIB))
        monkeypatch.setattr("rankup.kernels.cuda_memory.use_expandable_segments", lambda: None)

    return has_free


def config(**options: Any) -> GRPOConfig:
    """256 sequences of 2,560 tokens."""
    values: dict[str, Any] = {"max_prompt_length": 512, "max_completion_length": 2048, "prompts_per_step": 32, **options}
    return GRPOConfig(**values)


@pytest.mark.parametrize(
    ("vram", "options", "tokens"),
    [
        (80, {}, 16384),
        (48, {}, 8192),
        (32, {}, 4096),
        (27, {}, 2559),  # no less than a prompt and a completion
        (90, {"release_kv_cache": False}, 8192),  # more would take from the KV cache, which holds all sequences
        (48, {"release_kv_cache": False}, 4096),
        (48, {"tokens_per_pack": 3000}, 3000),
    ],
)
def test_a_pack_is_as_large_as_the_device_allows(model: str, vram: int, options: dict[str, Any], tokens: int):
    decided, _ = decide_budget(read_shape(model), config(**options), device="cuda", vram=vram * GIB)
    assert decided.optim.tokens_per_pack == tokens


def test_on_cpu_and_without_a_size_it_is_the_usual_one(model: str):
    shape = read_shape(model)
    assert decide_budget(shape, config(), device="cpu", vram=80 * GIB)[0].optim.tokens_per_pack == 4096
    assert decide_budget(shape, config(), device="cuda", vram=None)[0].optim.tokens_per_pack == 4096
    assert decide_memory(config(), model) == (config(), None) or torch.cuda.is_available()


def test_a_run_says_what_it_decided_in_one_line(model: str, gpu: Any):
    gpu(47.7)
    heard: list[str] = []
    with log_to(heard.append):
        decided, budget = decide_memory(config(), model)
    assert budget is not None and decided.rollout.gpu_memory_utilization == budget.gpu_memory_utilization
    (line,) = heard
    share = f"{budget.gpu_memory_utilization:.3g}"
    assert line.startswith(f"vLLM takes {share} of 48.0 GiB: ") and "in packs of 8,192 tokens, with the cache released" in line
    assert f"{budget.kv_tokens:,} tokens" in line and "others have" not in line
    planned = decide_budget(read_shape(model), config(), device="cuda", vram=48 * GIB, in_use=budget.in_use)[1]
    assert planned == budget, "`rankup plan` shows the same numbers"


def test_memory_that_others_have_in_use_is_left_to_them(model: str, gpu: Any):
    """vLLM refuses to start if its share is more than what is free."""
    gpu(30)
    heard: list[str] = []
    with log_to(heard.append):
        decided, budget = decide_memory(config(), model)
    assert budget is not None and (decided.rollout.gpu_memory_utilization or 1) * 48 < 30
    assert "others have 17.6 GiB in use" in heard[0]


def test_values_of_the_user_are_kept(model: str, gpu: Any):
    gpu(47.7)
    heard: list[str] = []
    with log_to(heard.append):
        decided, _ = decide_memory(config(gpu_memory_utilization=0.9, tokens_per_pack=512), model)
    assert (decided.rollout.gpu_memory_utilization, decided.optim.tokens_per_pack) == (0.9, 2559)
    assert "0.9 of 48.0 GiB as configured" in heard[0]


def test_a_run_that_may_not_fit_is_tried_with_a_note(model: str, gpu: Any):
    gpu(20)
    heard: list[str] = []
    with log_to(heard.append):
        decide_memory(config(), model)
    assert len(heard) == 2 and heard[1].startswith("memory may be too small") and "rankup plan" in heard[1]


def test_a_model_without_a_plan_keeps_the_usual_values(tmp_path: Path, gpu: Any):
    gpu(40)
    (tmp_path / "config.json").write_text('{"model_type": "unheard of"}')
    heard: list[str] = []
    with log_to(heard.append):
        decided, budget = decide_memory(config(), str(tmp_path))
    assert budget is None and decided == config() and "cannot be planned" in heard[0]


def test_workers_take_the_smallest_of_their_packs(model: str, gpu: Any):
    class OtherWorkerIsSmall(decide.World):
        def all_gather(self, local: Any) -> list[Any]:
            return [local, 4096]

    gpu(47.7)
    decided, _ = decide_memory(config(), model, world=OtherWorkerIsSmall(0, 2))
    assert decided.optim.tokens_per_pack == 4096
