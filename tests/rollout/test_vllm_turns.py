"""Turns of episodes on vLLM: each is what a request of its own samples, and a run of single turns is `rollout()`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from rankup.grpo.model.prove import prove_slots
from rankup.rollout.config import SamplingConfig
from rankup.rollout.turns import Play, Request, Turn, play
from rankup.rollout.types import EngineError

pytestmark = pytest.mark.engine

PROMPT = tuple(range(10, 80))
"""More than two blocks of the prefix cache, of 32 tokens each on CPU."""
BLOCK = 32
STOP = range(100, 200)


@pytest.fixture
def engine(make_engine, make_policy) -> Any:
    """With a strong random adapter."""
    found, policy = make_engine(), make_policy()
    policy.attach(found.slots)
    found.publish(policy.write_slots)
    return found


def settings(**changes: Any) -> SamplingConfig:
    return SamplingConfig(**{"num_generations": 1, "max_completion_length": 64, **changes})


def dialogue(turns: int, *, seed: int | None, given: int = 3, tokens: int = 6) -> Play[list[Turn]]:
    """An episode of that many turns, with tokens given between them."""
    ids, found = PROMPT, []
    for number in range(turns):
        of_turn = None if seed is None else seed + number
        turn: Turn = yield Request(prompt_token_ids=ids, max_tokens=tokens, seed=of_turn, may_continue=True)
        found.append(turn)
        ids = (*ids, *turn.token_ids, *range(30, 30 + given))
    return found


def played(engine: Any, episodes: Sequence[Play[Any]], sampling: SamplingConfig | None = None) -> dict[int, Any]:
    with engine.requests(sampling or settings(), stop_token_ids=STOP) as requests:
        return dict(play(requests, episodes))


def alone(engine: Any, request: Request, sampling: SamplingConfig | None = None) -> Turn:
    with engine.requests(sampling or settings(), stop_token_ids=STOP) as requests:
        requests.submit(0, request)
        (turn,) = turns_of(requests)
    return turn


def turns_of(requests: Any) -> Iterator[Turn]:
    while requests.has_unfinished:
        yield from (turn for _, turn in requests.step())


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_each_turn_is_what_a_request_of_its_own_samples(engine: Any, temperature: float) -> None:
    sampling = settings(temperature=temperature)
    seeds = [None if temperature == 0 else 100 * index for index in range(9)]
    episodes = [dialogue(1 + index % 4, seed=seed, given=1 + index) for index, seed in enumerate(seeds)]
    for index, turns in played(engine, episodes, sampling).items():
        ids = PROMPT
        for number, turn in enumerate(turns):
            seed = None if temperature == 0 else 100 * index + number
            fresh = alone(engine, Request(prompt_token_ids=ids, max_tokens=6, seed=seed), sampling)
            assert fresh.token_ids == turn.token_ids, (index, number)
            assert fresh.logprobs == pytest.approx(turn.logprobs, abs=1e-4)
            ids = (*ids, *turn.token_ids, *range(30, 31 + index))


def test_stored_log_probabilities_are_those_of_the_finished_stream(engine: Any) -> None:
    episodes = played(engine, [dialogue(3, seed=7 * index) for index in range(6)])
    for turns in episodes.values():
        ids, places, stored = list(PROMPT), [], []
        for turn in turns:
            places += range(len(ids), len(ids) + len(turn.token_ids))
            stored += turn.logprobs
            ids += [*turn.token_ids, *range(30, 33)]
        (logprobs,) = engine.prompt_logprobs([ids])
        assert [logprobs[place - 1] for place in places] == pytest.approx(stored, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 20}, {"stop": ["a", "e"]}, {"temperature": 0.0}])
def test_single_turns_are_those_of_rollout_to_the_bit(engine: Any, options: dict[str, Any]) -> None:
    greedy = options.get("temperature") == 0.0
    size = 1 if greedy else 3
    sampling = settings(num_generations=size, max_completion_length=12, **options)
    prompts, seeds = [PROMPT, (20, 21, 22), PROMPT[:9]], [11, 22, 33]
    groups = sorted(engine.rollout(prompts, sampling, seeds=seeds), key=lambda group: group.index)

    def one(index: int, place: int) -> Play[Turn]:
        seed = None if greedy else seeds[index] + place
        return (yield Request(prompt_token_ids=prompts[index], max_tokens=12, seed=seed, group=index, may_continue=True))

    with engine.requests(sampling) as requests:
        turns = dict(play(requests, [one(index, place) for index in range(3) for place in range(size)]))
    for group in groups:
        for place, completion in enumerate(group.completions):
            turn = turns[group.index * size + place]
            assert (turn.token_ids, turn.logprobs) == (completion.token_ids, completion.logprobs)  # to the bit
            assert (turn.text, turn.finish_reason) == (completion.text, completion.finish_reason)


def test_tokens_of_the_dialect_end_a_turn_and_stay_in_it(engine: Any) -> None:
    turns = [alone(engine, Request(prompt_token_ids=PROMPT, max_tokens=40, seed=seed)) for seed in range(12)]
    ended = [turn for turn in turns if turn.finish_reason == "stop"]
    assert ended and all(turn.ended_by_token for turn in ended)
    for turn in turns:
        assert not any(token in STOP for token in turn.token_ids[:-1])
        assert (turn.token_ids[-1] in STOP or turn.token_ids[-1] == 2) == (turn.finish_reason == "stop")
        assert len(turn.token_ids) == len(turn.logprobs)


def test_a_turn_that_a_stop_string_ended_is_told_apart(engine: Any) -> None:
    sampling = settings(stop=["a", "e", "1", "B", "t"])
    with engine.requests(sampling) as requests:
        for seed in range(12):
            requests.submit(seed, Request(prompt_token_ids=PROMPT, max_tokens=60, seed=seed))
        turns = list(turns_of(requests))
    by_string = [turn for turn in turns if turn.finish_reason == "stop" and not turn.ended_by_token]
    assert by_string
    for turn in by_string:
        assert not any(string in turn.text for string in sampling.stop)  # cut off, its tokens are not
        assert any(string in engine._tokenizer.decode(list(turn.token_ids)) for string in sampling.stop)


def test_full_blocks_of_what_an_episode_holds_are_not_computed_again(engine: Any) -> None:
    turns = played(engine, [dialogue(4, seed=5, given=20)])[0]
    held = len(PROMPT)
    for before, after in itertools.pairwise(turns):
        held += len(before.token_ids)
        assert after.cached_tokens == (held - 1) // BLOCK * BLOCK  # all but the newest token were computed
        held += 20


def test_nothing_is_cached_of_an_earlier_policy(engine: Any, make_policy) -> None:
    played(engine, [dialogue(2, seed=5)])
    policy = make_policy(seed=3)
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    assert alone(engine, Request(prompt_token_ids=PROMPT, max_tokens=6, seed=5)).cached_tokens == 0


def test_closing_early_leaves_the_engine_as_it_was(engine: Any) -> None:
    request = Request(prompt_token_ids=PROMPT, max_tokens=6, seed=3)
    expected = alone(engine, request)
    with engine.requests(settings(), stop_token_ids=STOP) as requests:
        episodes = play(requests, [dialogue(1, seed=1), *(dialogue(50, seed=index, tokens=40) for index in range(40))])
        next(episodes)
        episodes.close()  # type: ignore[attr-defined]
        assert requests.has_unfinished
    assert not engine._engine.has_unfinished_requests()
    again = alone(engine, request)
    assert (again.token_ids, again.text) == (expected.token_ids, expected.text)
    assert len(list(engine.rollout([PROMPT], settings(num_generations=2, max_completion_length=3), seeds=[1]))) == 1


def test_a_prompt_that_vllm_echoes_otherwise_is_an_error(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine._engine.step

    def changed() -> list[Any]:
        outputs = step()
        for output in outputs:
            output.prompt_token_ids = [*output.prompt_token_ids[1:], 5]
        return outputs

    monkeypatch.setattr(engine._engine, "step", changed)
    with pytest.raises(EngineError, match="other tokens than those of the episode"):
        alone(engine, Request(prompt_token_ids=PROMPT, max_tokens=6, seed=3))


def test_a_prompt_without_room_is_an_error_and_no_crash(engine: Any) -> None:
    longest = engine.settings.rollout.max_model_length
    with pytest.raises(ValueError, match="vLLM refuses to sample like this"):
        alone(engine, Request(prompt_token_ids=(5,) * (longest + 1), max_tokens=6, seed=3))
    assert not engine._engine.has_unfinished_requests()


def test_rule_13_the_proof_covers_episodes(make_engine, make_policy) -> None:
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    prove_slots(policy, engine, episodes=True)


# ---------------------------------------------------------------------------------------------- base model and policy


def both_sides(**settings_: Any) -> list[Request]:
    """Requests with the adapter and without, of prompts that begin alike."""
    prompts = [PROMPT, (*PROMPT, 90), PROMPT[:40]]
    return [
        Request(prompt_token_ids=prompt, max_tokens=12, group=group, use_adapter=use, **settings_)
        for group, (prompt, use) in enumerate(itertools.product(prompts, (True, False)))
    ]


def test_base_model_and_policy_in_one_batch_are_two_rollouts(engine: Any) -> None:
    greedy = settings(temperature=0.0, max_completion_length=12)
    asked = both_sides(seed=None)
    with engine.requests(greedy) as requests:
        for key, request in enumerate(asked):
            requests.submit(key, request)
        together = dict(ended for _ in iter(lambda: requests.has_unfinished, False) for ended in requests.step())
    for use in (True, False):
        keys = [key for key, request in enumerate(asked) if request.use_adapter is use]
        prompts = [asked[key].prompt_token_ids for key in keys]
        alone = sorted(engine.rollout(prompts, greedy, use_adapter=use), key=lambda group: group.index)
        assert [together[key].token_ids for key in keys] == [group.completions[0].token_ids for group in alone]
        for key, group in zip(keys, alone, strict=True):
            assert together[key].logprobs == pytest.approx(group.completions[0].logprobs, abs=1e-4)
    assert any(together[key].token_ids != together[key + 1].token_ids for key in range(0, len(asked), 2))


def test_a_request_that_streams_tells_its_tokens(engine: Any) -> None:
    plain, streamed = (Request(prompt_token_ids=PROMPT, max_tokens=12, seed=3, streams=streams) for streams in (False, True))
    expected, seen, ended = alone(engine, plain), [], []
    with engine.requests(settings(), stop_token_ids=STOP) as requests:
        requests.submit(4, streamed)
        while requests.has_unfinished:
            seen.append(requests.sampled(4))
            ended = requests.step()
    assert [turn for _, turn in ended] == [dataclasses.replace(expected, cached_tokens=ended[0][1].cached_tokens)]
    assert [len(tokens) for tokens in seen] == list(range(len(expected.token_ids)))
    assert all(expected.token_ids[: len(tokens)] == tokens for tokens in seen)
