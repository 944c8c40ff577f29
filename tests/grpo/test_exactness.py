"""Loss and adapter gradients of our layouts against the plain one: stock PEFT, one padded row a completion, full logits.

Everything that makes training cheap is in play on our side: each prompt once (or right padding), groups split over packs, the
fused adapter, log-probabilities in one pass over the logits. All of it must be exact: fp32, relative error at most 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from sample_groups import make_group, random_groups
from transformers import AutoModelForCausalLM

from rankup.grpo.algorithm.losses import Counts
from rankup.grpo.config import AlgorithmConfig, GRPOConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.model.lora_layers import FusedLoRALinear
from rankup.grpo.model.packing import Pack, by_completion, pack, pad
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.objective import Objective, StepConstants

LossType = Literal["dapo", "grpo"]

# Ragged prompts and completions; a prompt of one token, completions of none and of one.
SHAPES = [(7, [5, 1, 9, 0, 4]), (1, [3, 6]), (12, [2])]
TEMPERATURE = 0.8
TOLERANCE = 1e-5


def plain_peft(policy: Policy, base_folder: Path, adapter_folder: Path) -> PeftModel:
    """Stock transformers and stock PEFT with the policy's adapter, which is published."""
    policy.write_slots()
    policy.save_adapter(adapter_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(base, adapter_folder, is_trainable=True)


def plain_logprobs(model: PeftModel, groups: Sequence[Group]) -> list[torch.Tensor]:
    """Log-probabilities of every completion that is not empty: one row each, padded on the right, full logits."""
    completions = [(w.prompt.token_ids, c.token_ids) for w in groups for c in w.completions if c.token_ids]
    rows = [torch.tensor(prompt + ids) for prompt, ids in completions]
    ids_SL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask_SL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits_SLV = model(input_ids=ids_SL, attention_mask=mask_SL).logits / TEMPERATURE
    logprobs_SL = logits_SLV[:, :-1].log_softmax(-1).gather(2, ids_SL[:, 1:, None])[..., 0]
    return [
        row[len(prompt) - 1 : len(prompt) - 1 + len(ids)]
        for row, (prompt, ids) in zip(logprobs_SL, completions, strict=True)
    ]


def plain_loss(
    algorithm: AlgorithmConfig,
    logprobs: list[torch.Tensor],
    *,
    old: list[torch.Tensor],
    base: list[torch.Tensor],
    advantages: list[float],
) -> torch.Tensor:
    """The objective by its definition, completion by completion."""
    means, total = [], torch.zeros(())
    for logprobs_T, old_T, base_T, advantage in zip(logprobs, old, base, advantages, strict=True):
        ratio_T = torch.exp(logprobs_T - old_T)
        clipped_T = ratio_T.clamp(1 - algorithm.epsilon, 1 + algorithm.epsilon_high)
        loss_T = -torch.minimum(ratio_T * advantage, clipped_T * advantage)
        loss_T = loss_T + algorithm.beta * (torch.exp(base_T - logprobs_T) - (base_T - logprobs_T) - 1)
        means.append(loss_T.mean())
        total = total + loss_T.sum()
    if algorithm.loss_type == "grpo":
        return torch.stack(means).mean()
    return total / sum(len(logprobs_T) for logprobs_T in logprobs)


def groups_near_the_policy(model: PeftModel) -> list[Group]:
    """Groups whose sampler's log-probabilities are the policy's but for noise that some tokens' clipping notices.

    Most advantages are negative, so that the loss is a sum without cancellation and its relative error means something.
    """
    groups = random_groups(SHAPES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        remaining = iter(plain_logprobs(model, groups))
    noisy = []
    for weighted in groups:
        logprobs: list[list[float]] = []
        for completion in weighted.completions:
            exact = next(remaining) if completion.token_ids else torch.zeros(0)
            logprobs.append((exact + 0.8 * (torch.rand(exact.shape, generator=generator) - 0.5)).tolist())
        noisy.append(
            make_group(
                weighted.prompt.token_ids,
                [c.token_ids for c in weighted.completions],
                advantages=[advantage - 1.5 for advantage in weighted.advantages],
                logprobs=logprobs,
            )
        )
    return noisy


def accumulate(policy: Policy, packs: list[Pack], config: GRPOConfig, *, off_policy: bool) -> float:
    """Our loss over all packs; leaves the gradients at the master weights."""
    sequences, tokens = sum(len(one.lengths_S) for one in packs), sum(len(one.targets_N) for one in packs)
    counts = Counts(sequences=sequences, tokens=tokens, local_tokens=tokens, max_completion_length=100)
    objective, constants = Objective(config), StepConstants(counts=counts, entropy_tokens=tokens)
    total = 0.0
    for one in packs:
        uses_base = config.algorithm.beta > 0
        base_N = policy.logprobs(one, temperature=TEMPERATURE, use_adapter=False)[0] if uses_base else None
        old_N = one.sampler_logprobs_N if off_policy else None
        loss = objective.of(one, constants, old_logprobs_N=old_N, reference_logprobs_N=base_N)
        total += policy.backward(
            one, loss.token_loss, temperature=TEMPERATURE, passes=loss.passes, factor=loss.factor
        )[0].item()
    return total


def relative_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    return ((measured - expected).norm() / expected.norm()).item()


def layouts(policy: Policy, groups: list[Group], layout: str, budget: int) -> list[Pack]:
    if layout == "shared":
        assert policy.shares_prompts, policy.plain_reason
        return pack(groups, tokens_per_pack=budget)
    policy.shares_prompts = False  # as of a policy that cannot share prompts
    return pad(groups, tokens_per_pack=budget, pad_token_id=0)


def compare(
    policy: Policy, model: PeftModel, config: GRPOConfig, *, layout: str, off_policy: bool, budget: int
) -> None:
    """Loss and all adapter gradients of both sides; ours from packs of `budget` tokens."""
    groups = groups_near_the_policy(model)
    logprobs = plain_logprobs(model, groups)
    with torch.no_grad(), model.disable_adapter():
        base = plain_logprobs(model, groups)
    completions = [(c, a) for w in groups for c, a in zip(w.completions, w.advantages, strict=True) if c.token_ids]
    old = [torch.tensor(c.logprobs) if off_policy else lp.detach() for (c, _), lp in zip(completions, logprobs, strict=True)]
    expected = plain_loss(config.algorithm, logprobs, old=old, base=base, advantages=[a for _, a in completions])
    expected.backward()

    packs = layouts(policy, groups, layout, budget)
    assert (len(packs) > 1) == (budget < 1000)
    measured = accumulate(policy, packs, config, off_policy=off_policy)
    assert measured == pytest.approx(expected.item(), rel=TOLERANCE)
    stock = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    errors = {}
    for name, layer in policy.layers.items():
        parts = ("lora_embedding_A.default", "lora_embedding_B.default")
        if isinstance(layer, FusedLoRALinear):
            parts = ("lora_A.default.weight", "lora_B.default.weight")
        for part, weight in zip(parts, (layer.master_a, layer.master_b), strict=True):
            gradient = stock.pop(f"base_model.model.{name}.{part}")
            assert gradient is not None and weight.grad is not None
            errors[f"{name}.{part}"] = relative_error(weight.grad, gradient)
    assert max(errors.values()) <= TOLERANCE, errors
    assert not stock, "every adapter of stock PEFT is one of ours"


@pytest.mark.parametrize(
    ("loss_type", "beta", "off_policy", "budget"),
    [("dapo", 0.0, False, 1000), ("grpo", 0.3, True, 1000), ("dapo", 0.3, True, 25), ("grpo", 0.0, False, 25)],
)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (kind, layout)
        for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")
        for layout in ("shared", "plain")
    ],
)
def test_loss_and_gradients_equal_those_of_the_plain_layout(
    make_policy,
    tiny_model_path,
    tmp_path: Path,
    kind: str,
    layout: str,
    loss_type: LossType,
    beta: float,
    off_policy: bool,
    budget: int,
) -> None:
    policy: Policy = make_policy(kind)
    assert len(policy.layers) == 14, "seven projections in each of two layers"
    model = plain_peft(policy, tiny_model_path(kind), tmp_path / "adapter")
    config = GRPOConfig(loss_type=loss_type, beta=beta, mode="none")
    compare(policy, model, config, layout=layout, off_policy=off_policy, budget=budget)


