"""A user's function that samples the completions of a step itself: TRL's `rollout_func`.

    def rollout(prompts, trainer):
        # `prompts` has every prompt of the step, or of the evaluation, num_generations times in a row
        sampled = trainer.generate_rollout_completions(prompts)
        return {
            "prompt_ids": [one["prompt_ids"] for one in sampled],
            "completion_ids": [one["completion_ids"] for one in sampled],
            "logprobs": [one["logprobs"] for one in sampled],       # the sampler's, of each completion token
            "env_mask": ...,                                        # optional: 1 for sampled tokens, 0 for given ones
            "steps": ...,                                           # anything else goes to the reward functions as a column
        }
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ...rollout.config import SamplingConfig
from ...rollout.protocol import Engine
from ...rollout.types import Completion, Span
from ..data.prompts import Prompt
from .groups import PlayedGroup, behind_shared_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RolloutFunc = Callable[..., Mapping[str, Any]]
"""Called with the prompts and the trainer."""

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")


class UserRollouts:
    """See the module's docstring: `groups.Episodes`.

    Args:
        function: called with the prompts alone.
        max_length: most tokens of a prompt and its completion together.
    """

    def __init__(
        self,
        function: Callable[[list[Any]], Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None,
        max_length: int,
    ) -> None:
        self._function = function
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_length = max_length

    def play(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int] | None = None,
        use_adapter: bool = True,
    ) -> Generator[PlayedGroup]:
        """See `groups.Episodes`. The function draws its own seeds.

        Raises:
            ValueError: it returned something else than it should.
        """
        size = sampling.num_generations
        repeated = [copy.deepcopy(prompt.content) for prompt in prompts for _ in range(size)]
        rows = _Rows(self._function(repeated), len(repeated), self._vocab_size)
        for index, prompt in enumerate(prompts):
            places = range(index * size, (index + 1) * size)
            completions = [
                rows.completion(place, self._tokenizer, sampling, policy_version=engine.policy_version) for place in places
            ]
            ids = [rows.prompt(place) for place in places]
            self._check(places, ids, completions)
            of_group, moved = behind_shared_prompt(prompt, ids, completions)
            yield PlayedGroup(
                index=index,
                prompt=of_group,
                completions=moved,
                contents=[prompt.content] * size,
                environments=[None] * size,
                columns={name: [values[place] for place in places] for name, values in rows.columns.items()},
            )

    def _check(self, places: Sequence[int], prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion]) -> None:
        """Raise ValueError if a row of a prompt is too long, or shares not even its first token with the others."""
        for place, ids, completion in zip(places, prompts, completions, strict=True):
            length = len(ids) + len(completion.token_ids)
            if length > self._max_length:
                raise ValueError(
                    f"rollout_func: row {place} has {length} tokens with its prompt, more than rollout.max_prompt_length and "
                    f"rollout.max_completion_length allow together ({self._max_length}): shorten it, or increase them"
                )
            if ids[0] != prompts[0][0]:
                raise ValueError(
                    f"rollout_func: prompt_ids of row {place} and row {places[0]} are of one prompt, and begin with different "
                    "tokens: begin all of them alike, such as with the token that begins every sequence"
                )

    @property
    def shows_environments(self) -> bool:
        """See `groups.Episodes`."""
        return False

    @property
    def adds_columns(self) -> bool:
        """See `groups.Episodes`."""
        return True

    def close(self) -> None:
        """There is nothing to close."""


def of_trainer(function: RolloutFunc, trainer: object) -> Callable[[list[Any]], Mapping[str, Any]]:
    """The function with the trainer as its second argument, which this does not keep in memory."""
    reference = weakref.ref(trainer)
    return lambda prompts: function(prompts, reference())


class _Rows:
    """What the function returned, checked."""

    def __init__(self, returned: object, count: int, vocab_size: int | None) -> None:
        if not isinstance(returned, Mapping):
            raise ValueError(f"rollout_func must return a mapping with {', '.join(REQUIRED)} (got {type(returned).__name__})")
        missing = [name for name in REQUIRED if returned.get(name) is None]
        if missing:
            raise ValueError(f"rollout_func must return {', '.join(missing)}: lists with one entry for each prompt it got")
        values = {str(name): value for name, value in returned.items() if value is not None}
        for name, value in values.items():
            if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or len(value) != count:
                length = f"{len(value)} rows" if hasattr(value, "__len__") else f"a {type(value).__name__}"
                raise ValueError(
                    f"rollout_func got {count} prompts (each one num_generations times) and must return as many rows of "
                    f"{name!r}: it returned {length}"
                )
        self._vocab_size = vocab_size
        self._values = values
        self.columns = {name: value for name, value in values.items() if name not in (*REQUIRED, "env_mask")}

    def prompt(self, row: int) -> tuple[int, ...]:
        """The token ids of a row's prompt."""
        ids = self._ids("prompt_ids", row)
        if not ids:
            raise ValueError(f"rollout_func: prompt_ids of row {row} is empty: it needs at least one token")
        return ids

    def completion(
        self, row: int, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig, *, policy_version: int
    ) -> Completion:
        """A row as a completion: it ended by its last token, or else it was cut off."""
        ids = self._ids("completion_ids", row)
        given, sampled = self._mask(row, len(ids))
        logprobs = [_number(one) for one in self._values["logprobs"][row]]
        if len(logprobs) not in (len(ids), len(sampled)):
            raise ValueError(
                f"rollout_func: logprobs of row {row} has {len(logprobs)} values for {len(ids)} completion tokens"
            )
        if len(logprobs) == len(ids):
            logprobs = [logprobs[place] for place in sampled]
        if any(not lp <= 1e-3 for lp in logprobs):  # also NaN
            raise ValueError(f"rollout_func: logprobs of row {row} has values above 0 or NaN: give natural logarithms")
        is_ended = bool(ids) and len(ids) < sampling.max_completion_length
        return Completion(
            token_ids=ids,
            logprobs=tuple(logprobs),
            text=str(tokenizer.decode(list(ids), skip_special_tokens=sampling.skip_special_tokens)),
            finish_reason="stop" if is_ended or (ids and ids[-1] == tokenizer.eos_token_id) else "length",
            policy_version=policy_version,
            given=tuple(given),
        )

    def _ids(self, name: str, row: int) -> tuple[int, ...]:
        ids = tuple(int(one) for one in self._values[name][row])
        if any(one < 0 or (self._vocab_size is not None and one >= self._vocab_size) for one in ids):
            raise ValueError(f"rollout_func: {name} of row {row} has a token that the model does not know")
        return ids

    def _mask(self, row: int, length: int) -> tuple[list[Span], list[int]]:
        """The given ranges of a row, and the places of its sampled tokens."""
        mask = self._values["env_mask"][row] if "env_mask" in self._values else [1] * length
        kept = [bool(one) for one in mask]
        if len(kept) != length:
            raise ValueError(f"rollout_func: env_mask of row {row} has {len(kept)} values for {length} completion tokens")
        given: list[Span] = []
        for place, is_sampled in enumerate(kept):
            if is_sampled:
                continue
            if given and given[-1][1] == place:
                given[-1] = (given[-1][0], place + 1)
            else:
                given.append((place, place + 1))
        return given, [place for place, is_sampled in enumerate(kept) if is_sampled]


def _number(value: Any) -> float:
    """A log-probability, also in a list of its own, as in what TRL's vLLM server returns."""
    is_list = isinstance(value, list | tuple) and len(value) == 1
    return float(cast(float, value[0] if is_list else value))
