"""A prompt's completions and what becomes of them in a step: scores, then advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...rewards.combining import Scores
from ...rollout.types import Completion
from .prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt and its G completions.

    Attributes:
        scores: rewards of the completions; empty before they are scored.
        advantages: one for each completion; empty before they are computed.
        reward_std: standard deviation of the rewards, after overlong penalties.
        has_variance: whether the rewards differ; with a user's advantage function, whether any advantage is not 0. Without
            variance, there is nothing to learn from the group.
        passes_filter: False if `algorithm.group_filter` rejects the group: it is not trained on.
        is_local: whether this worker sampled it. Remote groups hold only metadata: rewards and lengths without tokens.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: Scores = field(default_factory=lambda: Scores(total=[], by_function={}, extras={}, metrics={}, weights=[]))
    advantages: tuple[float, ...] = ()
    reward_std: float = 0.0
    has_variance: bool = False
    passes_filter: bool = True
    is_local: bool = True

    def select(self, places: Sequence[int]) -> Group:
        """The group with some of its completions only, their advantages and scores."""
        return dataclasses.replace(
            self,
            completions=tuple(self.completions[place] for place in places),
            advantages=tuple(self.advantages[place] for place in places) if self.advantages else (),
            scores=self.scores.select(places) if self.scores.total else self.scores,
        )

    def without_void(self) -> Group:
        """The group without its void episodes."""
        places = [place for place, completion in enumerate(self.completions) if not completion.is_void]
        return self if len(places) == len(self.completions) else self.select(places)

    def without_experts(self) -> Group:
        """The group without the experts that the engine chose, which nothing needs once its gradients are computed."""
        if all(completion.routed_experts is None for completion in self.completions):
            return self
        completions = tuple(dataclasses.replace(completion, routed_experts=None) for completion in self.completions)
        return dataclasses.replace(self, completions=completions)
