r"""A built-in reward for mathematical answers, which compares by value: \frac{1}{2} equals 0.5.

    rewards:
      functions: rankup.rewards.mathematics:math_verify

It uses the library Math-Verify (`math-verify`), which finds the answer in the completion, preferably in "final answer
is ...", then in `\boxed{...}`, and else takes the last formula or number. Its time limits are alarm signals, which only
exist on the main thread of a process, and they interrupt between two steps of Python: `isolation: process` with a time
limit is the hard one.
"""

import functools
import threading
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from .texts import Completion, RewardFunction, text_of

_TIME_LIMIT = 5
_DELIMITERS = ("$", r"\(", r"\[", r"\boxed")


def math_verify(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    r"""1.0 where the completion's answer equals the row's as mathematics, else 0.0.

    completions: n strings, or n conversations, of which the last message counts. In prose, sets, intervals and
    expressions with letters are only found as LaTeX: `$(1, 2]$` or `\boxed{x + 1}`.
    answer: n values: numbers, or texts with what one would write into `\boxed{}` ("42", "1,234", "1/2", "50%",
    "\frac{1}{2}", "3, 4", "[0, 1)"), or a text with the answer as LaTeX ("It is $\frac{1}{2}$"). Of a text with "####",
    as GSM8K has it, what follows counts. A unit is left aside where it is a known one or \text: "12\text{ apples}", while
    "12 apples" is a product of letters. A row whose answer is None gets None.

    Decimal numbers are compared to six decimals, so "0.333333" equals 1/3; percent counts with and without the sign.
    A completion that takes longer than 5 seconds to read, or to compare, earns 0.0: `math_verify_of` sets the limit.

    Raises ValueError, naming the row, where an answer cannot be read, and RuntimeError off the main thread.
    """
    return _scores(completions, answer, _TIME_LIMIT)


def math_verify_of(*, time_limit: int = _TIME_LIMIT) -> RewardFunction:
    """`math_verify` with another limit: whole seconds, at least 1, for reading and for comparing a completion each.

    Raises ValueError for another time limit.
    """
    if not isinstance(time_limit, int) or time_limit < 1:
        # An alarm of 0.5 seconds is an error that the library swallows, as if no answer had been found.
        raise ValueError(f"math_verify_of: time_limit must be whole seconds, at least 1, not {time_limit!r}")

    def reward(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
        return _scores(completions, answer, time_limit)

    reward.__name__ = "math_verify"
    return reward


def _scores(completions: Sequence[Completion], answer: Sequence[Any], time_limit: int) -> list[float | None]:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "math_verify needs the main thread, where its time limit works, and this is another one: set `isolation: "
            "process` for this reward"
        )
    from math_verify import verify

    _warm_up()
    parsed: dict[str, list[Any]] = {}  # the completions of one prompt share their answer
    scores: list[float | None] = []
    for row, (completion, written) in enumerate(zip(completions, answer, strict=True)):
        if written is None:
            scores.append(None)
            continue
        gold = _gold_text(written)
        if gold not in parsed:
            parsed[gold] = _parse_gold(gold, row, time_limit)
        found = _parse(text_of(completion), time_limit)
        scores.append(float(verify(parsed[gold], found, timeout_seconds=time_limit)))
    return scores


@functools.cache
def _warm_up() -> None:
    # The first formula and the first comparison load parts of SymPy for seconds, which must not count as the first row's.
    from math_verify import verify

    verify(_parse(r"$\frac{x}{2} + 1$", 300), _parse("$x$", 300), timeout_seconds=300)


def _gold_text(answer: Any) -> str:
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return f"{Decimal(str(answer)):f}"  # never 1e+20, which would be read as a product with e
    return str(answer).rpartition("####")[2].replace(r"\$", "").strip()  # an escaped dollar is money, not a delimiter


def _parse_gold(text: str, row: int, time_limit: int) -> list[Any]:
    # Without delimiters only the last number of a formula would be found: 2 in "2x", and 4 in "3, 4".
    marked = text if any(mark in text for mark in _DELIMITERS) else f"${text}$"
    parsed = _parse(marked, time_limit) or _parse(text, time_limit)
    if not parsed:
        raise ValueError(
            f"the answer of row {row} cannot be read as mathematics: {text[-60:]!r}. Write it as a number or as LaTeX, "
            "or compare texts with rankup.rewards.answers:exact_match"
        )
    return parsed


def _parse(text: str, time_limit: int) -> list[Any]:
    """What Math-Verify reads from a text, as SymPy objects; empty where it finds nothing or takes too long."""
    from math_verify import parse

    return parse(text, fallback_mode="no_fallback", parsing_timeout=time_limit)
