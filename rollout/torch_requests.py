"""Requests to the engine in plain torch, sampled together: `turns.Requests`.

    with TorchRequests(policy, sampling, Ends(texts=texts, tokens=...), max_num_seqs=128, ...) as requests:
        requests.submit(0, request)
        while requests.has_unfinished:
            for key, turn in requests.step():
                ...

New requests wait until there is room for all that share a prompt, which is computed once. The next turn of an episode comes
before them, and continues the keys and values that its last turn left. Requests that use the adapter and those that sample from
the base model run in the same steps, each as a batch of their own.

Legend: B rows (completions that are being sampled), V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, cast

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .activity import Activity
from .config import SamplingConfig
from .engine_errors import NOT_FINITE
from .slots import AdapterSlot
from .texts import Texts
from .torch_batch import Batch, Kept
from .turns import Request, Turn
from .types import EngineError


class SampledPolicy(Protocol):
    """The part of the policy (`grpo/model/policy.py`) that this engine uses."""

    model: PreTrainedModel
    device: str

    @property
    def slots(self) -> Mapping[str, AdapterSlot]:
        """The adapter that its forward multiplies with, by PEFT module name."""
        ...

    def sampling(self, *, use_adapter: bool) -> AbstractContextManager[None]:
        """Within it, the model is used with or without the adapter, and no gradient is recorded."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What ends a completion: these tokens, and the stop strings of `texts`."""

    texts: Texts
    tokens: frozenset[int]


@dataclass(eq=False, slots=True)
class _Row:
    """A completion that is being sampled."""

    key: int
    request: Request
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    text: str | None = None
    """Set if a token or a stop string ended it."""
    ended_by_token: bool = False
    uniforms: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """A random number in [0, 1) for each token it may get; empty if it is greedy."""

    def add(self, token: int, logprob: float, ends: Ends) -> None:
        """Add a sampled token, and note if it ends the row."""
        texts = ends.texts
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in ends.tokens:
            self.finish_reason, self.text, self.ended_by_token = "stop", texts.ended_by_token(self.token_ids), True
            return
        if len(self.token_ids) == self.request.max_tokens:
            self.finish_reason = "length"
        if texts.stop_strings and (text := texts.first_stop(self.token_ids)) is not None:
            self.finish_reason, self.text = "stop", text


