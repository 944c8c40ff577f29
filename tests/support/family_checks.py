"""What a model must compute to be trained as it is sampled: compared with stock PEFT, one row a completion.

    groups = random_groups(SHAPES)
    gradient_error(policy, groups, stock_pass(model_path, adapter, groups))      # relative, of the worst layer
    leak(policy, groups)                                                          # of one completion's tokens into others
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig

from rankup.grpo.data.groups import Group
from rankup.grpo.model.packing import Pack, by_origin, pack, pad
from rankup.grpo.model.policy import Policy

SHAPES = [(11, [9, 1, 14]), (5, [12, 7]), (17, [3])]
"""Prompt and completion lengths of groups: shorter and longer than the windows of `families.py`, of different lengths."""

GRADIENT_LIMIT = 1e-5
DELTA_LIMIT = 5e-5
"""Of gated delta nets, which round in fp32 by chunks of 64 tokens: stock transformers differs by 1.5e-5 between chunks of 64
and of 8, and the chunks of a completion behind a shared prompt begin elsewhere."""

FLOOR = 1e-2
"""Gradients below this share of the largest one are compared with it: their own size is rounding."""


@dataclass(frozen=True)
class StockPass:
    """Loss, adapter gradients by layer and role, and log-probabilities by completion, of stock PEFT."""

    loss: float
    gradients: dict[tuple[str, str], torch.Tensor]
    logprobs: dict[tuple[int, int], torch.Tensor]


def stock_pass(model_path: Path, adapter: Path, groups: Sequence[Group], *, dtype: torch.dtype = torch.float32) -> StockPass:
    """A forward and backward of each completion alone behind its prompt, by transformers and PEFT.

    The loss is the sum of -advantage * log-probability over all completion tokens. Attention is transformers' plain one:
    torch's own, which is the default, leaves out Gemma 2's cap on scores.
    """
    base = stock_class(model_path).from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    if dtype == torch.float64:
        base.set_experts_implementation("eager")  # grouped products exist up to fp32
    model: Any = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).to(dtype).eval()
    total, logprobs = 0.0, {}
    for place, group in enumerate(groups):
        prompt = list(group.prompt.token_ids)
        for index, completion in enumerate(group.completions):
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            of_row = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            of_tokens = of_row.gather(1, ids[0, len(prompt) :, None])[:, 0]
            loss = -group.advantages[index] * of_tokens.sum()
            loss.backward()
            total += loss.item()
            logprobs[place, index] = of_tokens.detach()
    gradients = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            layer, _, role = name.removeprefix("base_model.model.").partition(".lora_")
            gradients[layer, role[0] if not role.startswith("embedding") else role[10]] = parameter.grad
    return StockPass(total, gradients, logprobs)


def stock_class(model_path: Path) -> Any:
    """The class of transformers that a model's configuration names."""
    names: list[str] = AutoConfig.from_pretrained(model_path).architectures or []
    return getattr(transformers, names[0])


def packs_of(policy: Policy, groups: Sequence[Group]) -> list[Pack]:
    """All groups in one pack: each prompt once where the model allows it, else one row a completion."""
    if policy.shares_prompts:
        return pack(groups, tokens_per_pack=10_000)
    return pad(groups, tokens_per_pack=10_000, pad_token_id=0)


def own_pass(policy: Policy, groups: Sequence[Group]) -> StockPass:
    """The same loss by the policy."""
    for parameter in policy.masters:
        parameter.grad = None
    packs, total, logprobs = packs_of(policy, groups), 0.0, []
    for one in packs:
        loss, of_tokens, _ = policy.backward(one, lambda lps, _, chunk, one=one: -one.advantages_N[chunk] * lps)
        total += loss.item()
        logprobs.append(of_tokens)
    gradients = {}
    for name, layer in policy.layers.items():
        for role, master in (("A", layer.master_a), ("B", layer.master_b)):
            assert master.grad is not None, f"{name} has a gradient"
            gradients[name, role] = master.grad
    return StockPass(total, gradients, by_origin(packs, logprobs))


def gradient_error(own: StockPass, stock: StockPass) -> float:
    """The largest relative difference of loss and gradients, by the norm of each matrix."""
    assert own.gradients.keys() == stock.gradients.keys(), "the same layers have adapters"
    floor = FLOOR * max(float(gradient.norm()) for gradient in stock.gradients.values())
    errors = [
        float((own.gradients[key].double() - expected.double()).norm()) / max(float(expected.norm()), floor)
        for key, expected in stock.gradients.items()
    ]
    return max(*errors, abs(own.loss - stock.loss) / abs(stock.loss))


def gradient_limit(own: StockPass) -> float:
    """The largest `gradient_error` of a model whose adapters are in these layers."""
    return DELTA_LIMIT if any(".linear_attn." in name for name, _ in own.gradients) else GRADIENT_LIMIT


def logprob_error(own: StockPass, stock: StockPass) -> float:
    """The largest difference of log-probabilities."""
    return max(float((own.logprobs[key].double() - of.double()).abs().max()) for key, of in stock.logprobs.items())


def leak(policy: Policy, groups: Sequence[Group], *, group: int = 0, completion: int = 0) -> float:
    """How much other completions' log-probabilities change, at most, when the tokens of one completion do.

    Raises:
        AssertionError: its own do not change, so that the comparison would mean nothing.
    """
    changed = groups[group].completions[completion]
    ids = tuple(4 + (token + 13) % 200 for token in changed.token_ids)
    completions = list(groups[group].completions)
    completions[completion] = dataclasses.replace(changed, token_ids=ids)
    others = list(groups)
    others[group] = dataclasses.replace(groups[group], completions=tuple(completions))
    before, after = (_logprobs(policy, version) for version in (groups, others))
    assert not torch.allclose(before[group, completion], after[group, completion], atol=1e-3), "the completion has changed"
    differences = [float((before[key] - after[key]).abs().max()) for key in before if key != (group, completion)]
    return max(differences)


def _logprobs(policy: Policy, groups: Sequence[Group]) -> dict[tuple[int, int], torch.Tensor]:
    packs = packs_of(policy, groups)
    return by_origin(packs, [policy.logprobs(one)[0] for one in packs])
