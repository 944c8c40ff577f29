"""Experts that a sampler chose, made up for groups; and routers written plainly, as an oracle.

    groups = with_experts(policy, groups, seed=1)
    with plain_routers(policy.model.config.model_type, choices_of(groups)):
        stock_pass(model_path, adapter, groups)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from rankup.grpo.data.groups import Group
from rankup.grpo.model.policy import Policy

LAYERS, EXPERTS, TOP_K = 2, 4, 2
"""Of the tiny models of `families.py`."""


def _softmax_then_choose(router: Any, logits_LE: torch.Tensor, chosen_LK: torch.Tensor) -> torch.Tensor:
    weights_LK = logits_LE.softmax(-1).gather(-1, chosen_LK)
    return weights_LK / weights_LK.sum(-1, keepdim=True)


def _choose_then_softmax(router: Any, logits_LE: torch.Tensor, chosen_LK: torch.Tensor) -> torch.Tensor:
    return (logits_LE + router.bias).gather(-1, chosen_LK).softmax(-1)


def _sigmoid(router: Any, logits_LE: torch.Tensor, chosen_LK: torch.Tensor) -> torch.Tensor:
    weights_LK = logits_LE.sigmoid().gather(-1, chosen_LK)
    return weights_LK / weights_LK.sum(-1, keepdim=True) * router.routed_scaling_factor


ROUTERS: dict[str, tuple[type[nn.Module], Callable[..., torch.Tensor]]] = {
    "qwen3-moe": (Qwen3MoeTopKRouter, _softmax_then_choose),
    "gpt-oss": (GptOssTopKRouter, _choose_then_softmax),
    "glm4-moe": (Glm4MoeTopkRouter, _sigmoid),
}
"""By family: transformers' router, and the weights of chosen experts from the products with its weight."""


def with_experts(groups: Sequence[Group], *, seed: int = 0) -> list[Group]:
    """The groups with random experts: of a prompt the same for all of its completions."""
    draw = np.random.default_rng(seed)

    def choices(tokens: int) -> np.ndarray:
        return draw.random((tokens, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K].astype(np.uint8)

    def of_group(group: Group) -> Group:
        prompt = choices(len(group.prompt.token_ids))
        completions = [
            dataclasses.replace(one, routed_experts=np.concatenate([prompt, choices(len(one.token_ids) - 1)]))
            for one in group.completions
        ]
        return dataclasses.replace(group, completions=tuple(completions))

    return [of_group(group) for group in groups]


def own_experts(policy: Policy, groups: Sequence[Group]) -> list[Group]:
    """The groups with the experts that the policy's routers choose, each completion alone behind its prompt."""
    routers = dict(find(policy))
    found: dict[int, torch.Tensor] = {}
    hooks = [
        router.register_forward_hook(lambda *call, layer=layer: found.__setitem__(layer, call[-1][2]))
        for layer, router in routers.items()
    ]

    def of_completion(group: Group, token_ids: tuple[int, ...]) -> np.ndarray:
        ids = torch.tensor([[*group.prompt.token_ids, *token_ids[:-1]]])
        with torch.no_grad():
            policy.model(input_ids=ids, use_cache=False)
        experts = np.zeros((ids.shape[1], LAYERS, TOP_K), dtype=np.uint8)
        for layer, chosen in found.items():
            experts[:, layer] = chosen.numpy()
        return experts

    made = [
        dataclasses.replace(
            group,
            completions=tuple(
                dataclasses.replace(one, routed_experts=of_completion(group, one.token_ids)) for one in group.completions
            ),
        )
        for group in groups
    ]
    for hook in hooks:
        hook.remove()
    return made


def find(policy: Policy) -> Iterator[tuple[int, nn.Module]]:
    """The routers of a tiny model, by layer."""
    kinds = tuple(kind for kind, _ in ROUTERS.values())
    for name, module in policy.model.named_modules():
        if isinstance(module, kinds):
            yield int(name.split("layers.")[1].partition(".")[0]), module


@contextmanager
def plain_routers(family: str, groups: Sequence[Group], layers: Sequence[int]) -> Iterator[None]:
    """Let the routers of a family compute plainly, with the experts of these groups: of each completion in turn, behind its
    prompt, in each of these layers.

    The last token of a completion is no input in training. Nothing depends on its experts.
    """
    kind, weigh = ROUTERS[family]
    rows = [one.routed_experts for group in groups for one in group.completions]
    remaining = iter([np.concatenate([row, row[-1:]])[:, layer] for row in rows if row is not None for layer in layers])

    def forward(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat_LD = hidden.reshape(-1, hidden.shape[-1])
        chosen_LK = torch.from_numpy(next(remaining).astype(np.int64))
        logits_LE = flat_LD @ router.weight.T
        return logits_LE, weigh(router, logits_LE, chosen_LK), chosen_LK

    original = kind.forward
    kind.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.forward = original
    assert next(remaining, None) is None, "the routers have used all choices"