class _Lane:
    """Requests that are sampled with the same weights: all with the adapter, or all without. One batch."""

    def __init__(self, policy: SampledPolicy, sampling: SamplingConfig, ends: Ends, *, use_adapter: bool) -> None:
        self._policy = policy
        self._ends = ends
        self._use_adapter = use_adapter
        self._warp = None if sampling.temperature == 0 else warpers(sampling)
        self._new: deque[_Row] = deque()
        self._continued: deque[_Row] = deque()
        self.rows: list[_Row] = []
        """Row i of the batch belongs to `rows[i]`."""
        self._batch: Batch | None = None
        self._kept: dict[int, tuple[tuple[int, ...], Kept]] = {}

    @property
    def has_unfinished(self) -> bool:
        """Whether a request was submitted and has not ended."""
        return bool(self.rows or self._new or self._continued)

    def submit(self, key: int, request: Request) -> None:
        """Sample this request from the next step on."""
        row = _Row(key, request)
        if self._warp is not None:
            generator = None if request.seed is None else torch.Generator().manual_seed(request.seed)
            row.uniforms = torch.rand(request.max_tokens, generator=generator, dtype=torch.float64)
        cached = self._kept.get(key)
        is_continued = cached is not None and request.prompt_token_ids[: len(cached[0])] == cached[0]
        (self._continued if is_continued else self._new).append(row)

    def release(self, key: int) -> None:
        """No further turn of this key follows."""
        self._kept.pop(key, None)

    def clear(self) -> None:
        """Forget all requests."""
        self.rows, self._batch = [], None
        self._new.clear()
        self._continued.clear()
        self._kept.clear()

    def step(self, room: int, *, is_alone: bool) -> list[_Row]:
        """Sample one more token of the running rows; returns those that have ended. New rows get their first token in a step
        of their own.

        Args:
            room: for further rows.
            is_alone: no other lane has running rows.
        """
        ended: list[_Row] = []
        with self._policy.sampling(use_adapter=self._use_adapter):
            admitted = self._admitted(room, is_alone=is_alone)
            for batch, rows in admitted:
                ended += self._sample(batch, rows)
                self._join(batch, rows)
            if not admitted and self._batch is not None:
                self._batch.decode()
                ended += self._sample(self._batch, self.rows)
                if not self.rows:
                    self._batch = None
        return ended

    def _admitted(self, room: int, *, is_alone: bool) -> list[tuple[Batch, list[_Row]]]:
        """The waiting rows that there is room for, behind their prompts."""
        admitted: list[tuple[Batch, list[_Row]]] = []
        model, device = self._policy.model, self._policy.device
        while self._continued and room > 0:
            row, room = self._continued.popleft(), room - 1
            ids, kept = self._kept.pop(row.key)
            row.cached_tokens = len(ids)
            admitted.append((Batch.continued(model, row.request.prompt_token_ids, kept, device=device), [row]))
        groups: list[list[_Row]] = []
        while self._new:
            group = _first_group(self._new)
            if len(group) > room and (groups or admitted or self.rows or not is_alone):
                break
            groups.append([self._new.popleft() for _ in group])
            room -= len(group)
        if groups:
            prompts = [group[0].request.prompt_token_ids for group in groups]
            batch = Batch.prefilled(model, prompts, [len(group) for group in groups], device=device)
            admitted.append((batch, [row for group in groups for row in group]))
        return admitted

    def _join(self, batch: Batch, rows: list[_Row]) -> None:
        if rows and self._batch is None:
            self._batch, self.rows = batch, rows
        elif rows and self._batch is not None:
            self._batch.join(batch)
            self.rows += rows

    def _sample(self, batch: Batch, rows: list[_Row]) -> list[_Row]:
        """Sample a token of every row, and remove those that end with it from batch and `rows`; returns them."""
        tokens_B, logprobs_B = self._tokens(batch.logits_BV, rows)
        batch.append(tokens_B)
        for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            row.add(token, logprob, self._ends)
        running = [place for place, row in enumerate(rows) if row.finish_reason is None]
        if len(running) == len(rows):
            return []
        ended = [row for row in rows if row.finish_reason is not None]
        for place, row in enumerate(rows):
            if row.finish_reason == "stop" and row.request.may_continue:
                ids = (*row.request.prompt_token_ids, *row.token_ids[:-1])
                self._kept[row.key] = (ids, batch.keep(place, len(ids)))
        if running:
            batch.select(running)
        rows[:] = [rows[place] for place in running]
        return ended

    def _tokens(self, logits_BV: torch.Tensor, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each row and its log-probability, after temperature and the other options.

        Raises:
            EngineError: a row has NaN or plus infinity among its logits.
        """
        if logits_BV.amax(-1).isfinite().logical_not().any():
            raise EngineError(NOT_FINITE)
        if self._warp is None:
            logprobs_BV = logits_BV.log_softmax(-1)
            tokens_B = logits_BV.argmax(-1)
        else:
            no_ids = cast(torch.LongTensor, logits_BV.new_empty(0, dtype=torch.long))  # no warper looks at them
            warped_BV = self._warp(no_ids, cast(torch.FloatTensor, logits_BV))
            logprobs_BV = warped_BV.log_softmax(-1)
            uniforms_B = torch.stack([row.uniforms[len(row.token_ids)] for row in rows]).to(logits_BV.device)
            tokens_B = sample_inverse_cdf(logprobs_BV, uniforms_B)
        return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


class TorchRequests:
    """See the module's docstring.

    Args:
        max_num_seqs: rows that are sampled at the same time; more if a single prompt has more.
    """

    def __init__(
        self,
        policy: SampledPolicy,
        sampling: SamplingConfig,
        ends: Ends,
        *,
        max_num_seqs: int,
        policy_version: int,
        activity: Activity,
    ) -> None:
        self._activity = activity
        self._stack = ExitStack()
        self._ends = ends
        self._max_num_seqs = max_num_seqs
        self._policy_version = policy_version
        self._lanes = {use: _Lane(policy, sampling, ends, use_adapter=use) for use in (True, False)}

    def __enter__(self) -> Self:
        self._stack.enter_context(self._activity.sampling())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for lane in self._lanes.values():
            lane.clear()

    @property
    def has_unfinished(self) -> bool:
        """See `turns.Requests`."""
        return any(lane.has_unfinished for lane in self._lanes.values())

    def submit(self, key: int, request: Request) -> None:
        """See `turns.Requests`."""
        self._lanes[request.use_adapter].submit(key, request)

    def release(self, key: int) -> None:
        """See `turns.Requests`."""
        for lane in self._lanes.values():
            lane.release(key)

    def step(self) -> list[tuple[int, Turn]]:
        """See `turns.Requests`. Rows with the adapter and rows without are two batches, one after the other."""
        ended: list[_Row] = []
        for use_adapter, lane in self._lanes.items():
            if lane.has_unfinished:
                others = len(self._lanes[not use_adapter].rows)
                ended += lane.step(self._max_num_seqs - others - len(lane.rows), is_alone=not others)
        return [(row.key, self._turn(row)) for row in ended]

    def sampled(self, key: int) -> tuple[int, ...]:
        """See `turns.Requests`."""
        found = [row for lane in self._lanes.values() for row in lane.rows if row.key == key]
        return tuple(found[0].token_ids) if found else ()

    def _turn(self, row: _Row) -> Turn:
        assert row.finish_reason is not None
        return Turn(
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            text=self._ends.texts.decode(row.token_ids) if row.text is None else row.text,
            finish_reason=row.finish_reason,
            ended_by_token=row.ended_by_token,
            policy_version=self._policy_version,
            cached_tokens=row.cached_tokens,
        )


def _first_group(rows: Iterable[_Row]) -> list[_Row]:
    """The first rows, which share a prompt."""
    group: list[_Row] = []
    for row in rows:
        if group and (row.request.group, row.request.prompt_token_ids) != (
            group[0].request.group,
            group[0].request.prompt_token_ids,
        ):
            break
        group.append(row)
    return group


def sample_inverse_cdf(logprobs_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """A sample of each row: the token at which the cumulative distribution exceeds the row's number in [0, 1). In fp64."""
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    threshold_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]


def warpers(sampling: SamplingConfig) -> LogitsProcessorList:
    """Temperature and the other sampling options, in vLLM's order."""
    found = LogitsProcessorList()
    if sampling.temperature != 1.0:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.min_p > 0:
        found.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found
