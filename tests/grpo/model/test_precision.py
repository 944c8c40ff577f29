"""Gradients of the complete training step in bf16 against fp64, compared with those of plain PEFT in bf16.

The oracle is stock PEFT in fp64 on the same numbers (weights, adapters that bf16 can hold), one row a completion, full
logits, plain autograd. bf16 rounds at every layer, so neither side is close; ours may be off by at most 1.5 times as much.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from sample_groups import random_groups
from transformers import AutoModelForCausalLM

from rankup.grpo.data.groups import Group
from rankup.grpo.model.packing import pack, pad
from rankup.grpo.model.policy import Policy

SHAPES = [(24, [17, 9, 30, 21]), (5, [12, 40])]


def plain_loss(model: PeftModel, groups: list[Group]) -> torch.Tensor:
    """-sum of advantage x log-probability over all completion tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for weighted in groups:
        for completion, advantage in zip(weighted.completions, weighted.advantages, strict=True):
            prompt, ids = weighted.prompt.token_ids, completion.token_ids
            logits_LV = model(input_ids=torch.tensor([prompt + ids])).logits[0]
            logprobs_LV = logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32)).log_softmax(-1)
            of_completion = logprobs_LV[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
            total = total - advantage * of_completion.double().sum()
    return total


def plain_gradients(model: PeftModel, groups: list[Group]) -> dict[str, torch.Tensor]:
    plain_loss(model, groups).backward()
    marked = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.double() for name, grad in marked.items() if grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("fp32_adapter", [False, True])
def test_bf16_gradients_are_as_exact_as_those_of_plain_peft(
    make_policy, tiny_model_path, tmp_path: Path, kind: str, fp32_adapter: bool
) -> None:
    """`fp32_adapter`: PEFT's default for a bf16 model, where the adapter's products are computed in fp32."""
    policy: Policy = make_policy(kind, dtype="bfloat16", rank=16, alpha=16)
    with torch.no_grad():  # the policy multiplies with master weights rounded to bf16: let all sides start from those
        for master in policy.masters:
            master.copy_(master.bfloat16().float())
    policy.write_slots()
    policy.save_adapter(tmp_path / "adapter")
    groups = random_groups(SHAPES)

    base = AutoModelForCausalLM.from_pretrained(tiny_model_path(kind), dtype=torch.bfloat16)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=fp32_adapter)
    exact = plain_gradients(copy.deepcopy(plain).double(), groups)
    if not fp32_adapter:
        plain.bfloat16()
    theirs = plain_gradients(plain, groups)

    packs = pack(groups, tokens_per_pack=1000) if policy.shares_prompts else pad(groups, tokens_per_pack=1000, pad_token_id=0)
    for one in packs:
        policy.backward(one, lambda logprobs_n, _entropy_n, chunk, one=one: -one.advantages_N[chunk] * logprobs_n)
    ours = {}
    for name, layer in policy.layers.items():
        for part, master in (("lora_A", layer.master_a), ("lora_B", layer.master_b)):
            assert master.grad is not None
            ours[f"base_model.model.{name}.{part}.default.weight"] = master.grad.double()

    assert set(ours) == set(theirs) == set(exact)
    errors = {side: _distance(found, exact) for side, found in (("ours", ours), ("theirs", theirs))}
    assert 0 < errors["ours"] <= 1.5 * errors["theirs"], errors


def _distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative distance over all tensors, each counted by its own norm so that none hides behind another."""
    squares = [((found[name] - exact[name]).norm() / exact[name].norm()).square() for name in exact]
    return torch.stack(squares).mean().sqrt().item()
