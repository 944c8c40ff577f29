#!/usr/bin/env python3
"""What episodes cost beside single answers, with SmolLM2-135M-Instruct in vLLM.

`waiting` compares 64 episodes of three turns whose environment responds after 1 s (`await`) with the same whose environment
responds at once. Every turn has the same number of tokens.

`rate` compares tokens sampled per second: 128 episodes of the calculator (16 sums x 8 completions, the untrained model) with
single turns of the same prompts, which sample as many tokens: all of them the mean of the episodes, or each as many as its
episode. The prefix cache is emptied before each, as a run does before a step.

`recomputed` counts tokens of later turns' prompts that were computed a second time, also with the torch engine. `python`
replays the sampled turns without an engine: microseconds of a turn for parsing, calls, bridges and seeds, and for parts alone.

Repeats are interleaved.

examples:
  scripts/bench/episodes.py --json episodes.json          about five minutes on two idle cores
  scripts/bench/episodes.py --repeats 1 --no-torch        a quick look
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common import Result, command_line, interleave, markdown, run, summarise

if TYPE_CHECKING:
    from episodes_sides import CalculatorEngine, EpisodesOf, Recorded

MOST_OF_TIME, MOST_OF_WAITING = 1.3, 3.0
"""Waiting episodes take at most this multiple of the time of the others, and these seconds."""
EQUAL, OWN = "single turns, equally long", "single turns, each as long as its episode"
LEAST_RATIO = 0.6
"""Of the sampling rates of episodes and of single turns."""


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=5, what="measured rollouts of each kind")
    parser.add_argument("--no-torch", action="store_false", dest="torch", help="leave the torch engine out")
    run(parser.parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Start vLLM, then measure everything."""
    from episodes_sides import CalculatorEngine

    print("starting vLLM", flush=True)
    engine = CalculatorEngine()
    sums = engine.calculator_episodes()
    return {
        "waiting": _waiting(engine, options.repeats),
        **_rates(engine, sums, options.repeats),
        "recomputed": _recomputed(engine, sums, with_torch=options.torch),
        "python": _python(engine, sums, options.repeats),
    }


def _waiting(engine: CalculatorEngine, repeats: int) -> Result:
    from episodes_sides import TURN_TOKENS, TURNS, Immediate, Waits

    sides = {"immediate": engine.respond_episodes(Immediate), "waits": engine.respond_episodes(Waits)}

    def seconds(name: str) -> float:
        engine.clear_prefix_cache()
        recorded = sides[name].play(engine.vllm)
        lengths = {tuple(len(turn.token_ids) for turn in turns) for turns in recorded.turns.values()}
        assert lengths == {(TURN_TOKENS,) * TURNS} and len(recorded.turns) == 64, f"turns of other lengths: {lengths}"
        return recorded.seconds

    seconds("immediate")
    found = {name: summarise(values) for name, values in interleave(sides, repeats, seconds).items()}
    immediate, waits = (found[name]["median"] for name in sides)
    limit = MOST_OF_TIME * immediate + MOST_OF_WAITING
    return {"seconds": found, "added_seconds": waits - immediate, "limit_seconds": limit, "holds": waits <= limit}


def _rates(engine: CalculatorEngine, sums: EpisodesOf, repeats: int) -> Result:
    engine.clear_prefix_cache()
    warm = sums.play(engine.vllm)
    own = [sum(len(turn.token_ids) for turn in warm.turns[key]) for key in sorted(warm.turns)]
    mean = round(statistics.fmean(own))
    lengths = {EQUAL: [mean] * len(own), OWN: own}
    shares: list[float] = []
    submits: list[float] = []

    def rate(name: str) -> float:
        engine.clear_prefix_cache()
        if name == "episodes":
            recorded = sums.play(engine.vllm)
            shares.append(1 - (recorded.step_seconds + recorded.submit_seconds) / recorded.seconds)
            submits.append(1e6 * recorded.submit_seconds / recorded.num_turns)
            return recorded.sampled_tokens / recorded.seconds
        return sum(lengths[name]) / engine.single_turns(sums, lengths[name])

    rate(EQUAL)
    rates = {name: summarise(values) for name, values in interleave(["episodes", *lengths], repeats, rate).items()}
    ratios = {name: rates["episodes"]["median"] / one["median"] for name, one in rates.items() if name != "episodes"}
    return {
        "tokens_per_second": rates,
        "ratios": ratios,
        "holds": ratios[EQUAL] >= LEAST_RATIO,
        "outside_engine": summarise(shares),
        "submit_us": summarise(submits),
        "settings": {
            "episodes": len(warm.turns),
            "turns": warm.num_turns / len(warm.turns),
            "sampled_tokens": mean,
            "prompt_tokens": statistics.fmean(len(prompt.token_ids) for prompt in sums.prompts),
            "engine_steps": warm.steps,
        },
    }


# ------------------------------------------------------------------------------------------------- tokens computed twice


def _recomputed(engine: CalculatorEngine, sums: EpisodesOf, *, with_torch: bool) -> Result:
    engine.clear_prefix_cache()
    found = {"vllm": _computed_twice(sums.play(engine.vllm))}
    if with_torch:
        print("sampling with the torch engine", flush=True)
        found["torch"] = _computed_twice(sums.play(engine.torch(), prompts=2))
    return found


