"""The routers of a mixture of experts: how often they choose other experts than the sampler did, and replaying its choice.

    routers = Routers(model, replay=True)
    with routers.over(pack.routed_experts, counts=True):      # around forward and backward of a pack
        model(...)
    routers.take_flips()

Rounding differs between sampler and trainer, and where two experts score alike, it decides which one computes a token: then
the token's log-probability differs by much more than rounding. Replaying (rollout routing replay, "Stabilizing MoE
Reinforcement Learning by Aligning Training and Inference Routers", arXiv 2510.11370) lets the trainer compute with the
sampler's experts, in all of its passes, that of a reference policy too. Only the choice is the sampler's: the weights of these
experts are those of the trainer's router, so gradients flow through it to what is before it.

A router is not written anew. While one of transformers computes, its `topk` over the experts returns the sampler's choice
instead of its own, with the scores there; whatever the family does with them (softmax before or after, sigmoid, groups, biases,
scales) is its own code.

Legend: L tokens that go through the model in a pack, K experts of a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...rollout.routed_experts import UseOfExperts

__all__ = ["Flips", "Routers", "UseOfExperts", "find_routers"]

TOP_K = (torch.topk, torch.Tensor.topk)


class Flips(NamedTuple):
    """Pairs of a token and a layer with experts: in how many of them the trainer's router chose another set of experts."""

    flipped: float
    compared: float


class Routers:
    """See the module's docstring.

    Attributes:
        replay: whether the model computes with the sampler's choice; otherwise both are compared only.
        layers: the decoder's layers that have experts.

    Raises:
        ValueError: the model has no routers that can be followed.
    """

    def __init__(self, model: nn.Module, *, replay: bool) -> None:
        self.replay = replay
        self._experts: torch.Tensor | None = None
        self._uncounted: set[int] = set()
        self._flipped: list[torch.Tensor] = []
        self._compared: list[torch.Tensor] = []
        found = find_routers(model)
        if not found:
            raise ValueError(
                f"rollout.routed_experts: {type(model).__name__} has no routers that can be followed: set ignore"
            )
        self.layers, self._routers = tuple(found), tuple(found.values())
        for layer, router in found.items():
            router.forward = self._following(layer, router, router.forward)

    @contextmanager
    def over(self, experts: torch.Tensor | None, *, counts: bool = False) -> Iterator[None]:
        """Around forward and backward of a pack, with the sampler's choice of experts, as in `Pack.routed_experts`.

        Args:
            experts: None: the routers choose as ever.
            counts: add to what `take_flips` returns. A layer that is recomputed counts once.
        """
        self._experts, self._uncounted = experts, set(self.layers) if counts else set()
        try:
            yield
        finally:
            self._experts, self._uncounted = None, set()

    def check(self, forward: Callable[[], torch.Tensor]) -> None:
        """Whether all routers can be followed. `forward`: a pass of the model over two tokens.

        Raises:
            ValueError: one of them chooses in another way.
        """
        device, top_k = next(self._routers[0].parameters()).device, max(cast(int, one.top_k) for one in self._routers)
        unknown = torch.full((2, max(self.layers) + 1, top_k), -1, dtype=torch.int16, device=device)
        with self.over(unknown), torch.no_grad():
            forward()

    def take_flips(self) -> Flips:
        """What was counted since the last call."""
        sums = [float(torch.stack(counts).sum()) if counts else 0.0 for counts in (self._flipped, self._compared)]
        self._flipped, self._compared = [], []
        return Flips(*sums)

    def _following(self, layer: int, router: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass of a router that follows the sampler's choice within `over`."""

        def follow(*args: Any, **kwargs: Any) -> Any:
            if self._experts is None:
                return forward(*args, **kwargs)
            chosen_LK = self._experts[:, layer].long()
            with _Choice(router, chosen_LK if self.replay else None) as choice:
                output = forward(*args, **kwargs)
            if len(choice.own) != 1:
                raise ValueError(
                    f"rollout.routed_experts: a {type(router).__name__} chooses experts in a way that cannot be followed: set "
                    "ignore"
                )
            if layer in self._uncounted:
                self._uncounted.discard(layer)
                self._flipped.append(differs(choice.own[0], chosen_LK).sum())
                self._compared.append(is_known(chosen_LK).sum())
            return output

        return follow


class _Choice(TorchFunctionMode):
    """Within it, `topk` over all experts of a router returns `chosen_LK`, where that is another set than the router's own.

    Attributes:
        own: what the router itself has chosen, [L, K] for each call.
    """

    def __init__(self, router: nn.Module, chosen_LK: torch.Tensor | None) -> None:
        super().__init__()
        self._sizes = cast(int, router.num_experts), cast(int, router.top_k)
        self._chosen_LK = chosen_LK
        self.own: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in TOP_K:
            return result
        scores = cast(torch.Tensor, args[0] if args else (kwargs or {})["input"])
        # Groups of experts are chosen by `topk` too, of other shapes.
        if scores.dim() != 2 or (scores.shape[-1], result.indices.shape[-1]) != self._sizes:
            return result
        self.own.append(result.indices)
        if self._chosen_LK is None:
            return result
        # The same experts in another order would be summed in that order: without flips, replaying changes no bit.
        indices_LK = torch.where(differs(result.indices, self._chosen_LK)[:, None], self._chosen_LK, result.indices)
        return torch.return_types.topk((scores.gather(-1, indices_LK), indices_LK))  # type: ignore[attr-defined]


def is_known(chosen_LK: torch.Tensor) -> torch.Tensor:
    """Whether the sampler's choice for a token is known, [L]."""
    return (chosen_LK >= 0).all(-1)


def differs(own_LK: torch.Tensor, chosen_LK: torch.Tensor) -> torch.Tensor:
    """Whether the sampler's choice for a token is known and another set of experts than the router's own, [L]."""
    return is_known(chosen_LK) & (own_LK.sort(-1).values != chosen_LK.sort(-1).values).any(-1)


def find_routers(model: nn.Module) -> dict[int, nn.Module]:
    """The routers of the decoder that choose a fixed number of experts for each token, by layer."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if layer and all(isinstance(getattr(module, size, None), int) for size in ("top_k", "num_experts")):
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.shape[0] == module.num_experts:
                found[int(layer[1])] = module
    return found
