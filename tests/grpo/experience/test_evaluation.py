"""Metrics of an evaluation: by function and by set, alike on one worker and on several."""

from __future__ import annotations

import dataclasses
import math
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from sample_groups import make_group
from tiny_runs import ROWS, many_low_ids

from rankup.grpo.algorithm.estimates import mean_interval
from rankup.grpo.common.world import SINGLE_PROCESS, World
from rankup.grpo.experience.evaluation import Evaluation, evaluate
from rankup.grpo.update.session import engine_and_policy
from rankup.rewards.combining import Scores
from rankup.rollout.protocol import Engine

TIMES = ("eval_runtime", "eval_samples_per_second")


def evaluation_of(*rows: tuple[str | None, float | None, float | None], seconds: float = 2.0) -> Evaluation:
    """A row is a prompt's set and the rewards of two functions; completions have 1, 2, 3, ... tokens, the first is cut off."""
    groups = []
    for place, (name, answer, form) in enumerate(rows):
        group = make_group([1], [[7] * (place + 1)], truncated=[0] if place == 0 else [])
        known = [reward for reward in (answer, form) if reward is not None]
        scores = Scores([sum(known)] if known else [None], {"answer": [answer], "form": [form]}, {}, {}, [1.0, 1.0])
        groups.append(dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, eval_set=name), scores=scores))
    return Evaluation(groups=groups, seconds=seconds)


def bounds(prefix: str, rewards: list[float]) -> dict[str, float]:
    """The metrics of the interval of these prompts' rewards."""
    interval = mean_interval(rewards)
    return {f"{prefix}reward_low": interval.low, f"{prefix}reward_high": interval.high}


def test_the_metrics_of_one_set_have_the_names_of_trl():
    evaluation = evaluation_of((None, 1.0, 0.5), (None, 0.0, None), (None, None, None), (None, 0.0, 0.0))
    assert evaluation.mean_reward == 0.5 and evaluation.rewards == [1.5, 0.0, None, 0.0]
    assert evaluation.metrics() == {
        "eval_reward": 0.5,
        **bounds("eval_", [1.5, 0.0, 0.0]),
        "eval_rewards/answer/mean": pytest.approx(1 / 3),
        "eval_rewards/form/mean": 0.25,
        "eval_completions/mean_length": 2.5,
        "eval_completions/clipped_ratio": 0.25,
        "eval_runtime": 2.0,
        "eval_samples_per_second": 2.0,
    }


def test_each_named_set_has_its_rewards_in_addition():
    one_set = evaluation_of((None, 1.0, 0.5), (None, 0.0, 0.0), (None, 0.5, None)).metrics()
    metrics = evaluation_of(("easy", 1.0, 0.5), ("hard", 0.0, 0.0), ("easy", 0.5, None)).metrics()
    assert metrics == one_set | {
        "eval_easy_reward": 1.0,
        **bounds("eval_easy_", [1.5, 0.5]),
        "eval_easy_rewards/answer/mean": 0.75,
        "eval_easy_rewards/form/mean": 0.5,
        "eval_hard_reward": 0.0,
        **bounds("eval_hard_", [0.0]),
        "eval_hard_rewards/answer/mean": 0.0,
        "eval_hard_rewards/form/mean": 0.0,
    }


def test_a_mean_of_nothing_is_not_a_number():
    metrics = evaluation_of(("easy", 1.0, None), ("hard", None, None)).metrics()
    assert metrics["eval_reward"] == metrics["eval_easy_reward"] == 1.0
    nothing = ("eval_rewards/form/mean", "eval_easy_rewards/form/mean", "eval_hard_reward", "eval_hard_rewards/answer/mean")
    assert all(math.isnan(metrics[name]) for name in nothing)


class ThreadWorld(World):
    """A worker in a thread, which exchanges objects with the others through a list."""

    def __init__(self, rank: int, parts: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(parts))
        self._parts, self._barrier = parts, barrier

    def all_gather(self, local: Any) -> list[Any]:
        self._parts[self.rank] = local
        self._barrier.wait(timeout=60)
        gathered = list(self._parts)
        self._barrier.wait(timeout=60)
        return gathered


