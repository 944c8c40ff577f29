"""The loop of turns, on the torch engine with a tiny model: real requests, real futures."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rankup.grpo.config import LoraConfig
from rankup.grpo.model.policy import Policy
from rankup.rollout.config import SamplingConfig
from rankup.rollout.torch_engine import TorchEngine
from rankup.rollout.turns import Play, Request, Turn, play
from tests.support.tiny_models import make_tiny_model

PROMPT = tuple(range(10, 24))
Make = Callable[..., TorchEngine]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def made(kind: str = "llama", *, max_num_seqs: int = 32) -> TorchEngine:
        folder: Path = tmp_path_factory.mktemp(kind)
        path = str(make_tiny_model(folder / "model", kind))
        policy = Policy(path, lora=LoraConfig(rank=4), dtype="float32")
        engine = TorchEngine(policy, path, max_num_seqs=max_num_seqs, max_model_length=256)
        engine.publish(policy.write_slots)
        return engine

    return made


def dialogue(turns: int, *, seed: int, given: int = 3, tokens: int = 6) -> Play[list[Turn]]:
    """An episode of that many turns, with tokens given between them."""
    ids, found = PROMPT, []
    for number in range(turns):
        turn: Turn = yield Request(prompt_token_ids=ids, max_tokens=tokens, seed=seed + number, may_continue=True)
        found.append(turn)
        ids = (*ids, *turn.token_ids, *range(30, 30 + given))
    return found


def ends(engine: TorchEngine) -> SamplingConfig:
    """Turns of these tests end soon: many tokens end them."""
    return SamplingConfig(num_generations=1, max_completion_length=64)


STOP = range(100, 200)


def played(engine: TorchEngine, episodes: list[Play[list[Turn]]], **options: int) -> dict[int, list[Turn]]:
    with engine.requests(ends(engine), stop_token_ids=STOP) as requests:
        return dict(play(requests, episodes, **options))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "mistral"])
def test_each_turn_is_what_a_request_of_its_own_samples(make: Make, kind: str) -> None:
    """Keys and values that are kept between turns, joined batches and windows of attention change no token."""
    engine = make(kind)
    together = played(engine, [dialogue(1 + index % 4, seed=100 * index, given=1 + index) for index in range(9)])
    for index, turns in together.items():
        ids = PROMPT
        for number, turn in enumerate(turns):
            with engine.requests(ends(engine), stop_token_ids=STOP) as alone:
                alone.submit(0, Request(prompt_token_ids=ids, max_tokens=6, seed=100 * index + number))
                found = list(iter_turns(alone))
            assert [turn.token_ids for turn in found] == [turn.token_ids], (index, number)
            assert found[0].logprobs == pytest.approx(turn.logprobs, abs=2e-5)
            ids = (*ids, *turn.token_ids, *range(30, 31 + index))


def iter_turns(requests) -> Iterator[Turn]:
    while requests.has_unfinished:
        yield from (turn for _, turn in requests.step())


def test_a_turn_that_goes_on_computes_only_what_is_new(make: Make) -> None:
    engine = make()
    turns = played(engine, [dialogue(3, seed=5)])[0]
    held = len(PROMPT)
    for before, after in itertools.pairwise(turns):
        held += len(before.token_ids)
        assert after.cached_tokens in (held - 1, 0)
        assert after.cached_tokens == held - 1 or before.finish_reason == "length"
        held += 3
    assert turns[0].cached_tokens == 0


def test_completions_of_one_turn_are_those_of_rollout(make: Make) -> None:
    engine, sampling = make(max_num_seqs=6), SamplingConfig(num_generations=3, max_completion_length=12)
    prompts, seeds = [PROMPT, PROMPT, (20, 21, 22), PROMPT[:9]], [11, 22, 33, 44]
    groups = sorted(engine.rollout(prompts, sampling, seeds=seeds), key=lambda group: group.index)

    def one(index: int, place: int) -> Play[Turn]:
        return (yield Request(prompt_token_ids=prompts[index], max_tokens=12, seed=seeds[index] + place, group=index))

    with engine.requests(sampling) as requests:
        turns = dict(play(requests, [one(index, place) for index in range(4) for place in range(3)]))
    for group in groups:
        for place, completion in enumerate(group.completions):
            turn = turns[group.index * 3 + place]
            assert (turn.token_ids, turn.logprobs) == (completion.token_ids, completion.logprobs)  # to the bit
            assert (turn.text, turn.finish_reason) == (completion.text, completion.finish_reason)


def test_other_episodes_are_sampled_while_one_waits(make: Make) -> None:
    engine, is_sampled, order = make(), threading.Event(), []

    def waits(pool: ThreadPoolExecutor) -> Play[str]:
        yield Request(prompt_token_ids=PROMPT, max_tokens=2, seed=1)
        yield pool.submit(is_sampled.wait, 60)  # true once the other episode has ended
        order.append("waited")
        return "waited"

    def is_short() -> Play[str]:
        for _ in range(3):
            yield Request(prompt_token_ids=PROMPT, max_tokens=4, seed=2)
        order.append("short")
        is_sampled.set()
        return "short"

    with ThreadPoolExecutor(1) as pool, engine.requests(ends(engine)) as requests:
        assert sorted(play(requests, [waits(pool), is_short()])) == [(0, "waited"), (1, "short")]
    assert order == ["short", "waited"]


def test_calls_in_this_process_are_made_in_the_order_of_the_episodes(make: Make) -> None:
    orders = []
    for _ in range(2):
        engine, order = make(), []

        def calls(index: int, order: list[int] = order) -> Play[int]:
            for number in range(3):
                yield Request(prompt_token_ids=PROMPT, max_tokens=4, seed=index * 10 + number)
                order.append(index)
                done: Future[int] = Future()
                done.set_result(index)
                assert (yield done) == index
            return index

        with engine.requests(ends(engine), stop_token_ids=STOP) as requests:
            outcomes = [index for index, _ in play(requests, [calls(index) for index in range(6)])]
        orders.append((order, outcomes))
    assert orders[0] == orders[1]
    assert sorted(orders[0][0]) == sorted(list(range(6)) * 3)


def test_no_more_episodes_than_asked_for_are_open(make: Make) -> None:
    engine, open_now, most = make(), set(), []

    def counted(index: int) -> Play[int]:
        open_now.add(index)
        most.append(len(open_now))
        yield Request(prompt_token_ids=PROMPT, max_tokens=1 + index, seed=index)
        open_now.discard(index)
        return index

    with engine.requests(ends(engine)) as requests:
        assert len(list(play(requests, [counted(index) for index in range(7)], at_most=2))) == 7
    assert max(most) == 2


@pytest.mark.parametrize("how", ["the caller stops", "an episode fails"])
def test_all_episodes_are_closed_when_the_rollout_ends_early(make: Make, how: str) -> None:
    engine, closed = make(), []

    def endless(index: int) -> Play[None]:
        try:
            while True:
                yield Request(prompt_token_ids=PROMPT, max_tokens=3, seed=index)
                if how == "an episode fails" and index == 1:
                    raise LookupError("of the episode")
        finally:
            closed.append(index)

    def ends_at_once() -> Play[None]:
        yield Request(prompt_token_ids=PROMPT, max_tokens=1, seed=0)

    with engine.requests(ends(engine), stop_token_ids=STOP) as requests:
        episodes = play(requests, [ends_at_once(), endless(1), endless(2)])
        if how == "an episode fails":
            with pytest.raises(LookupError, match="of the episode"):
                list(episodes)
        else:
            next(episodes)
            episodes.close()  # type: ignore[attr-defined]
    assert sorted(closed) == [1, 2]
    groups = list(engine.rollout([PROMPT], SamplingConfig(num_generations=2, max_completion_length=3), seeds=[1]))
    assert len(groups[0].completions) == 2  # the engine can be used again


def test_random_dialogues_give_back_what_is_kept(make: Make) -> None:
    """Whatever joins and leaves the batch, each turn ends, and nothing is kept afterwards."""
    engine, draw = make(max_num_seqs=4), random.Random(0)
    episodes = [dialogue(draw.randint(1, 5), seed=index, given=draw.randint(1, 9)) for index in range(17)]
    with engine.requests(ends(engine), stop_token_ids=STOP) as requests:
        found = dict(play(requests, episodes))
        assert requests._lanes[True]._kept == {} and requests._lanes[True].rows == []
    assert sorted(found) == list(range(17))


def test_padding_that_no_row_needs_any_more_is_dropped_when_the_longest_row_ends(make: Make) -> None:
    engine = make()
    with engine.requests(SamplingConfig(num_generations=1, max_completion_length=64)) as requests:
        requests.submit(0, Request(prompt_token_ids=PROMPT * 8, max_tokens=2, seed=1))
        requests.submit(1, Request(prompt_token_ids=PROMPT[:3], max_tokens=30, seed=2))
        ended: list[int] = []
        while not ended:
            ended += [key for key, _ in requests.step()]
        assert ended == [0]
        lane = requests._lanes[True]
        assert lane._batch is not None and lane._batch.width == 3 + len(lane.rows[0].token_ids)
        assert lane._batch._cache.get_seq_length() == lane._batch.width - 1


# ---------------------------------------------------------------------------------------------- base model and policy


def with_strong_adapter(engine: TorchEngine) -> TorchEngine:
    policy = engine._policy
    assert isinstance(policy, Policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.master_b.copy_(torch.randn(layer.master_b.shape, generator=generator))
    engine.publish(policy.write_slots)
    return engine


@pytest.mark.parametrize("max_num_seqs", [1, 3, 32])
def test_base_model_and_policy_together_are_two_rollouts(make: Make, max_num_seqs: int) -> None:
    engine = with_strong_adapter(make(max_num_seqs=max_num_seqs))
    sampling = SamplingConfig(num_generations=2, max_completion_length=8)
    prompts = [PROMPT, PROMPT[:5]]
    alone = {
        use: {group.index: group.completions for group in engine.rollout(prompts, sampling, seeds=[7, 9], use_adapter=use)}
        for use in (True, False)
    }
    asked = [(use, index, place) for index in range(2) for use in (True, False) for place in range(2)]
    together: dict[int, Turn] = {}
    with engine.requests(sampling) as requests:
        for key, (use, index, place) in enumerate(asked):
            seed = [7, 9][index] + place
            ids = prompts[index]
            requests.submit(key, Request(prompt_token_ids=ids, max_tokens=8, seed=seed, group=index, use_adapter=use))
        while requests.has_unfinished:
            running = sum(len(lane.rows) for lane in requests._lanes.values())
            assert running <= max(max_num_seqs, 2)  # one group at least
            together.update(requests.step())
    for key, (use, index, place) in enumerate(asked):
        assert together[key].token_ids == alone[use][index][place].token_ids
    assert alone[True][0][0].token_ids != alone[False][0][0].token_ids


def test_a_turn_on_the_other_side_takes_nothing_of_what_is_kept(make: Make) -> None:
    engine = with_strong_adapter(make())

    def episode(uses: tuple[bool, bool]) -> Play[Turn]:
        first: Turn = yield Request(prompt_token_ids=PROMPT, max_tokens=4, seed=1, may_continue=True, use_adapter=uses[0])
        ids = (*PROMPT, *first.token_ids, 30, 31)
        return (yield Request(prompt_token_ids=ids, max_tokens=4, seed=2, may_continue=True, use_adapter=uses[1]))

    with engine.requests(ends(engine), stop_token_ids=range(4, 260)) as requests:  # every token ends a turn
        turns = dict(play(requests, [episode((True, False)), episode((True, True))]))
    assert turns[0].cached_tokens == 0 and turns[1].cached_tokens > 0


def test_a_request_tells_its_tokens_while_it_is_sampled(make: Make) -> None:
    engine, seen, ended = make(), [], []
    with engine.requests(ends(engine), stop_token_ids=STOP) as requests:
        requests.submit(4, Request(prompt_token_ids=PROMPT, max_tokens=9, seed=3, streams=True))
        while requests.has_unfinished:
            seen.append(requests.sampled(4))
            ended = requests.step()
    ((_, turn),) = ended
    assert [turn.token_ids[: len(tokens)] for tokens in seen] == seen and len(seen[-1]) == len(turn.token_ids) - 1
