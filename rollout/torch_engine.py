"""An engine in plain torch: it samples with the trained model's own forward and a cache of keys and values.

    engine = TorchEngine(policy, "path/to/model", max_num_seqs=128, max_model_length=768)
    engine.publish(policy.write_slots)
    for group in engine.rollout(prompts, config.rollout, seeds=seeds):
        print(group.completions[0].text)

It starts in milliseconds, needs no vLLM, and runs the models of transformers whose layers mix tokens by attention only; sampler
and trainer are one function. It is slower than vLLM (docs/performance.md). Prompts are sampled in waves of at most
`max_num_seqs` completions. Each prompt of a wave is computed once, padded on the left; its KV cache is repeated for the group,
and the rows of finished completions are dropped.

Tokens are drawn by inverse-CDF sampling. Every completion has uniform random numbers of its own, from the seed of its request
and its place in the group. So its tokens do not depend on the rest of the batch, up to rounding.

Legend: B rows (completions that are being sampled), T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .config import SamplingConfig
from .limits import check_engine_limits
from .slots import AdapterSlot
from .texts import Texts
from .types import Completion, PromptGroup

ROWS_OF_LOGPROBS = 8
"""Sequences whose log-probabilities are computed at a time."""


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


class TorchEngine:
    """See the module's docstring. The public methods are those of `protocol.Engine`.

    Args:
        tokenizer: folder or Hub id of the tokenizer; None: the model's own.
        max_num_seqs: completions that are sampled concurrently, at least one group.
        max_model_length: tokens of prompt and completion at most.

    Raises:
        ValueError: the model has layers other than attention that keep a state.
    """

    def __init__(
        self,
        policy: SampledPolicy,
        model_path: str,
        *,
        tokenizer: str | None = None,
        max_num_seqs: int,
        max_model_length: int,
    ) -> None:
        check_cache(policy.model)
        self.device = policy.device
        self.slots = policy.slots
        self.policy_version = 0
        self._policy = policy
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer or model_path)
        self._max_num_seqs = max_num_seqs
        self._max_model_length = max_model_length
        self._eos_token_ids = eos_token_ids(model_path, self._tokenizer)

    def publish(self, write_slots: Callable[[], None]) -> int:
        """Write the slots; returns the new policy version."""
        write_slots()
        self.policy_version += 1
        return self.policy_version

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int] | None = None,
        use_adapter: bool = True,
    ) -> Iterator[PromptGroup]:
        """Sample all prompts in waves of at most `max_num_seqs` completions; yield each group when it is finished."""
        check_engine_limits(sampling, "torch")
        assert seeds is None or len(seeds) == len(prompts)
        texts, indices = Texts(self._tokenizer, sampling), list(range(len(prompts)))
        eos = set() if sampling.generation_kwargs.ignore_eos else self._eos_token_ids
        end_tokens = {*texts.stop_token_ids, *eos}
        prompts_per_wave = max(1, self._max_num_seqs // sampling.num_generations)
        for first in range(0, len(prompts), prompts_per_wave):
            of_wave = indices[first : first + prompts_per_wave]
            rows = [row for index in of_wave for row in self._rows(index, prompts[index], sampling, seeds)]
            wave = _Wave(self._policy, [prompts[index] for index in of_wave], rows, sampling)
            unfinished = list(of_wave)
            while unfinished:
                finished: list[int] = []
                with self._policy.sampling(use_adapter=use_adapter):  # left while the caller has a group, and it may train
                    while not finished:
                        wave.step()
                        _end_rows(wave.rows, texts, end_tokens)
                        wave.drop_finished()
                        finished = [i for i in unfinished if all(row.finish_reason for row in rows if row.index == i)]
                unfinished = [i for i in unfinished if i not in finished]
                for index in finished:
                    completions = tuple(self._completion(row, texts) for row in rows if row.index == index)
                    yield PromptGroup(index=index, prompt_token_ids=tuple(prompts[index]), completions=completions)

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]], *, use_adapter: bool = True) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1."""
        results: list[list[float]] = []
        for first in range(0, len(sequences), ROWS_OF_LOGPROBS):
            some = sequences[first : first + ROWS_OF_LOGPROBS]
            ids_BT = pad_sequence([torch.tensor(ids, device=self.device) for ids in some], batch_first=True)
            lengths_B = torch.tensor([len(ids) for ids in some], device=self.device)
            attends_BT = torch.arange(ids_BT.shape[1], device=self.device) < lengths_B[:, None]
            with self._policy.sampling(use_adapter=use_adapter):
                logits_BTV = self._policy.model(input_ids=ids_BT, attention_mask=attends_BT.long(), use_cache=False).logits
            logprobs_BTV = logits_BTV[:, :-1].float().log_softmax(-1)
            of_tokens_BT = logprobs_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
            results += [row[: len(ids) - 1].tolist() for row, ids in zip(of_tokens_BT, some, strict=True)]
        return results

    def close(self) -> None:
        """Let go of model and slots, which are the policy's."""
        self.slots = {}
        del self._policy

    def _rows(self, index: int, prompt: Sequence[int], sampling: SamplingConfig, seeds: Sequence[int] | None) -> list[_Row]:
        """The completions of a prompt, before their first token."""
        longest = min(sampling.max_completion_length, self._max_model_length - len(prompt))
        rows = []
        for place in range(sampling.num_generations):
            row = _Row(index, longest)
            if sampling.temperature > 0:
                generator = None if seeds is None else torch.Generator().manual_seed(seeds[index] + place)
                row.uniforms = torch.rand(longest, generator=generator, dtype=torch.float64)
            rows.append(row)
        return rows

    def _completion(self, row: _Row, texts: Texts) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            text=texts.decode(row.token_ids) if row.text is None else row.text,
            finish_reason=row.finish_reason,
            policy_version=self.policy_version,
        )


