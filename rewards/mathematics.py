r"""A built-in reward for mathematical answers, which compares by value: \frac{1}{2} equals 0.5.

    rewards:
      functions: rankup.rewards.mathematics:math_verify

It uses the library Math-Verify (`math-verify`), which looks for the answer in "final answer is ...", then in `\boxed{...}`,
and otherwise takes the last formula or number. If the row's answer is a number, ways to write it that Math-Verify does not know
(`9\,500`, `1e-05`, see `written_numbers.py`) are read too. Its time limits are alarm signals: they work only on the main thread
of a process, and cannot interrupt one long operation. `isolation: process` with `timeout` is a hard limit.
"""

import functools
import re
import threading
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from .contract import with_check
from .logged import EXTRACTED_ANSWER, LogExtra
from .texts import Completion, Function, text_of
from .written_numbers import last_number_in, number_of, number_text

_TIME_LIMIT = 5
_DELIMITERS = ("$", r"\(", r"\[", r"\boxed")
_PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")


def _check_answer(answer: Any, **columns: Any) -> None:
    """Raise ValueError if an answer cannot be read. The library works on the main thread only."""
    if answer is None or threading.current_thread() is not threading.main_thread():
        return
    gold = _gold_text(answer)
    if number_of(gold) is None:
        _parse_gold(gold, _TIME_LIMIT)


@with_check(_check_answer)
def math_verify(
    completions: Sequence[Completion], answer: Sequence[Any], log_extra: LogExtra | None = None, **kwargs: Any
) -> list[float | None]:
    r"""1.0 if the completion's answer equals the row's as mathematics, else 0.0.

    completions: n strings, or n conversations, whose last message is read. In prose, sets, intervals and expressions with
    letters are found only as LaTeX: `$(1, 2]$` or `\boxed{x + 1}`. What is found is logged as `extracted_answer`.
    answer: n values: numbers, or texts as they would be written inside `\boxed{}` ("42", "1,234", "1/2", "50%",
    "\frac{1}{2}", "3, 4", "[0, 1)"), or a text with the answer as LaTeX ("It is $\frac{1}{2}$"). In a text with "####", as in
    GSM8K, the part after it is the answer. A known unit or one in \text is ignored: "12\text{ apples}"; but "12 apples" is a
    product of letters. A row whose answer is None gets None.

    Decimal numbers are compared to six decimals, those of answers below 1 to six significant digits, so "0.333333" equals 1/3;
    percentages match with and without the sign.
    A completion that takes more than 5 seconds to parse, or to compare, gets 0.0: `math_verify_of` sets the limit.

    Raises ValueError, naming the row, if an answer cannot be parsed, and RuntimeError off the main thread.
    """
    return _scores(completions, answer, _TIME_LIMIT, log_extra)


def math_verify_of(*, time_limit: int = _TIME_LIMIT) -> Function:
    """`math_verify` with another time limit, in seconds, for parsing a completion and again for comparing it.

    Raises ValueError if `time_limit` is not an integer of at least 1.
    """
    if not isinstance(time_limit, int) or time_limit < 1:
        # With 0.5 seconds the library's alarm fails, and it then behaves as if it had found no answer.
        raise ValueError(f"math_verify_of: time_limit must be an integer of at least 1 (seconds), not {time_limit!r}")

    @with_check(_check_answer)
    def reward(
        completions: Sequence[Completion], answer: Sequence[Any], log_extra: LogExtra | None = None, **kwargs: Any
    ) -> list[float | None]:
        return _scores(completions, answer, time_limit, log_extra)

    reward.__name__ = "math_verify"
    return reward


