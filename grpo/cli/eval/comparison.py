"""Two evaluations prompt by prompt.

    comparison = compare(read_evaluation(a), read_evaluation(b))
    comparison.all["reward"].difference         # Estimate(mean=0.043, low=0.01, high=0.08), of b - a
    comparison.won, comparison.lost, comparison.equal

Prompts are paired by their set and the hash of their content. The same prompt is hard or easy for both, so the difference is
known far better than either mean.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...algorithm.estimates import Estimate, difference_interval, majority_at_k, pass_at_k
from ...run.evaluation_files import EvaluationRecord, PromptResult

Key = tuple[str | None, str, int]
"""Set, hash, and which of the prompts with both it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The results of one prompt in both evaluations."""

    first: PromptResult
    second: PromptResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The means of both over the paired prompts that have a value in both, and the difference, second less first."""

    prompts: int
    first: float
    second: float
    difference: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """See the module's docstring.

    Attributes:
        only_first, only_second: number of prompts without a partner.
        without_reward: number of pairs in which one of the two has no reward.
        settings: those that differ, by their names, with both values.
        all: by the name of an estimate. sets: of each set that has pairs.
        won, lost, equal: pairs by the mean reward of their completions; won by the second.
    """

    only_first: int
    only_second: int
    without_reward: int
    settings: dict[str, tuple[Any, Any]]
    all: dict[str, Difference]
    sets: dict[str, dict[str, Difference]]
    won: list[Pair]
    lost: list[Pair]
    equal: list[Pair]


def compare(first: EvaluationRecord, second: EvaluationRecord) -> Comparison:
    """Compare two evaluations. What differs between their settings does not matter here: it is listed."""
    of_first, of_second = dict(_keys(first.prompts)), dict(_keys(second.prompts))
    pairs = [Pair(first=one, second=of_second[key]) for key, one in of_first.items() if key in of_second]
    names = [name for name in first.all.estimates if name in second.all.estimates]
    rewards = (first.settings["pass_reward"], second.settings["pass_reward"])
    scored = [(pair, *both) for pair in pairs if (both := _values("reward", pair, rewards)) is not None]
    sets = dict.fromkeys(pair.first.eval_set for pair in pairs if pair.first.eval_set is not None)
    return Comparison(
        only_first=len(of_first) - len(pairs),
        only_second=len(of_second) - len(pairs),
        without_reward=len(pairs) - len(scored),
        settings=dict(_different(first.settings, second.settings)),
        all=_differences(names, pairs, rewards),
        sets={name: _differences(names, [p for p in pairs if p.first.eval_set == name], rewards) for name in sets},
        won=[pair for pair, a, b in scored if b > a],
        lost=[pair for pair, a, b in scored if b < a],
        equal=[pair for pair, a, b in scored if a == b],
    )


def answers_of(result: PromptResult) -> str:
    """The answers that were found in the completions of a prompt, the most frequent one first, else the text of the first
    completion. A number says how often."""
    if result.answers is None:
        return result.texts[0] if result.texts else ""
    texts = ["(no answer)" if answer is None else _text(answer) for answer in result.answers]
    counts = Counter(texts).most_common()
    return ", ".join(text if len(texts) == 1 else f"{text} ×{count}" for text, count in counts)


def _keys(prompts: Sequence[PromptResult]) -> Iterator[tuple[Key, PromptResult]]:
    seen: Counter[tuple[str | None, str]] = Counter()
    for one in prompts:
        identity = (one.eval_set, one.hash)
        yield (*identity, seen[identity]), one
        seen[identity] += 1


def _differences(names: Sequence[str], pairs: Sequence[Pair], pass_rewards: tuple[float, float]) -> dict[str, Difference]:
    found = {}
    for name in names:
        both = [values for pair in pairs if (values := _values(name, pair, pass_rewards)) is not None]
        if not both:
            continue
        first, second = [a for a, _ in both], [b for _, b in both]
        interval = difference_interval(first, second)
        mean = statistics.fmean(b - a for a, b in both)
        found[name] = Difference(
            prompts=len(both),
            first=statistics.fmean(first),
            second=statistics.fmean(second),
            difference=Estimate(mean=mean, low=min(interval.low, mean), high=max(interval.high, mean)),
        )
    return found


def _values(name: str, pair: Pair, pass_rewards: tuple[float, float]) -> tuple[float, float] | None:
    """What a prompt adds to an estimate in both; None if one has no value."""
    first, second = (_value(name, one, limit) for one, limit in zip((pair.first, pair.second), pass_rewards, strict=True))
    return None if first is None or second is None else (first, second)


def _value(name: str, result: PromptResult, pass_reward: float) -> float | None:
    known = [reward for reward in result.rewards if reward is not None]
    if not known:
        return None
    if name == "reward":
        return statistics.fmean(known)
    kind, _, number = name.partition("@")
    if kind == "pass":
        passed = sum(reward >= pass_reward for reward in known)
        return pass_at_k(len(known), passed, int(number)) if len(known) >= int(number) else None
    if result.answers is None:
        return None
    passes = [reward is not None and reward >= pass_reward for reward in result.rewards]
    answers = [None if answer is None else _text(answer) for answer in result.answers]
    return majority_at_k(answers, passes, len(passes))


def _different(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The settings with other values, by their dotted names."""
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _different(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}", (a, b)


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