def _end_rows(rows: Sequence[_Row], texts: Texts, end_tokens: set[int]) -> None:
    """Mark rows that end with their newest token, and set their text if it is not that of all tokens."""
    for row in rows:
        if row.token_ids[-1] in end_tokens:
            row.finish_reason, row.text = "stop", texts.ended_by_token(row.token_ids)
            continue
        if len(row.token_ids) == row.longest:
            row.finish_reason = "length"
        if texts.stop_strings and (text := texts.first_stop(row.token_ids)) is not None:
            row.finish_reason, row.text = "stop", text


@dataclass(eq=False, slots=True)
class _Row:
    """A completion that is being sampled: the prompt's index, the most tokens it may get, and those it has."""

    index: int
    longest: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    text: str | None = None
    """Set if a token or a stop string ended it."""
    uniforms: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """A random number in [0, 1) for each token it may get; empty if it is greedy."""


class _Wave:
    """One batch of completions.

    Attributes:
        rows: those that are not finished; row i of the KV cache belongs to `rows[i]`.
    """

    def __init__(
        self, policy: SampledPolicy, prompts: Sequence[Sequence[int]], rows: list[_Row], sampling: SamplingConfig
    ) -> None:
        self.rows = rows
        self._model = policy.model
        self._device = policy.device
        self._sampling = sampling
        self._warp = None if sampling.temperature == 0 else warpers(sampling)
        self._cache = DynamicCache(config=policy.model.config)
        ids = [torch.tensor(prompt, device=self._device) for prompt in prompts]
        self._input_BT = pad_sequence(ids, batch_first=True, padding_side="left")
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        width = self._input_BT.shape[1]
        self._attends_BT = (torch.arange(width, device=self._device) >= width - lengths_B[:, None]).long()

    def step(self) -> None:
        """Sample one more token of every row."""
        positions_BT = (self._attends_BT.cumsum(-1) - 1).clamp(min=0)[:, -self._input_BT.shape[1] :]
        logits_BV = self._model(
            input_ids=self._input_BT,
            attention_mask=self._attends_BT,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()
        if len(logits_BV) != len(self.rows):  # the prompts, once each
            logits_BV = self._repeat(logits_BV)
        tokens_B, logprobs_B = self._sample(logits_BV)
        for row, token, logprob in zip(self.rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
        self._input_BT = tokens_B[:, None]
        self._attends_BT = torch.cat([self._attends_BT, torch.ones_like(tokens_B)[:, None]], dim=1)

    def drop_finished(self) -> None:
        """Keep only unfinished rows."""
        kept = [place for place, row in enumerate(self.rows) if row.finish_reason is None]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in kept]
        if kept:
            places = torch.tensor(kept, device=self._device)
            self._cache.batch_select_indices(places)
            self._input_BT, self._attends_BT = self._input_BT[places], self._attends_BT[places]

    def _repeat(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """From one row for each prompt to one for each completion."""
        times = self._sampling.num_generations
        self._cache.batch_repeat_interleave(times)
        self._attends_BT = self._attends_BT.repeat_interleave(times, dim=0)
        return logits_BV.repeat_interleave(times, dim=0)

    def _sample(self, logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each row and its log-probability, after temperature and the other options."""
        if self._warp is None:
            logprobs_BV = logits_BV.log_softmax(-1)
            tokens_B = logits_BV.argmax(-1)
        else:
            warped_BV = self._warp(cast(torch.LongTensor, self._input_BT), cast(torch.FloatTensor, logits_BV))
            logprobs_BV = warped_BV.log_softmax(-1)
            uniforms_B = torch.stack([row.uniforms[len(row.token_ids)] for row in self.rows]).to(self._device)
            tokens_B = sample_inverse_cdf(logprobs_BV, uniforms_B)
        return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def sample_inverse_cdf(logprobs_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """A sample of each row: the token at which the cumulative distribution exceeds the row's number in [0, 1). In fp64."""
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    threshold_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]


def check_cache(model: PreTrainedModel) -> None:
    """Whether the model keeps nothing between tokens but keys and values.

    Raises:
        ValueError: it has other layers, such as Mamba's.
    """
    others = {type(layer) for layer in DynamicCache(config=model.config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if others or "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"rollout.engine=torch runs models with attention layers only, and {type(model).__name__} has others: use vLLM "
            "(rollout.engine=vllm)"
        )


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


def eos_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation configuration, as in vLLM."""
    try:
        generation = GenerationConfig.from_pretrained(model_path)
    except OSError:  # the model has no such file
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model_path))
    of_model = generation.eos_token_id
    listed = of_model if isinstance(of_model, list) else [of_model]
    return frozenset(id for id in (tokenizer.eos_token_id, *listed) if isinstance(id, int))
