"""A step's batch: resampling, penalties on rewards, and the selection of trained groups."""

from __future__ import annotations

import statistics

import pytest
from routing import with_experts
from sample_groups import random_groups
from tiny_runs import ROWS, many_low_ids, steps_of

from rankup.grpo.data.prompts import Prompt
from rankup.grpo.data.sampler import PromptSampler
from rankup.grpo.experience.batch import Batch, collect_batch
from rankup.grpo.update.session import engine_and_policy


def some_prompts_only(completion_ids, target, **kwargs):
    """Variance for one prompt in four; all others fail always."""
    return [float(ids[0]) if n % 4 == 0 else 0.0 for ids, n in zip(completion_ids, target, strict=True)]


@pytest.fixture
def make_batch(make_trainer):
    """The batch of step 0 of a run whose policy is the base model."""

    def make(reward=many_low_ids, step=0, **changes):
        setup = make_trainer(reward=reward, **changes).setup
        with engine_and_policy(setup.config, setup.inputs.model_path) as (engine, _):
            return collect_batch(engine, setup.scorer, setup.sampler, setup.config, functions=setup.functions, step=step)

    return make


def test_without_resampling_all_groups_are_handed_on(make_batch):
    batch = make_batch(some_prompts_only)
    assert len(batch.trained) == len(batch.groups) == 3
    assert "resampling_rounds" not in batch.metrics and "overlong_penalty" not in batch.metrics


def test_resampling_continues_until_enough_groups_have_variance(make_batch):
    batch = make_batch(some_prompts_only, max_resampling_rounds=50)
    rounds = int(batch.metrics["resampling_rounds"])
    assert 1 <= rounds < 50
    assert len(batch.groups) == 3 * (rounds + 1)
    assert len(batch.trained) == 3
    assert all(any(group.advantages) for group in batch.trained)
    varied = sum(group.has_variance for group in batch.groups)
    before = sum(group.has_variance for group in batch.groups[:-3])
    assert varied >= 3 and before < 3, "it stops at the first round that suffices"
    # All sampled groups count in the metrics, whether they are trained on or not.
    assert batch.metrics["frac_reward_zero_std"] == pytest.approx(1 - varied / len(batch.groups))


def test_resampling_is_bounded(make_batch):
    def hopeless(completions, **kwargs):
        return [0.0] * len(completions)

    batch = make_batch(hopeless, max_resampling_rounds=2)
    assert batch.metrics["resampling_rounds"] == 2.0
    assert len(batch.groups) == 9 and not batch.trained


def test_a_batch_is_the_same_for_the_same_step_and_other_for_another(make_batch):
    def ids(batch):
        return [c.token_ids for g in batch.groups for c in g.completions]

    first, again = (make_batch(some_prompts_only, max_resampling_rounds=3) for _ in range(2))
    assert ids(first) == ids(again) and len(ids(first)) > 12
    assert ids(first) != ids(make_batch(some_prompts_only, max_resampling_rounds=3, step=1))


def test_the_same_prompt_drawn_again_gets_other_completions(make_batch):
    """Seeds go by the place in the step, all rounds counted, not by the prompt."""
    batch = make_batch(some_prompts_only, rows=ROWS[1:4], max_resampling_rounds=3)
    by_prompt: dict[str, set] = {}
    for group in batch.groups:
        drawn = tuple(c.token_ids for c in group.completions)
        assert drawn not in by_prompt.setdefault(str(group.prompt.content), set())
        by_prompt[str(group.prompt.content)].add(drawn)
    assert len(by_prompt) == 3


def test_long_completions_lose_reward(make_batch):
    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    batch = make_batch(constant, soft_overlong_tokens=4, stop=list("0123456789abcdefgh"))
    assert all(len({c.num_tokens for c in group.completions}) > 1 for group in batch.groups)
    for group in batch.groups:
        lengths = [len(c.token_ids) for c in group.completions]
        shaped = [1.0 - max(0, length - 4) / 4 for length in lengths]
        assert group.reward_std == pytest.approx(statistics.stdev(shaped))
        mean = statistics.fmean(shaped)
        assert [advantage > 0 for advantage in group.advantages] == [reward > mean for reward in shaped]
    assert batch.metrics["overlong_penalty"] > 0
    assert batch.metrics["reward"] == 1.0, "the metric is the functions' reward, without the penalty"


def test_a_run_with_dynamic_sampling_trains_and_reports_it(make_trainer, tmp_path):
    make_trainer(reward=some_prompts_only, max_resampling_rounds=8).train()
    for step in steps_of(tmp_path / "run"):
        assert step["resampling_rounds"] >= 1 and "loss" in step


def test_further_prompts_are_distinct_within_a_draw_where_there_are_enough():
    rows = [Prompt(content=str(i), token_ids=(i,), columns={}) for i in range(10)]
    sampler = PromptSampler(rows, prompts_per_step=6, seed=3, shuffle=False)
    draws = [[prompt.content for prompt in sampler.further_batch(step, number)] for step in range(4) for number in range(1, 4)]
    assert all(len(set(draw)) == 6 for draw in draws)
    assert len({tuple(draw) for draw in draws}) == len(draws)
    few = PromptSampler(rows[:2], prompts_per_step=6, seed=3)
    assert len(few.further_batch(0, 1)) == 6


@pytest.mark.engine
def test_an_engine_of_other_settings_is_refused(vllm_engine, make_trainer):
    with pytest.raises(ValueError, match="other settings"):
        make_trainer(engine="vllm", max_completion_length=9).train(engine=vllm_engine)
    with pytest.raises(ValueError, match="leave out `engine`"):
        make_trainer().train(engine=vllm_engine)


def test_what_is_left_of_a_batch_once_it_was_trained_on_has_no_experts() -> None:
    groups = with_experts(random_groups([(4, [3, 6]), (2, [5])]))
    batch = Batch(groups=groups, trained=groups[:1], metrics={}, rollout_seconds=0.0, reward_seconds=0.0).without_experts()
    assert batch.groups == groups and batch.trained == groups[:1], "apart from the experts"
    left = [completion for group in (*batch.groups, *batch.trained) for completion in group.completions]
    assert len(left) == 5 and all(completion.routed_experts is None for completion in left)
