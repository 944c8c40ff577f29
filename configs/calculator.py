"""Sums of two numbers of three digits, and a calculator: what a small model cannot do alone, and can learn to ask for.

    data:
      train: rankup.configs.calculator:train
      eval: rankup.configs.calculator:evaluation
    rollout:
      tools: rankup.configs.calculator:add
    rewards:
      functions: rankup.rewards.answers:last_integer

Every prompt begins with two worked dialogues, so that the model tries the tool at all. 128 sums are kept for evaluation; no
evaluation sum occurs in training, in either order of its terms. The choice does not depend on the seed of a run.
"""

import random

SMALLEST_TERM, LARGEST_TERM = 100, 999
NUM_TRAINING_SUMS, NUM_EVALUATION_SUMS = 4096, 128
EXAMPLES = ((741, 295), (368, 457))
_SPLIT_SEED = 2026


def add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        Their sum.
    """
    return a + b


def train(*, examples: bool = True) -> list[dict]:
    """Rows {"prompt", "answer"}; `data.options.examples=false`: without the worked dialogues."""
    return [_row(a, b, examples) for a, b in _pairs()[NUM_EVALUATION_SUMS:]]


def evaluation(*, examples: bool = True) -> list[dict]:
    """The 128 sums held out for evaluation; rows {"prompt", "answer"}."""
    return [_row(a, b, examples) for a, b in _pairs()[:NUM_EVALUATION_SUMS]]


def _pairs() -> list[tuple[int, int]]:
    """Distinct pairs of terms, in no order of theirs twice, and none of the examples."""
    choice, found = random.Random(_SPLIT_SEED), {frozenset(pair): pair for pair in EXAMPLES}
    while len(found) < len(EXAMPLES) + NUM_EVALUATION_SUMS + NUM_TRAINING_SUMS:
        pair = choice.randint(SMALLEST_TERM, LARGEST_TERM), choice.randint(SMALLEST_TERM, LARGEST_TERM)
        found.setdefault(frozenset(pair), pair)
    return list(found.values())[len(EXAMPLES) :]


def _row(a: int, b: int, examples: bool) -> dict:
    shown = [message for pair in EXAMPLES for message in _dialogue(*pair)] if examples else []
    return {"prompt": [*shown, _question(a, b)], "answer": str(a + b)}


def _question(a: int, b: int) -> dict:
    return {"role": "user", "content": f"What is {a} + {b}?"}


def _dialogue(a: int, b: int) -> list[dict]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
    return [
        _question(a, b),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": str(a + b)},
        {"role": "assistant", "content": f"{a} + {b} = {a + b}."},
    ]