def _computed_twice(recorded: Recorded) -> Result:
    """Tokens for each later turn."""
    later = list(recorded.later_turns())
    twice = [max(0, before - turn.cached_tokens) for before, _, turn in later]
    first = [(recorded.prompts[key][0], turns[0]) for key, turns in recorded.turns.items()]
    return {
        "episodes": len(recorded.turns),
        "later_turns": len(later),
        "prompt_tokens": statistics.fmean(length for _, length, _ in later),
        "computed_twice": summarise(twice),
        "computed_twice_mean": statistics.fmean(twice),
        "new_tokens_mean": statistics.fmean(length - before for before, length, _ in later),
        "computed_twice_each_episode": sum(twice) / len(recorded.turns),
        "first_turn_computed_mean": statistics.fmean(len(prompt) - turn.cached_tokens for prompt, turn in first),
    }


# ------------------------------------------------------------------------------------------------------- our Python alone


def _python(engine: CalculatorEngine, sums: EpisodesOf, repeats: int) -> Result:
    from episodes_sides import Replay

    engine.clear_prefix_cache()
    recorded = sums.play(engine.vllm)
    turns = recorded.num_turns
    whole = [1e6 * sums.play(Replay(recorded)).seconds / turns for _ in range(3 * repeats)]
    parts = _parts(sums, recorded)
    return {
        "turn_us": summarise(whole),
        "parts_us": {name: summarise([part() for _ in range(3 * repeats)]) for name, part in parts.items()},
        "turns": turns,
    }


def _parts(sums: EpisodesOf, recorded: Recorded) -> dict[str, Callable[[], float]]:
    """Microseconds of parts of a turn, each by what is done once for all turns that were sampled."""
    from rankup.grpo.episodes.user_code import UserCode
    from rankup.rollout.sampling_params import sampling_params

    dialect, caller = sums.dialogues._dialect, sums.actions.caller
    pairs = [pair for key, turns in recorded.turns.items() for pair in zip(turns, recorded.prompts[key], strict=True)]
    replies = [dialect.parse(turn.token_ids, before=prompt) for turn, prompt in pairs]
    called = [reply for reply in replies if reply.calls]
    code = UserCode(caller, seed=7, place=3)
    (tool,) = sums.actions.tools
    assert called, "some turns call the tool"

    def timed(items: list[Any], work: Callable[[Any], object]) -> Callable[[], float]:
        def microseconds() -> float:
            started = time.perf_counter()
            for item in items:
                work(item)
            return 1e6 * (time.perf_counter() - started) / len(items)

        return microseconds

    return {
        "parse": timed(pairs, lambda pair: dialect.parse(pair[0].token_ids, before=pair[1])),
        "bridge, where a call is answered": timed(called, lambda reply: dialect.bridge(reply, reply.results(["1036"]))),
        "call, inline": timed(called, lambda reply: caller.call(tool.function, {"a": 741, "b": 295}, seed=5).result()),
        "seed": timed(pairs, lambda pair: code.seed_of("turn 1")),
        "SamplingParams": timed(pairs, lambda pair: sampling_params(sums.sampling, 7, stop_token_ids=[2], max_tokens=96)),
    }


# -------------------------------------------------------------------------------------------------------------- report


def report(result: Result) -> str:
    """The tables, and what tokens computed twice and Python cost."""
    python, settings = result["python"], result["settings"]
    lines = [
        f"- {settings['turns']:.2f} turns and {settings['sampled_tokens']} sampled tokens an episode, prompts of "
        f"{settings['prompt_tokens']:.0f} tokens; {result['outside_engine']['median']:.1%} of the time outside the engine, and "
        f"{result['submit_us']['median']:.0f} us to add a request to it",
        *(
            f"- {name}: a later turn computes {one['computed_twice_mean']:.1f} tokens again "
            f"({one['computed_twice']['min']} to {one['computed_twice']['max']}) and {one['new_tokens_mean']:.1f} new ones of "
            f"{one['prompt_tokens']:.0f}; again in an episode: {one['computed_twice_each_episode']:.1f}"
            for name, one in result["recomputed"].items()
        ),
        f"- Python of a turn: {python['turn_us']['median']:.0f} us; "
        + ", ".join(f"{name} {one['median']:.0f}" for name, one in python["parts_us"].items()),
    ]
    return "\n".join([table(result), "", *lines])


def table(result: Result) -> str:
    """A row for each requirement: what is compared, both sides, and the limit."""
    waiting, rates = result["waiting"], result["tokens_per_second"]
    immediate, waits = (f"{waiting['seconds'][name]['median']:.2f} s" for name in ("immediate", "waits"))
    rows = [["64 episodes, 3 turns, 1 s each waiting", waits, immediate, f"at most {waiting['limit_seconds']:.2f} s"]]
    for name, ratio in result["ratios"].items():
        limit = f"at least {LEAST_RATIO}" if name == EQUAL else ""
        sides = (f"{rates[one]['median']:,.0f} tokens/s" for one in ("episodes", name))
        rows.append([f"calculator against {name}: {ratio:.2f}", *sides, limit])
    return markdown(["", "episodes", "against", "limit"], rows, left=1)


if __name__ == "__main__":
    main()
