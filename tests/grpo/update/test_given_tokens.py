"""No given token moves a loss: there is no mask, so every option of the objective must be unable to see one.

The model's last hidden states get a term that is 0, except where the next token was given: there it is NaN. If a loss, ratio,
KL, entropy, guard or metric read any of these rows, in the trainer's forward, the reference's or the one that finds the entropy
threshold, its numbers would be NaN or others. They are the same bit for bit, and the rows' gradients are exactly 0. A finite
difference in the logits of a given token is a special case: NaN is the difference that nothing can hide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sample_groups import random_groups, void, with_given

from rankup.grpo.algorithm.losses import LossInputs
from rankup.grpo.config import GRPOConfig
from rankup.grpo.config.algorithm import CORRECTION_MODES, ESTIMATORS, OBJECTIVES
from rankup.grpo.data.groups import Group
from rankup.grpo.experience.batch import with_advantages
from rankup.grpo.experience.step_metrics import completion_metrics, reward_metrics
from rankup.grpo.model.packing import by_completion, pack, pad
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner
from rankup.rewards.combining import Scores
from rankup.rollout.types import Completion

SHAPES = [(4, [6, 9, 7, 5]), (3, [8, 5, 6]), (5, [7, 4, 9, 6])]


def entropic(tokens: LossInputs) -> torch.Tensor:
    return -tokens.advantages * tokens.logprobs - 0.1 * tokens.entropies + 0.01 / tokens.lengths[tokens.sequence]


CASES: dict[str, dict[str, Any]] = {
    **{f"loss_type {name}": {"loss_type": name} for name in sorted(OBJECTIVES)},
    **{
        f"aggregation {name}": {"loss_aggregation": name}
        for name in ("token_mean", "local_token_mean", "sequence_mean", "constant")
    },
    **{f"correction {mode}": {"mode": mode, "cap": 1.5} for mode in CORRECTION_MODES},
    **{f"estimator {name}": {"advantage_estimator": name} for name in ESTIMATORS},
    **{f"scale {name}": {"scale_rewards": name} for name in ("group", "batch", "none")},
    "sequence ratio": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "kl to the start": {"beta": 0.1},
    "kl to the base": {"beta": 0.1, "reference": "base", "use_bias_correction_kl": True, "num_iterations": 2},
    "entropy bonus": {"entropy_coef": 0.1},
    "entropy quantile": {"top_entropy_quantile": 0.4, "num_iterations": 2},
    "entropy quantile and bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.1, "veto": 0.0},
    "veto": {"veto": 0.9},
    "veto and kl": {"veto": 0.9, "beta": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 0.01},
    "two-sided clip": {"delta": 1.5, "num_iterations": 3},
    "masked truncated": {"mask_truncated_completions": True},
    "soft overlong": {"soft_overlong_tokens": 8},
    "all groups in the means": {"filter_zero_variance": False},
    "normalised functions": {"multi_objective_aggregation": "normalize_then_sum"},
    "user's loss": {"loss_type": entropic},
    "everything": {
        "loss_type": "gspo",
        "epsilon": 0.1,
        "epsilon_high": 0.1,
        "delta": 1.2,
        "beta": 0.1,
        "entropy_coef": 0.1,
        "top_entropy_quantile": 0.5,
        "mode": "sequence_truncate",
        "veto": 0.5,
        "off_policy_mask_threshold": 0.02,
        "num_iterations": 2,
    },
}


def scores_of(completions: Sequence[Completion], seed: int) -> Scores:
    """Made-up rewards of two functions, all at least 0; none for void episodes, and of one function for only some."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(2, len(completions), generator=generator).tolist()
    first = [None if c.is_void else draw for c, draw in zip(completions, draws[0], strict=True)]
    second = [None if c.is_void or i % 2 else draw for i, (c, draw) in enumerate(zip(completions, draws[1], strict=True))]
    total = [None if a is None else a + (b or 0.0) for a, b in zip(first, second, strict=True)]
    return Scores(total=total, by_function={"one": first, "two": second}, extras={}, metrics={}, weights=[1.0, 1.0])