def test_every_one_of_several_workers_has_the_metrics_of_one(make_trainer):
    def even(target, **kwargs):
        return [float(n % 2 == 0) if n < 3 else None for n in target]

    def answers(completions, log_extra, **kwargs):
        log_extra("extracted_answer", [text[:1] for text in completions])
        return [float(text > "m") for text in completions]

    functions = [many_low_ids, even, answers]
    setup = make_trainer(reward=functions, rows=ROWS, eval_samples=4).setup
    prompts = [dataclasses.replace(p, eval_set="few" if place < 1 else "many") for place, p in enumerate(setup.eval_prompts)]

    def metrics_on(world: World, engine: Engine) -> dict[str, float]:
        evaluation = evaluate(engine, setup.scorer, prompts, setup.config, step=0, world=world)
        assert sum(group.is_local for group in evaluation.groups) == len(prompts) // world.size
        assert evaluation.seconds > 0
        texts.append([[completion.text for completion in group.completions] for group in evaluation.groups])
        return {name: value for name, value in evaluation.metrics().items() if name not in TIMES}

    texts: list[list[list[str]]] = []
    barrier, parts = threading.Barrier(2), [None, None]
    worlds = [ThreadWorld(rank, parts, barrier) for rank in range(2)]
    with ExitStack() as stack:
        engines = [stack.enter_context(engine_and_policy(setup.config, setup.inputs.model_path))[0] for _ in worlds]
        with ThreadPoolExecutor(2) as threads:
            of_workers = list(threads.map(metrics_on, worlds, engines))
        assert of_workers == [metrics_on(SINGLE_PROCESS, engines[0])] * 2
    assert of_workers[0]["eval_few_rewards/even/mean"] == 1.0 and of_workers[0]["eval_rewards/even/mean"] == 2 / 3
    assert texts[0] == texts[1] == texts[2] and "" not in texts[0][0], "every worker has the texts of all"
    assert {"eval_pass@4", "eval_maj@4", "eval_few_maj@4_low"} <= of_workers[0].keys()


def test_several_completions_of_each_prompt_are_sampled_as_in_training(make_trainer):
    trainer = make_trainer(num_generations_eval=3, max_steps=1)
    with engine_and_policy(trainer.args, trainer.setup.inputs.model_path) as (engine, policy):
        engine.publish(policy.write_slots)
        prompts = trainer.setup.eval_prompts
        assert prompts is not None
        first, second = (evaluate(engine, trainer.setup.scorer, prompts, trainer.args, step=step) for step in (0, 5))
    texts = [[completion.text for completion in group.completions] for group in first.groups]
    assert [len(of_prompt) for of_prompt in texts] == [3] * 4 and all(len(set(of_prompt)) > 1 for of_prompt in texts)
    assert texts == [[completion.text for completion in group.completions] for group in second.groups]
    metrics = first.metrics()
    assert metrics["eval_reward"] == pytest.approx(statistics.fmean(reward for reward in first.rewards if reward is not None))
    spreads = [statistics.stdev([r for r in group.scores.total if r is not None]) for group in first.groups]
    assert metrics["eval_reward_std"] == pytest.approx(statistics.fmean(spreads)) and len(first.rewards) == 12
    assert metrics["eval_frac_reward_zero_std"] == sum(spread == 0 for spread in spreads) / 4
    trainer.train()
    assert trainer.summary["evaluation"]["before"]["reward"] == pytest.approx(metrics["eval_reward"])


def test_a_set_has_the_means_of_its_own_functions_only():
    evaluation = evaluation_of(("easy", 1.0, None), ("hard", None, 0.5), ("plain", 0.0, None))
    functions = {None: ["answer"], "hard": ["form"]}
    own = dataclasses.replace(evaluation, functions=functions).metrics()
    names = {name for name in own if name.endswith("/mean")}
    of_sets = {"eval_easy_rewards/answer/mean", "eval_hard_rewards/form/mean", "eval_plain_rewards/answer/mean"}
    assert names == of_sets | {"eval_rewards/answer/mean", "eval_rewards/form/mean"}
    assert (own["eval_hard_rewards/form/mean"], own["eval_rewards/form/mean"]) == (0.5, 0.5)


def test_guards_see_one_number_for_each_prompt():
    """Completions of one prompt are alike: as so many prompts they would make noise look like a decline."""
    group = make_group([1], [[7]] * 4)
    scores = [Scores([a, b, c, None], {"answer": [a, b, c, None]}, {}, {}, [1.0]) for a, b, c in [(1, 0, 0), (1, 1, 1)]]
    groups = [dataclasses.replace(group, scores=one) for one in scores]
    evaluation = Evaluation(groups=groups, seconds=1.0)
    assert evaluation.prompt_rewards == [pytest.approx(1 / 3), 1.0] and len(evaluation.rewards) == 8
