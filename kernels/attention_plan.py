"""Which tokens of a pack of shared prompts are computed together, and the order of their rows.

    plan = plan_blocks([(7, [5, 3]), (2, [4])], heads=9, key_heads=3)     # prompt length, completion lengths of each group
    plan = plan_blocks([(7, [5, 3])], heads=9, key_heads=3, window=4)     # a token sees 4 positions: its own and 3 before it

The pack is split into sequences: every prompt by itself, and every completion behind its prompt. Sequences of similar length
behind prompts of equal length form a unit, in which the query heads of a key head are rows of one product. A unit whose scores
would exceed `SCORES_LIMIT` is computed in blocks of tokens, each without the keys that none of its tokens sees.

A token of a layer with a window sees its own position and the W - 1 before it, a band of the sequence's columns. So a
completion is given the last W - 1 tokens of its prompt only.

Shapes: L tokens of the pack, H query heads, K key heads, h = H / K query heads of a key head, D head dimension, E = h * D;
U sequences of a unit, P tokens of their prompt, C tokens of each (padded), S keys of each (P + C, padded), T tokens of a block;
Q and N are the rows of all units' queries and keys together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

SCORES_LIMIT = 2**22  # elements formed at a time; if smaller, summing the gradients of keys over blocks dominates
KEPT_LIMIT = 2**22  # elements of weights that a layer saves for the backward instead of recomputing them: 8 MiB in bf16
PADDING_LIMIT = 2**16  # elements of padding that cost no more than another unit
WINDOW_TOKENS = 128  # a block of a windowed layer has at least as many tokens: smaller ones cost more in calls than they save
COLUMNS = 32  # rows of scores are padded to a multiple: torch's softmax in bf16 takes 2 to 4 times as long otherwise


class Tokens(NamedTuple):
    """A sequence of the pack: its first token, its length, and the first token of the prompt that it sees."""

    start: int
    length: int
    prompt_start: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """Sequences that are computed together, all behind prompts of the same length.

    Attributes:
        prompts: first token of each prompt and the number of sequences behind it, in the sequences' order.
        prompt_length: tokens of the prompt that each sequence is given; 0 if the sequences are prompts themselves.
        count, width, columns: U, C and S.
        tokens: largest number of the C tokens in a block.
        query_start, key_start: first of the unit's rows, [U, K, C] of queries and [U, K, S] of keys.
        window: how many positions a token sees, its own included; None: all before it.
    """

    prompts: tuple[tuple[int, int], ...]
    prompt_length: int
    count: int
    width: int
    columns: int
    tokens: int
    query_start: int
    key_start: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens `start` to `stop` of each of a unit's sequences, and the keys that any of them sees."""

    unit: Unit
    start: int
    stop: int
    heads: int
    key_heads: int

    @property
    def first_column(self) -> int:
        """The first key that the block's first token sees, rounded down."""
        if self.unit.window is None:
            return 0
        return max(0, self.unit.prompt_length + self.start + 1 - self.unit.window) // COLUMNS * COLUMNS

    @property
    def columns(self) -> int:
        return _padded(self.unit.prompt_length + self.stop) - self.first_column

    @property
    def heads_per_key(self) -> int:
        return self.heads // self.key_heads

    def queries(self, rows_QE: torch.Tensor) -> torch.Tensor:
        """This block's part of all units' queries: a view [U * K, T * h, D]."""
        batch, shared = self.unit.count * self.key_heads, self.heads_per_key
        rows = rows_QE.narrow(0, self.unit.query_start, batch * self.unit.width)
        return rows.view(batch, self.unit.width * shared, -1).narrow(1, self.start * shared, (self.stop - self.start) * shared)

    def keys(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """This block's part of all units' keys: a view [U * K, S, D]."""
        batch = self.unit.count * self.key_heads
        rows = rows_ND.narrow(0, self.unit.key_start, batch * self.unit.columns)
        return rows.view(batch, self.unit.columns, -1).narrow(1, self.first_column, self.columns)

    def mask(self, like: torch.Tensor) -> torch.Tensor:
        """[T, S]: minus infinity where a token does not see a key, else 0. Padding comes after every token."""
        own_column = self.unit.prompt_length + self.start - self.first_column  # of the block's first token
        hidden_TS = like.new_full((self.stop - self.start, self.columns), float("-inf"))
        if self.unit.window is None:
            return hidden_TS.triu_(own_column + 1)
        return hidden_TS.triu(own_column + 1) + hidden_TS.tril_(own_column - self.unit.window)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Maps the pack's rows to the units' rows and back. The pack has a row for each token and key head, token * K + head.

    Attributes:
        query_rows, key_rows: for each of the units' rows the pack's row, [Q] and [N].
        padding: which of the Q are padding.
        result_rows, own_rows: for each of the pack's rows its index among the Q and among the N, [L * K].
        keeps_weights: whether the weights of all units are small enough to be saved for the backward.
    """

    heads: int
    key_heads: int
    units: tuple[Unit, ...]
    query_rows: torch.Tensor
    key_rows: torch.Tensor
    padding: torch.Tensor
    result_rows: torch.Tensor
    own_rows: torch.Tensor
    keeps_weights: bool

    def blocks(self) -> Iterator[Block]:
        for unit in self.units:
            for start in range(0, unit.width, unit.tokens):
                yield Block(unit, start, min(start + unit.tokens, unit.width), self.heads, self.key_heads)

    @property
    def is_cut(self) -> bool:
        """Whether some unit has more than one block, so that gradients of its keys are sums."""
        return any(unit.tokens < unit.width for unit in self.units)

    @property
    def has_prompts_of_several_units(self) -> bool:
        """Whether gradients of some prompt's keys come from more than one unit."""
        starts = [start for unit in self.units if unit.prompt_length for start, _ in unit.prompts]
        return len(set(starts)) < len(starts)


def plan_blocks(
    groups: Sequence[tuple[int, Sequence[int]]],
    heads: int,
    key_heads: int,
    device: torch.device | str = "cpu",
    *,
    window: int | None = None,
) -> BlockPlan:
    """The plan for (prompt length, completion lengths) of each group, in the pack's order. Completions may be empty.

    window: a token sees its own position and the `window - 1` before it; None: all before it.
    """
    prompts: list[Tokens] = []
    behind: dict[int, list[Tokens]] = {0: prompts}  # by the prompt's length; 0 for prompts themselves
    length = 0
    for prompt_length, completion_lengths in groups:
        prompts.append(Tokens(length, prompt_length))
        length += prompt_length
        seen = seen_of_prompt(prompt_length, window)
        prompt_start = length - seen
        completions = behind.setdefault(seen, [])
        for completion_length in completion_lengths:
            if completion_length > 0:
                completions.append(Tokens(length, completion_length, prompt_start))
            length += completion_length
    units: list[Unit] = []
    rows: list[tuple[torch.Tensor, ...]] = []
    num_queries = num_keys = 0
    for prompt_length, sequences in behind.items():
        for similar in _of_similar_length(sequences, prompt_length, heads):
            count, width = len(similar), max(s.length for s in similar)
            columns = _padded(prompt_length + width)
            tokens = width if count > 1 else max(1, min(width, SCORES_LIMIT // (heads * columns)))
            if window is not None:  # blocks leave out the keys before the window
                tokens = min(tokens, max(window, WINDOW_TOKENS))
            prompts_of_unit = itertools.groupby(s.prompt_start for s in similar)
            starts = tuple((start, len(list(own))) for start, own in prompts_of_unit)
            units.append(Unit(starts, prompt_length, count, width, columns, tokens, num_queries, num_keys, window))
            rows.append(_rows_of_unit(prompt_length, similar, width, columns, key_heads))
            num_queries += count * key_heads * width
            num_keys += count * key_heads * columns
    query_rows, is_query, key_rows, is_own_key = map(torch.cat, zip(*rows, strict=True))
    return BlockPlan(
        heads=heads,
        key_heads=key_heads,
        units=tuple(units),
        query_rows=query_rows.to(device),
        key_rows=key_rows.to(device),
        padding=(~is_query).nonzero()[:, 0].to(device),
        result_rows=_places(query_rows, is_query, length * key_heads).to(device),
        own_rows=_places(key_rows, is_own_key, length * key_heads).to(device),
        keeps_weights=heads * sum(unit.count * unit.width * unit.columns for unit in units) <= KEPT_LIMIT,
    )


def seen_of_prompt(prompt_length: int, window: int | None) -> int:
    """How many of its prompt's tokens, the last ones, the first token of a completion sees."""
    return prompt_length if window is None else min(prompt_length, window - 1)


def _of_similar_length(sequences: list[Tokens], prompt_length: int, heads: int) -> Iterator[list[Tokens]]:
    """The sequences in parts with little padding whose scores are within the limit, each in the pack's order."""
    part: list[Tokens] = []
    padding = 0
    for sequence in sorted(sequences, key=lambda s: -s.length):
        width = part[0].length if part else sequence.length
        scores = heads * _padded(prompt_length + width)  # of one token
        padding += scores * (width - sequence.length)
        if part and (scores * width * (len(part) + 1) > SCORES_LIMIT or padding > PADDING_LIMIT):
            yield sorted(part)
            part, padding = [], 0
        part.append(sequence)
    if part:
        yield sorted(part)


def _padded(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


def _rows_of_unit(
    prompt_length: int, sequences: list[Tokens], width: int, columns: int, key_heads: int
) -> tuple[torch.Tensor, ...]:
    """The pack's row of each query [U * K * C] and whether it is no padding; the pack's row of each key [U * K * S] and whether
    it is a token of the sequence itself."""
    first_U, length_U, prompt_U = torch.tensor(sequences).unbind(1)
    column = torch.arange(columns - prompt_length)
    # Padding repeats the sequence's last token: its values are finite, and no token of the sequence sees it.
    after_prompt = first_U[:, None] + torch.minimum(column, length_U[:, None] - 1)
    is_token = column < length_U[:, None]
    prompt_UP = prompt_U[:, None] + torch.arange(prompt_length)
    keys_US = torch.cat([prompt_UP, after_prompt], dim=1)
    is_own_US = torch.cat([torch.zeros_like(prompt_UP, dtype=torch.bool), is_token], dim=1)

    def rows(tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, None] * key_heads + torch.arange(key_heads)[:, None]).flatten()

    def of_every_head(mask: torch.Tensor) -> torch.Tensor:
        return mask[:, None].expand(-1, key_heads, -1).flatten()

    return rows(after_prompt[:, :width]), of_every_head(is_token[:, :width]), rows(keys_US), of_every_head(is_own_US)


def _places(rows: torch.Tensor, is_own: torch.Tensor, length: int) -> torch.Tensor:
    """The index at which each of the pack's rows stands among `rows`, where `is_own`."""
    places = torch.empty(length, dtype=torch.long)
    places[rows[is_own]] = is_own.nonzero()[:, 0]
    return places