@pytest.fixture
def episodes() -> list[Group]:
    """Groups with random given tokens, one void episode, and one episode in which nothing was sampled."""
    first, second, *others = with_given(random_groups(SHAPES, truncated=[1]), shares=[0.5])
    first = dataclasses.replace(first, completions=(*first.completions[:3], void(first.completions[3])))
    empty = second.completions[2]
    nothing = dataclasses.replace(empty, given=((0, len(empty.token_ids)),), logprobs=())
    second = dataclasses.replace(second, completions=(*second.completions[:2], nothing))
    groups = [first, second, *others]
    assert all(sum(c.num_tokens > 1 and c.num_given > 0 for c in group.completions) > 1 for group in groups)
    return [dataclasses.replace(group, scores=scores_of(group.completions, seed=i)) for i, group in enumerate(groups)]


def are_sampled(completion: Completion) -> list[bool]:
    """Of each token up to the last sampled one, by hand."""
    ids = range(len(completion.token_ids))
    flags = [not any(start <= place < end for start, end in completion.given) for place in ids]
    return flags[: max(place for place in ids if flags[place]) + 1]


def rows_that_predict(groups: Sequence[Group], *, is_shared: bool) -> torch.Tensor:
    """Whether each hidden state of the only pack predicts a sampled token, [rows, width, 1], by hand."""
    kept = [(g.prompt.token_ids, [are_sampled(c) for c in g.completions if c.logprobs and not c.is_void]) for g in groups]
    if is_shared:
        row: list[bool] = []
        for prompt, completions in kept:
            row += [False] * (len(prompt) - 1) + [any(flags[0] for flags in completions)]
            row += [flag for flags in completions for flag in flags[1:]]
        return torch.tensor([row])[..., None]
    rows = [[False] * (len(prompt) - 1) + flags for prompt, completions in kept for flags in completions]
    rows.sort(key=len, reverse=True)  # as `pad` does
    return torch.tensor([row + [False] * (len(rows[0]) - len(row)) for row in rows])[..., None]


def near_the_policy(policy: Policy, groups: list[Group]) -> list[Group]:
    """The groups with sampler's log-probabilities that are the policy's but for noise."""
    shared, padded = pack(groups, tokens_per_pack=10_000), pad(groups, tokens_per_pack=10_000, pad_token_id=0)
    packs = shared if policy.shares_prompts else padded
    exact = by_completion(packs, [policy.logprobs(one)[0] for one in packs])
    generator = torch.Generator().manual_seed(0)
    noisy = iter([lps + 0.3 * (torch.rand(lps.shape, generator=generator) - 0.5) for lps in exact])

    def with_noise(completion: Completion) -> Completion:
        has_targets = completion.logprobs and not completion.is_void
        return dataclasses.replace(completion, logprobs=tuple(next(noisy).tolist())) if has_targets else completion

    return [dataclasses.replace(group, completions=tuple(map(with_noise, group.completions))) for group in groups]


