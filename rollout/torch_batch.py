"""Rows that are sampled together, with one cache of keys and values: what `torch_requests.py` runs the model on.

    batch = Batch.prefilled(model, prompts, repeats)      # each prompt once, padded on the left, and its cache repeated
    tokens_B = sample(batch.logits_BV)
    batch.append(tokens_B)
    batch.select([0, 2])                                  # the other rows have ended
    running.join(batch)
    running.decode()                                      # the logits of the next tokens

A row that ends may leave its keys and values (`Kept`), which its next turn continues.

Legend: B rows, T tokens, V vocabulary, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True, slots=True)
class Kept:
    """The keys and values of one row: of each layer [1, H, T, D], of the last `num_tokens` or those of its window."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    num_tokens: int


class Batch:
    """See the module's docstring.

    Attributes:
        logits_BV: of the next token of each row, in fp32.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, attends_BT: torch.Tensor, logits_BV: torch.Tensor) -> None:
        self._model = model
        self._cache = cache
        self._attends_BT = attends_BT
        self._input_B1 = torch.empty(0, dtype=torch.long)
        self.logits_BV = logits_BV

    @classmethod
    def prefilled(
        cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, device: str
    ) -> Batch:
        """`repeats[i]` rows behind the prompt i, which is computed once."""
        ids = [torch.tensor(prompt, device=device) for prompt in prompts]
        input_BT = pad_sequence(ids, batch_first=True, padding_side="left")
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = input_BT.shape[1]
        attends_BT = (torch.arange(width, device=device) >= width - lengths_B[:, None]).long()
        cache = DynamicCache(config=model.config)
        logits_BV = _forward(model, cache, input_BT, attends_BT)
        places = torch.arange(len(prompts), device=device).repeat_interleave(torch.tensor(repeats, device=device))
        cache.batch_select_indices(places)
        return cls(model, cache, attends_BT[places], logits_BV[places])

    @classmethod
    def continued(cls, model: PreTrainedModel, prompt: Sequence[int], kept: Kept, *, device: str) -> Batch:
        """One row behind a prompt, of which `kept` has the beginning."""
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in zip(cache.layers, kept.layers, strict=True):
            _set(cast(DynamicLayer, layer), keys, values, width=kept.num_tokens)
        input_1T = torch.tensor([list(prompt[kept.num_tokens :])], device=device)
        attends_1T = torch.ones(1, len(prompt), dtype=torch.long, device=device)
        return cls(model, cache, attends_1T, _forward(model, cache, input_1T, attends_1T))

    @property
    def width(self) -> int:
        """Tokens of the longest row, the newest included, with padding."""
        return self._attends_BT.shape[1]

    def append(self, tokens_B: torch.Tensor) -> None:
        """The sampled tokens, one for each row: the next input."""
        self._input_B1 = tokens_B[:, None]
        self._attends_BT = torch.cat([self._attends_BT, torch.ones_like(self._input_B1)], dim=1)

    def decode(self) -> None:
        """Compute `logits_BV` behind the tokens that were appended last."""
        self.logits_BV = _forward(self._model, self._cache, self._input_B1, self._attends_BT)

    def select(self, places: Sequence[int]) -> None:
        """Keep these rows only, and no column that is padding in all of them."""
        places_B = torch.tensor(places, dtype=torch.long, device=self._attends_BT.device)
        self._cache.batch_select_indices(places_B)
        self._input_B1, self._attends_BT = self._input_B1[places_B], self._attends_BT[places_B]
        self._trim()

    def keep(self, place: int, num_tokens: int) -> Kept:
        """What is cached of the first `num_tokens` tokens of a row: all but its newest."""
        layers = [cast(DynamicLayer, layer) for layer in self._cache.layers]
        cached = [(_of_layer(layer.keys), _of_layer(layer.values)) for layer in layers]
        shares = [min(num_tokens, keys.shape[2]) for keys, _ in cached]
        copies = (
            (keys[place : place + 1, :, keys.shape[2] - share :].clone(), values[place : place + 1, :, -share:].clone())
            for (keys, values), share in zip(cached, shares, strict=True)
        )
        return Kept(tuple(copies), num_tokens)

    def join(self, other: Batch) -> None:
        """Add the rows of another batch behind its own; both have appended a token."""
        self._trim()
        other._trim()
        width = max(self.width, other.width)
        for ours, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            layers = cast(DynamicLayer, ours), cast(DynamicLayer, theirs)
            cached = width - 1  # all but the newest token
            if isinstance(ours, DynamicSlidingWindowLayer):
                cached = min(cached, ours.sliding_window - 1)
            keys = torch.cat([_widened(_of_layer(layer.keys), cached) for layer in layers])
            values = torch.cat([_widened(_of_layer(layer.values), cached) for layer in layers])
            _set(layers[0], keys, values, width=width - 1)
        both = [pad(one._attends_BT, (width - one.width, 0)) for one in (self, other)]
        self._attends_BT = torch.cat(both)
        self._input_B1 = torch.cat([self._input_B1, other._input_B1])

    def _trim(self) -> None:
        """Remove columns that are padding in every row."""
        padding = self.width - int(self._attends_BT.sum(1).max())
        if not padding:
            return
        self._attends_BT = self._attends_BT[:, padding:]
        for layer in cast(Sequence[DynamicLayer], self._cache.layers):
            keys, values = _of_layer(layer.keys), _of_layer(layer.values)
            cached = min(self.width - 1, keys.shape[2])
            _set(layer, keys[:, :, -cached:], values[:, :, -cached:], width=self.width - 1)


def _forward(
    model: PreTrainedModel, cache: DynamicCache, input_BT: torch.Tensor, attends_BT: torch.Tensor
) -> torch.Tensor:
    """The logits [B, V] behind the last token of each row, in fp32."""
    positions_BT = (attends_BT.cumsum(-1) - 1).clamp(min=0)[:, -input_BT.shape[1] :]
    logits_B1V = model(
        input_ids=input_BT,
        attention_mask=attends_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits_B1V[:, -1].float()


def _of_layer(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "every layer has cached something"
    return tensor


def _set(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor, *, width: int) -> None:
    """Make these the cache of the layer, of `width` tokens."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width


def _widened(cached: torch.Tensor, width: int) -> torch.Tensor:
    """The last `width` tokens of [B, H, T, D], with zeros, to which nothing attends, on the left."""
    return pad(cached[:, :, max(0, cached.shape[2] - width) :], (0, 0, max(0, width - cached.shape[2]), 0))
