"""Rewards of groups with episodes: what functions get, void episodes, and the rewards of environments."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from made_episodes import DIALOGUE, VOID, completion_of, group_of, played, prompt_of

from rankup.grpo.common.world import SINGLE_PROCESS
from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.groups import Group
from rankup.grpo.data.prompts import Prompt
from rankup.grpo.episodes.groups import PlayedGroup
from rankup.grpo.experience.batch import with_advantages
from rankup.grpo.experience.collect import collect
from rankup.grpo.experience.scoring import submit, with_same_functions
from rankup.rewards.combining import Scores
from rankup.rewards.config import RewardsConfig
from rankup.rewards.runner import Scorer
from rankup.rollout.types import Completion, Episode, PromptGroup


def sampled(prompt: Prompt, completions: Sequence[Completion], environments: Sequence[object] | None = None) -> PlayedGroup:
    return PlayedGroup(
        index=0,
        prompt=prompt,
        completions=tuple(completions),
        contents=[prompt.content] * len(completions),
        environments=environments or [None] * len(completions),
    )


def scored(
    scorer: Scorer,
    *episodes: Episode | None,
    prompt: Prompt | None = None,
    environments: Sequence[object] | None = None,
) -> Scores:
    completions = [completion_of(episode) for episode in episodes]
    return submit(scorer, sampled(prompt or prompt_of(), completions, environments), {"global_step": 0}).result()


class Sees:
    """A reward function that keeps what it got: 1, 2, 3 ... are its rewards."""

    __name__ = "sees"

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, completions: Sequence[Any], **kwargs: Any) -> list[float]:
        self.calls.append({"completions": completions, **kwargs})
        return [float(i + 1) for i in range(len(completions))]


@pytest.fixture
def sees() -> Sees:
    return Sees()


@pytest.fixture
def scorer(sees: Sees) -> Scorer:
    return Scorer(RewardsConfig(), sees)


def test_an_episode_of_a_conversation_is_its_messages_with_all_ids_behind_the_prompt(scorer: Scorer, sees: Sees) -> None:
    scored(scorer, played(), None)
    (got,) = sees.calls
    assert got["completions"] == [list(DIALOGUE), [{"role": "assistant", "content": "It is 1036."}]]
    assert got["completion_ids"] == [list(range(10, 16))] * 2
    assert got["prompts"] == [prompt_of().content] * 2


def test_an_episode_of_a_plain_prompt_is_its_text(scorer: Scorer, sees: Sees) -> None:
    scored(scorer, played(), prompt=Prompt(content="741 + 295 =", token_ids=(5,)))
    assert sees.calls[0]["completions"] == ["It is 1036."]


def test_functions_may_change_messages_that_are_read_again_later(sees: Sees) -> None:
    def changes(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        for completion in completions:
            completion[0]["tool_calls"].clear()
            completion.pop()
        return [0.0] * len(completions)

    scored(Scorer(RewardsConfig(), [changes, sees]), played())
    assert sees.calls[0]["completions"] == [list(DIALOGUE)]


def test_check_12_functions_do_not_see_a_void_episode_and_its_rewards_are_none(scorer: Scorer, sees: Sees) -> None:
    def logs(completions: Sequence[Any], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float | None]:
        log_extra("place", list(range(len(completions))))
        log_metric("count", len(completions))
        return [None, 10.0]

    scorer = Scorer(RewardsConfig(weights=[1.0, 0.5]), [sees, logs])
    scores = scored(scorer, VOID, played(), VOID, played(), prompt=prompt_of(answer=1036))
    assert scores.by_function == {"sees": [None, 1.0, None, 2.0], "logs": [None, None, None, 10.0]}
    assert scores.total == [None, 1.0, None, 7.0]
    assert scores.extras == {"place": [None, 0, None, 1]} and scores.metrics == {"count": 2.0}
    assert sees.calls[0]["answer"] == [1036, 1036], "columns have as many values as there are completions"


def test_a_failure_of_a_function_is_that_of_the_episodes_that_it_saw() -> None:
    def fails(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        raise KeyError("gold")

    scores = scored(Scorer(RewardsConfig(on_error="none"), fails), played(), VOID)
    assert scores.errors == {"fails": ["KeyError: 'gold'", None]} and scores.total == [None, None]


@pytest.mark.parametrize("has_functions", [True, False])
def test_check_12_a_group_of_void_episodes_calls_no_function(sees: Sees, has_functions: bool) -> None:
    scorer = Scorer(RewardsConfig(), [sees] if has_functions else [], needs_functions=False)
    pending = submit(scorer, sampled(prompt_of(), [completion_of(VOID), completion_of(VOID)]), {})
    assert pending.is_finished()
    scores = pending.result()
    assert scores.total == [None, None] and not sees.calls
    assert scores.by_function == ({"sees": [None, None]} if has_functions else {})


def test_rewards_of_an_environment_count_like_further_functions_of_weight_1(sees: Sees) -> None:
    scores = scored(
        Scorer(RewardsConfig(weights=[0.5]), sees),
        played(rewards={"Guess": 1.0, "speed": 0.25}),
        played(rewards={"Guess": None}),
        played(),
        dataclasses.replace(VOID, rewards={"Guess": 9.0}),
    )
    assert scores.by_function == {
        "sees": [1.0, 2.0, 3.0, None],
        "Guess": [1.0, None, None, None],
        "speed": [0.25, None, None, None],
    }
    assert scores.weights == [0.5, 1.0, 1.0]
    assert scores.total == [0.5 + 1.25, 1.0, 1.5, None]


def test_rewards_of_an_environment_need_no_function_and_none_is_not_zero() -> None:
    scorer = Scorer(RewardsConfig(), [], needs_functions=False)
    scores = scored(scorer, played(rewards={"Guess": 1.0}), played(rewards={"Guess": None}), played(rewards={"Guess": 0.0}))
    assert scores.total == [1.0, None, 0.0], "check 13"
    assert (scores.by_function, scores.weights) == ({"Guess": [1.0, None, 0.0]}, [1.0])
    with pytest.raises(ValueError, match="no reward functions: specify at least one"):
        Scorer(RewardsConfig(), [])


def test_a_reward_of_an_environment_with_the_name_of_a_function_gets_another(scorer: Scorer) -> None:
    assert list(scored(scorer, played(rewards={"sees": 7.0})).by_function) == ["sees", "environment/sees"]


def test_groups_of_several_environments_get_the_same_functions(scorer: Scorer) -> None:
    groups = [
        group_of(completion_of(episode), scores=scored(scorer, episode))
        for episode in (played(rewards={"Guess": 1.0}), VOID, played(rewards={"Sum": 2.0}))
    ]
    same = with_same_functions(groups)
    assert [list(group.scores.by_function) for group in same] == [["sees", "Guess", "Sum"]] * 3
    assert [group.scores.weights for group in same] == [[1.0, 1.0, 1.0]] * 3
    assert same[1].scores.by_function == {"sees": [None], "Guess": [None], "Sum": [None]}
    assert [group.scores.total for group in same] == [[2.0], [None], [3.0]]
    assert with_same_functions(same) == same


# Environments in functions


def test_inline_functions_get_the_instances_of_their_completions() -> None:
    first, second, third = object(), object(), object()

    def by_name(environments: Sequence[object], **kwargs: Any) -> list[float]:
        assert environments == [first, third], "the instances themselves, and no void one"
        return [1.0] * len(environments)

    def by_keywords(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [float("environments" in kwargs)] * len(completions)

    for rows_per_call, options in ((None, {}), (1, {})):
        functions = [by_keywords] if rows_per_call else [by_name, by_keywords]
        scorer = Scorer(RewardsConfig(rows_per_call=rows_per_call, **options), functions)
        scores = scored(scorer, played(), VOID, played(), environments=[first, second, third])
        assert set(map(tuple, scores.by_function.values())) == {(1.0, None, 1.0)}


def test_functions_elsewhere_do_not_get_the_instances() -> None:
    async def waits(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [float("environments" in kwargs)] * len(completions)

    def in_process(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [float("environments" in kwargs)] * len(completions)

    scorer = Scorer(RewardsConfig(isolation="process", num_workers=1), [waits, in_process])
    try:
        scores = scored(scorer, played(), environments=[(line for line in ())])  # a generator cannot be pickled
    finally:
        scorer.close()
    assert scores.by_function == {"waits": [0.0], "in_process": [0.0]}


def test_a_function_elsewhere_that_names_environments_is_refused_at_the_start() -> None:
    def wins(environments: Sequence[Any], **kwargs: Any) -> list[float]:
        return [0.0] * len(environments)

    async def waits(environments: Sequence[Any], **kwargs: Any) -> list[float]:
        return [0.0] * len(environments)

    with pytest.raises(ValueError, match=r"reward function 'wins' requires `environments`.*`isolation: inline`"):
        Scorer(RewardsConfig(isolation="process"), wins)
    with pytest.raises(ValueError, match=r"reward function 'waits' requires `environments`.* nor wait for an async function"):
        Scorer(RewardsConfig(), waits)
    scorer = Scorer(RewardsConfig(), wins)
    scorer.check_columns(["answer"], has_environments=True)
    with pytest.raises(ValueError, match=r"'wins' requires `environments`: only a run with rollout.environment has them"):
        scorer.check_columns(["answer"])


# Advantages

REWARDS = [[0.3, 1.0, 0.0, 0.5], [1.0, 1.0, 0.25, 0.0], [0.5, 0.5, 0.5, 0.5]]
OPTIONS = [
    *(
        {"advantage_estimator": estimator, "scale_rewards": scale}
        for estimator, scale in itertools.product(("group", "rloo", "reinforce_pp", "maxrl"), ("group", "batch", "none"))
    ),
    {"multi_objective_aggregation": "normalize_then_sum"},
    {"soft_overlong_tokens": 3, "max_completion_length": 5},
]


def groups_with(rewards: Sequence[Sequence[float | None]]) -> list[Group]:
    """None: a void episode."""
    groups = []
    for row in rewards:
        second = [None if reward is None else reward / 2 for reward in row]
        scores = Scores(
            total=[None if r is None else 1.5 * r for r in row],
            by_function={"one": list(row), "two": second},
            extras={},
            metrics={},
            weights=[1.0, 1.0],
        )
        completions = [completion_of(VOID if r is None else played(), sampled=2 + i) for i, r in enumerate(row)]
        groups.append(group_of(*completions, scores=scores))
    return groups


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_check_12_advantages_of_siblings_are_those_of_a_group_without_the_void_episode(options: dict[str, Any]) -> None:
    config = GRPOConfig(**options)
    holed: list[list[float | None]] = [list(row) for row in REWARDS]
    holed[0][1] = holed[1][3] = None
    groups = groups_with(holed)
    found = with_advantages(groups, config)
    expected = with_advantages([group.without_void() for group in groups], config)
    assert [len(group.completions) for group in expected] == [3, 3, 4]
    for group, wanted in zip(found, expected, strict=True):
        assert all(a == 0.0 for a, c in zip(group.advantages, group.completions, strict=True) if c.is_void)
        assert group.without_void().advantages == wanted.advantages
        assert (group.reward_std, group.has_variance) == (wanted.reward_std, wanted.has_variance)


def test_check_13_none_of_an_environment_is_out_of_the_baseline() -> None:
    scorer = Scorer(RewardsConfig(), [], needs_functions=False)
    rewards = [1.0, None, 0.5]
    scores = scored(scorer, *[played(rewards={"Guess": reward}) for reward in rewards])
    group = group_of(*[completion_of(played())] * 3, scores=scores)
    (found,) = with_advantages([group], GRPOConfig(scale_rewards="none"))
    assert found.advantages == (0.25, 0.0, -0.25)


# Collecting


class Sampled:
    """An engine that has sampled these groups."""

    def __init__(self, groups: Sequence[Sequence[Completion]]) -> None:
        self.groups = groups

    def rollout(self, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> Iterator[PromptGroup]:
        for index in reversed(range(len(prompts))):
            yield PromptGroup(index=index, prompt_token_ids=(), completions=tuple(self.groups[index]))


def test_a_step_is_collected_with_void_episodes_and_several_environments(scorer: Scorer, sees: Sees) -> None:
    sampled = [
        [completion_of(played(rewards={"Guess": 1.0})), completion_of(VOID)],
        [completion_of(VOID), completion_of(VOID)],
        [completion_of(played(rewards={"Sum": 0.5})), completion_of(played())],
    ]
    engine: Any = Sampled(sampled)
    config = GRPOConfig().rollout
    prompts = [prompt_of(f"{i}?") for i in range(3)]
    collected = collect(engine, scorer, prompts, config, seeds=None, trainer_state={}, world=SINGLE_PROCESS)
    assert [group.scores.total for group in collected.groups] == [[2.0, None], [None, None], [1.5, 2.0]]
    assert {tuple(group.scores.by_function) for group in collected.groups} == {("sees", "Guess", "Sum")}
    assert len(sees.calls) == 2
