"""An engine in plain torch: it samples with the trained model's own forward and a cache of keys and values.

    engine = TorchEngine(policy, "path/to/model", max_num_seqs=128, max_model_length=768)
    engine.publish(policy.write_slots)
    for group in engine.rollout(prompts, config.rollout, seeds=seeds):
        print(group.completions[0].text)

It starts in milliseconds, needs no vLLM, and runs the models of transformers whose layers mix tokens by attention only; sampler
and trainer are one function. It is slower than vLLM (docs/performance.md). At most `max_num_seqs` completions are sampled at a
time; when there is room for a group, it joins them (`torch_requests.py`). Each prompt is computed once, padded on the left; its
KV cache is repeated for the group, and the rows of finished completions are dropped.

Tokens are drawn by inverse-CDF sampling. Every completion has uniform random numbers of its own, from the seed of its request
and its place in the group. So its tokens do not depend on the rest of the batch, up to rounding.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence

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

from .activity import Activity, KeptCache
from .config import SamplingConfig
from .limits import check_engine_limits
from .texts import Texts
from .torch_requests import Ends, SampledPolicy, TorchRequests
from .turns import Request, Turn
from .types import Completion, PromptGroup

ROWS_OF_LOGPROBS = 8
"""Sequences whose log-probabilities are computed at a time."""


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
        self._activity = Activity(KeptCache())  # its keys and values are gone when a rollout ends

    @property
    def is_suspended(self) -> bool:
        """See `protocol.Engine`."""
        return self._activity.is_suspended

    def suspend(self) -> None:
        """See `protocol.Engine`. Nothing is kept between two rollouts, so there is nothing to release."""
        self._activity.suspend()

    def resume(self) -> None:
        """See `protocol.Engine`."""
        self._activity.resume()

    def publish(self, write_slots: Callable[[], None]) -> int:
        """Write the slots; returns the new policy version."""
        self._activity.require_idle("publish another policy")
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
        """Sample all prompts, at most `max_num_seqs` completions at a time; yield each group when it is finished."""
        assert seeds is None or len(seeds) == len(prompts)
        size = sampling.num_generations
        with self.requests(sampling) as requests:
            for index, prompt in enumerate(prompts):
                longest = min(sampling.max_completion_length, self._max_model_length - len(prompt))
                for place in range(size):
                    seed = None if seeds is None else seeds[index] + place
                    request = Request(
                        prompt_token_ids=tuple(prompt), max_tokens=longest, seed=seed, group=index, use_adapter=use_adapter
                    )
                    requests.submit(index * size + place, request)
            finished: dict[int, dict[int, Turn]] = {}
            while requests.has_unfinished:
                for key, turn in requests.step():
                    index, place = divmod(key, size)
                    finished.setdefault(index, {})[place] = turn
                complete = sorted(index for index, turns in finished.items() if len(turns) == size)
                for index in complete:
                    turns = finished.pop(index)
                    completions = tuple(_completion(turns[place]) for place in range(size))
                    yield PromptGroup(index=index, prompt_token_ids=tuple(prompts[index]), completions=completions)

    def requests(self, sampling: SamplingConfig, *, stop_token_ids: Collection[int] = ()) -> TorchRequests:
        """Requests of episodes. Keys and values of an episode are kept until its next turn.

        Raises:
            ValueError: this engine cannot sample like this.
        """
        check_engine_limits(sampling, "torch")
        texts = Texts(self._tokenizer, sampling)
        eos = frozenset() if sampling.generation_kwargs.ignore_eos else self._eos_token_ids
        return TorchRequests(
            self._policy,
            sampling,
            Ends(texts=texts, tokens=frozenset({*eos, *texts.stop_token_ids, *stop_token_ids})),
            max_num_seqs=self._max_num_seqs,
            policy_version=self.policy_version,
            activity=self._activity,
        )

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]], *, use_adapter: bool = True) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1."""
        self.resume()
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


def _completion(turn: Turn) -> Completion:
    return Completion(
        token_ids=turn.token_ids,
        logprobs=turn.logprobs,
        text=turn.text,
        finish_reason=turn.finish_reason,
        policy_version=turn.policy_version,
    )


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


def eos_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation configuration, as in vLLM."""
    try:
        generation = GenerationConfig.from_pretrained(model_path)
    except OSError:  # the model has no such file
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model_path))
    of_model = generation.eos_token_id
    listed = of_model if isinstance(of_model, list) else [of_model]
    return frozenset(id for id in (tokenizer.eos_token_id, *listed) if isinstance(id, int))