def _scores(
    completions: Sequence[Completion], answer: Sequence[Any], time_limit: int, log_extra: LogExtra | None
) -> list[float | None]:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "math_verify needs the main thread, where its time limit works, and was called on another one: set `isolation: "
            "process` for this reward"
        )
    from math_verify import verify

    _warm_up()
    parsed: dict[str, list[Any]] = {}  # the completions of one prompt share their answer
    scores: list[float | None] = []
    answers: list[str | None] = []
    for row, (completion, written) in enumerate(zip(completions, answer, strict=True)):
        if written is None:
            scores.append(None)
            answers.append(None)
            continue
        gold = _gold_text(written)
        if gold not in parsed:
            try:
                parsed[gold] = _parse_gold(gold, time_limit)
            except ValueError as error:
                raise ValueError(str(error).replace("the answer", f"the answer of row {row}", 1)) from None
        number, text = number_of(gold), text_of(completion)
        answered = _answered_number(text)
        if number is not None and answered == number:
            scores.append(1.0)
            answers.append(number_text(number))
            continue
        found = _parse(text, time_limit)
        is_equal = verify(parsed[gold], found, float_rounding=_decimals(number), timeout_seconds=time_limit)
        scores.append(float(is_equal))
        answers.append(_answer_text(gold if is_equal else None, answered, found))
    if log_extra is not None:
        log_extra(EXTRACTED_ANSWER, answers)
    return scores


def _answer_text(gold: str | None, number: Fraction | None, found: Sequence[Any]) -> str | None:
    """The answer of a completion as text: the row's if they are equal, so that all ways to write it are one answer; else its
    number; else the text that Math-Verify has found. None if there is none."""
    if gold is not None:
        of_gold = number_of(gold)
        return gold if of_gold is None else number_text(of_gold)
    if number is not None:
        return number_text(number)
    return str(found[-1]) if found else None


def _answered_number(text: str) -> Fraction | None:
    """The number in the last box, else in the last formula, else at the end of a text; None if there is something else."""
    for marked in (_BOXED, _FORMULA):
        if found := list(marked.finditer(text)):
            return number_of(found[-1][found[-1].lastindex or 0].strip().strip("$"))
    return None if "final answer" in text.lower() else last_number_in(text)  # Math-Verify looks behind these words


def _decimals(number: Fraction | None) -> int:
    """The decimals to compare: six, and more for numbers below 1, whose first digits come later."""
    if number is None or number == 0 or abs(number) >= 1:
        return 6
    return 5 + len(str(abs(number.denominator // number.numerator)))


@functools.cache
def _warm_up() -> None:
    # The first formula and the first comparison load parts of SymPy for seconds, which must not use up the first row's time.
    from math_verify import verify

    verify(_parse(r"$\frac{x}{2} + 1$", 300), _parse("$x$", 300), timeout_seconds=300)


def _gold_text(answer: Any) -> str:
    text = str(answer).rpartition("####")[2].replace(r"\$", "").strip()  # an escaped dollar is money, not a delimiter
    if _PLAIN.fullmatch(text) or (number := number_of(text)) is None:
        return text
    decimal = Decimal(number.numerator) / Decimal(number.denominator)
    is_exact = Fraction(decimal) == number  # never 1e+20, which would be read as a product with e
    return f"{decimal:f}" if is_exact else f"{number.numerator}/{number.denominator}"


def _parse_gold(text: str, time_limit: int) -> list[Any]:
    # Without delimiters Math-Verify finds only the last number of a formula: 2 in "2x", and 4 in "3, 4".
    marked = text if any(mark in text for mark in _DELIMITERS) else f"${text}$"
    parsed = _parse(marked, time_limit) or _parse(text, time_limit)
    if not parsed:
        raise ValueError(
            f"the answer cannot be read as mathematics: {text[-60:]!r}. Write it as a number or as LaTeX, "
            "or compare texts with rankup.rewards.answers:exact_match"
        )
    return parsed


def _parse(text: str, time_limit: int) -> list[Any]:
    """The answer that Math-Verify finds in a text, as SymPy objects; empty if it finds none or takes too long."""
    from math_verify import parse

    return parse(text, fallback_mode="no_fallback", parsing_timeout=time_limit)
