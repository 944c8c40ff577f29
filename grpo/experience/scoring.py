"""The rewards of a group whose completions may be episodes.

    pending = submit(scorer, played_group, trainer_state)
    scores = pending.result()               # of all completions, in order

Functions never see a void episode: they are called with the other completions, and its rewards are None. What an environment
returned as a reward counts like a further function of weight 1, by its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...rewards.combining import Pending, Scores
from ...rewards.contract import Inputs
from ...rewards.runner import Scorer
from ...rollout.types import Completion
from ..data.groups import Group
from ..data.prompts import Prompt
from ..episodes.groups import PlayedGroup

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingGroup:
    """The scores of a group that are being computed.

    `calls`: those of the functions, for the completions at `places`; None: there is nothing to call. `weights`: by function.
    """

    completions: tuple[Completion, ...]
    places: Sequence[int]
    weights: Mapping[str, float]
    calls: Pending | None

    def is_finished(self) -> bool:
        """Whether `result` would not wait."""
        return self.calls is None or self.calls.is_finished()

    def result(self) -> Scores:
        """Wait for the scores. Raises what `Pending.result` raises."""
        count = len(self.completions)
        if self.calls is None:
            nothing: dict[str, list[float | None]] = {name: [None] * count for name in self.weights}
            scores = Scores(
                total=[None] * count, by_function=nothing, extras={}, metrics={}, weights=list(self.weights.values())
            )
        else:
            scores = _spread(self.calls.result(), self.places, count)
        return _with_environments(scores, self.completions)

    def cancel(self) -> None:
        """Give up on the result, and cancel all calls."""
        if self.calls is not None:
            self.calls.cancel()


def submit(
    scorer: Scorer, group: PlayedGroup, trainer_state: Mapping[str, Any]
) -> PendingGroup:
    """Start scoring a prompt's completions. Inline functions have finished when this returns.

    Raises:
        ValueError: a function requires an argument that does not exist.
    """
    places = [place for place, completion in enumerate(group.completions) if not completion.is_void]
    calls = None
    if places and scorer.names:
        calls = scorer.submit(inputs_of(group, places, trainer_state))
    return PendingGroup(
        completions=group.completions,
        places=places,
        weights=dict(zip(scorer.names, scorer.weights, strict=True)),
        calls=calls,
    )


def inputs_of(group: PlayedGroup, places: Sequence[int], trainer_state: Mapping[str, Any]) -> Inputs:
    """What reward functions get of a prompt's completions at these places."""
    count, prompt = len(places), group.prompt
    completions = [group.completions[place] for place in places]
    environments = [group.environments[place] for place in places]
    of_rollout = {name: [values[place] for place in places] for name, values in group.columns.items()}
    return Inputs(
        prompts=[group.contents[place] for place in places],
        completions=[content_of(prompt, completion) for completion in completions],
        completion_ids=[list(completion.token_ids) for completion in completions],
        columns={**{name: [value] * count for name, value in prompt.columns.items()}, **of_rollout},
        completion_prefixes=[prompt.completion_prefix] * count,
        sampled_lengths=[completion.num_tokens for completion in completions],
        trainer_state=trainer_state,
        environments=None if all(one is None for one in environments) else environments,
    )


def content_of(prompt: Prompt, completion: Completion) -> str | list[Mapping[str, Any]]:
    """A completion as reward functions get it: messages if the prompt is a conversation, else its text."""
    if isinstance(prompt.content, str):
        return completion.text
    if completion.episode is not None:
        return list(completion.episode.messages)
    return [{"role": "assistant", "content": completion.text}]


def with_same_functions(groups: Sequence[Group]) -> list[Group]:
    """The groups with the same names in the same order in all scores: environments may return rewards of different names.

    Rewards that a group does not have are None.
    """
    weights: dict[str, float] = {}
    for group in groups:
        weights |= dict(zip(group.scores.by_function, group.scores.weights, strict=True))
    if all(list(group.scores.by_function) == list(weights) for group in groups):
        return list(groups)
    return [dataclasses.replace(group, scores=_with_functions(group.scores, weights)) for group in groups]


def _with_functions(scores: Scores, weights: Mapping[str, float]) -> Scores:
    nothing: list[float | None] = [None] * len(scores.total)
    by_function = {name: scores.by_function.get(name, nothing) for name in weights}
    return dataclasses.replace(scores, by_function=by_function, weights=list(weights.values()))


def _spread(scores: Scores, places: Sequence[int], count: int) -> Scores:
    """The scores of the completions at these places as those of all `count`, None for the others."""
    if len(places) == count:
        return scores

    def spread(values: Sequence[T | None]) -> list[T | None]:
        of_all: list[T | None] = [None] * count
        for place, value in zip(places, values, strict=True):
            of_all[place] = value
        return of_all

    return dataclasses.replace(
        scores,
        total=spread(scores.total),
        by_function={name: spread(values) for name, values in scores.by_function.items()},
        extras={name: spread(values) for name, values in scores.extras.items()},
        errors={name: spread(values) for name, values in scores.errors.items()},
    )


def _with_environments(scores: Scores, completions: Sequence[Completion]) -> Scores:
    """The scores with the rewards of environments among them, as of functions with weight 1."""
    returned = [
        {} if completion.episode is None or completion.is_void else completion.episode.rewards for completion in completions
    ]
    names = list(dict.fromkeys(name for rewards in returned for name in rewards))
    if not names:
        return scores
    columns = {_free(name, scores.by_function): [rewards.get(name) for rewards in returned] for name in names}
    return dataclasses.replace(
        scores,
        total=[_sum(total, rewards.values()) for total, rewards in zip(scores.total, returned, strict=True)],
        by_function={**scores.by_function, **columns},
        weights=[*scores.weights, *[1.0] * len(columns)],
    )


def _free(name: str, functions: Mapping[str, object]) -> str:
    """The name, or one that no reward function has."""
    return f"environment/{name}" if name in functions else name


def _sum(total: float | None, rewards: Iterable[float | None]) -> float | None:
    terms = [reward for reward in (total, *rewards) if reward is not None]
    return sum(terms) if terms else None