ADAPTERS = {
    "head, rank and alpha patterns, rsLoRA": {
        "targets": ["q_proj", "v_proj", "down_proj", "lm_head"],
        "rank_pattern": {"q_proj": 5, "lm_head": 12, "layers.1.mlp.down_proj": 16},
        "alpha_pattern": {"v_proj": 32},
        "use_rslora": True,
    },
    "embedding": {
        "targets": ["embed_tokens", "q_proj", "up_proj"],
        "rank_pattern": {"embed_tokens": 5},
        "alpha_pattern": {"embed_tokens": 3},
    },
    "embedding and head": {"targets": ["embed_tokens", "lm_head"], "use_rslora": True},
    "one layer by an expression": {"targets": r".*layers\.1\.(self_attn\.(k|o)|mlp\.up)_proj"},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # nothing is merged
@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_any_set_of_adapters(make_policy, tiny_model_path, tmp_path: Path, kind: str, lora: dict) -> None:
    """Tied and untied heads, biases, a head that caps its logits, an embedding that scales what it gives (Gemma)."""
    policy: Policy = make_policy(kind, **lora)
    if "model.embed_tokens" in policy.layers:  # its A begins at zero
        torch.nn.init.normal_(policy.layers["model.embed_tokens"].master_a, generator=torch.Generator().manual_seed(0))
    model = plain_peft(policy, tiny_model_path(kind), tmp_path / "adapter")
    layout = "shared" if policy.shares_prompts else "plain"
    compare(policy, model, GRPOConfig(beta=0.3, mode="none"), layout=layout, off_policy=True, budget=25)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_logprobs_and_entropies_with_and_without_the_adapter(
    make_policy, tiny_model_path, tmp_path: Path, kind: str
) -> None:
    policy: Policy = make_policy(kind)
    model = plain_peft(policy, tiny_model_path(kind), tmp_path / "adapter")
    groups = random_groups(SHAPES)
    packs = layouts(policy, groups, "shared" if policy.shares_prompts else "plain", 25)
    found = {}
    for use_adapter in (True, False):
        results = [policy.logprobs(one, temperature=TEMPERATURE, use_adapter=use_adapter) for one in packs]
        logprobs, entropies = ([result[i] for result in results] for i in (0, 1))
        found[use_adapter], entropies = torch.cat(by_completion(packs, logprobs)), torch.cat(entropies)
        assert (entropies > 0).all() and not found[use_adapter].requires_grad
    with torch.no_grad():
        torch.testing.assert_close(found[True], torch.cat(plain_logprobs(model, groups)), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(found[False], torch.cat(plain_logprobs(model, groups)), rtol=1e-5, atol=1e-5)
    assert (found[True] - found[False]).abs().mean() > 0.1, "an adapter that does nothing would prove nothing"