@contextmanager
def hidden_states_plus(policy: Policy, term: torch.Tensor) -> Iterator[None]:
    """Within it, the model's last hidden states are those plus this term, [rows, width, 1]."""

    def add(module: torch.nn.Module, inputs: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + term
        return output

    handle = policy.model.base_model.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def outcome(
    policy: Policy, config: GRPOConfig, groups: list[Group], *, steps: int = 2
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """All metrics of some steps, those of guards too, and the master weights after them. The policy is as before then."""
    start = [master.detach().clone() for master in policy.masters]
    policy.keep_reference()
    learner = Learner(policy, config)
    metrics = []
    for step in range(steps):
        observed = {**reward_metrics(groups, ["one", "two"]), **completion_metrics(groups)}
        metrics.append(observed | learner.update(groups, step=step, observed=observed).metrics)
        policy.write_slots()
    end = torch.cat([master.detach().flatten() for master in policy.masters])
    with torch.no_grad():
        for master, before in zip(policy.masters, start, strict=True):
            master.copy_(before)
            master.grad = None
    policy.write_slots()
    return metrics, end


def exact(metrics: list[dict[str, float]]) -> list[dict[str, str]]:
    return [{name: value.hex() if math.isfinite(value) else str(value) for name, value in row.items()} for row in metrics]


def options_of(name: str) -> GRPOConfig:
    options = {"learning_rate": 1e-5, "tokens_per_pack": 10_000, "adam_epsilon": 1e-3, "max_completion_length": 12}
    return GRPOConfig(**{**options, **CASES[name]})


def trained_groups(groups: Sequence[Group], config: GRPOConfig) -> list[Group]:
    """Those with a gradient, without what is not trained."""
    groups = [group.without_void() for group in groups if any(group.advantages) or config.algorithm.needs_every_group]
    if not config.algorithm.mask_truncated_completions:
        return groups
    return [g.select([i for i, c in enumerate(g.completions) if not c.is_truncated]) for g in groups]


@pytest.mark.parametrize("kind", ["llama", "falcon"], ids=["shared", "padded"])
@pytest.mark.parametrize("name", CASES)
def test_check_5_no_given_token_moves_a_loss_a_gradient_a_guard_or_a_metric(
    make_policy: Callable[..., Policy], episodes: list[Group], kind: str, name: str
) -> None:
    policy, config = make_policy(kind, rank=4), options_of(name)
    policy.write_slots()
    groups = with_advantages(near_the_policy(policy, episodes), config)
    is_read = rows_that_predict(trained_groups(groups, config), is_shared=policy.shares_prompts)
    assert 0.2 < is_read.float().mean() < 0.8

    metrics, end = outcome(policy, config, groups)
    with hidden_states_plus(policy, torch.zeros(is_read.shape).masked_fill(~is_read, math.nan)):
        metrics_with_nan, end_with_nan = outcome(policy, config, groups)
    assert exact(metrics_with_nan) == exact(metrics)
    assert torch.equal(end_with_nan, end)
    assert all(row["updates"] >= 1 and math.isfinite(row["loss"]) for row in metrics)

    term = torch.zeros(is_read.shape, requires_grad=True)
    with hidden_states_plus(policy, term):
        Learner(policy, config).backward(groups)
    assert term.grad is not None and term.grad[is_read].any()
    assert not term.grad[~is_read].any(), "exactly 0"


def test_every_hidden_state_that_predicts_a_sampled_token_moves_a_metric(
    make_policy: Callable[..., Policy], episodes: list[Group]
) -> None:
    """The test above would find a single row that is read."""
    policy, config = make_policy("llama", rank=4), options_of("loss_type dapo")
    policy.write_slots()
    groups = with_advantages(near_the_policy(policy, episodes), config)
    is_read = rows_that_predict(trained_groups(groups, config), is_shared=True)
    metrics, _ = outcome(policy, config, groups, steps=1)
    for place in is_read.flatten().nonzero().flatten().tolist():
        term = torch.zeros(is_read.shape)
        term[0, place] = 0.1
        with hidden_states_plus(policy, term):
            changed, _ = outcome(policy, config, groups, steps=1)
        assert exact(changed) != exact(metrics), place


@pytest.mark.parametrize("kind", ["llama", "falcon"], ids=["shared", "padded"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("aggregation", "entropy", "kl", "all", "loss"))])
def test_check_12_nothing_of_a_void_episode_is_trained_and_it_is_in_no_mean(
    make_policy: Callable[..., Policy], episodes: list[Group], kind: str, name: str
) -> None:
    policy, config = make_policy(kind, rank=4), options_of(name)
    policy.write_slots()
    near = near_the_policy(policy, episodes)
    all_void = dataclasses.replace(near[1], completions=tuple(map(void, near[1].completions)))
    all_void = dataclasses.replace(all_void, scores=scores_of(all_void.completions, seed=0))
    groups = with_advantages([*near, all_void], config)
    without = [group.without_void() for group in with_advantages(near, config)]
    assert sum(len(group.completions) for group in without) == len([c for g in groups for c in g.completions]) - 4
    metrics, end = outcome(policy, config, groups)
    metrics_without, end_without = outcome(policy, config, without)
    of_episodes = [name for name in metrics[0] if name.startswith(("tools/", "episodes/"))]
    for row in metrics:
        for name in of_episodes:
            del row[name]
    assert of_episodes and exact(metrics) == exact(metrics_without)
    assert torch.equal(end, end_without)


def test_a_step_of_void_episodes_alone_trains_nothing(make_policy: Callable[..., Policy], episodes: list[Group]) -> None:
    policy, config = make_policy("llama", rank=4), options_of("kl to the start")
    policy.write_slots()
    policy.keep_reference()
    groups = [dataclasses.replace(g, completions=tuple(map(void, g.completions))) for g in episodes]
    groups = [dataclasses.replace(g, scores=scores_of(g.completions, seed=0)) for g in groups]
    learner = Learner(policy, config)
    assert learner.backward(with_advantages(groups, config)).stats is None
