"""Built-in rewards that compare a completion's answer with the row's.

    rewards:
      functions: rankup.rewards.answers:last_integer

`exact_match` compares complete texts, `last_integer` and `last_number` the last number of each text, which `written_numbers.py`
reads in the same way in completions and in the `answer` column. A row whose answer is None gets None.

Only the *last number* counts. "42, or rather 42.5" has no integer answer, although it contains an integer.

Each function has an attribute `check_row`: a run calls it with every row before it starts, and refuses answers that no
completion could match.
"""

import json
import math
import numbers
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from .contract import with_check
from .logged import EXTRACTED_ANSWER, LogExtra
from .texts import Completion, Function, text_of
from .written_numbers import last_number_in, number_of, number_text


def _check_not_nan(answer: Any, **columns: Any) -> None:
    if isinstance(answer, float) and math.isnan(answer):
        raise ValueError("the answer is NaN, which equals nothing: use null where there is no answer")


@with_check(_check_not_nan)
def exact_match(
    completions: Sequence[Completion], answer: Sequence[Any], log_extra: LogExtra | None = None, **kwargs: Any
) -> list[float | None]:
    """1.0 if the completion equals the row's answer, ignoring surrounding white space, else 0.0.

    completions: n strings, or n conversations, whose last message is compared. The text is logged as `extracted_answer`.
    answer: n values. Texts are compared as texts: "3.0" is not "3". A number equals every way to write it ("3", "3.0" and
    "3.00" for 3.0), true and false their words in any case, a list or mapping the same JSON.
    """
    return _all_matches(completions, answer, str.strip, log_extra)


def exact_match_of(*, ignore_case: bool = False, ignore_whitespace: bool = False) -> Function:
    """`exact_match` with options.

    ignore_case: do not distinguish upper and lower case. ignore_whitespace: remove all white space first, not only around
    the text.
    """

    def normalised(text: str) -> str:
        text = "".join(text.split()) if ignore_whitespace else text.strip()
        return text.casefold() if ignore_case else text

    @with_check(_check_not_nan)
    def reward(
        completions: Sequence[Completion], answer: Sequence[Any], log_extra: LogExtra | None = None, **kwargs: Any
    ) -> list[float | None]:
        return _all_matches(completions, answer, normalised, log_extra)

    reward.__name__ = "exact_match"
    return reward


def _all_matches(
    completions: Sequence[Completion], answer: Sequence[Any], normalised: Callable[[str], str], log_extra: LogExtra | None
) -> list[float | None]:
    texts = [text_of(completion) for completion in completions]
    if log_extra is not None:
        log_extra(EXTRACTED_ANSWER, [normalised(text) for text in texts])
    return [_matches(text, value, normalised) for text, value in zip(texts, answer, strict=True)]


def _matches(text: str, answer: Any, normalised: Callable[[str], str]) -> float | None:
    """Whether a text is the answer; None without one."""
    if answer is None:
        return None
    if normalised(text) == normalised(str(answer)):
        return 1.0
    if isinstance(answer, bool):
        return float(normalised(text).casefold() == str(answer).casefold())
    if isinstance(answer, numbers.Real | Decimal):
        exact = _exact(answer)
        return float(exact is not None and number_of(text) == exact)
    if isinstance(answer, list | dict):
        try:
            return float(_with_types(json.loads(text)) == _with_types(answer))
        except (ValueError, RecursionError):  # RecursionError: thousands of open brackets
            return 0.0
    return 0.0


def _with_types(value: Any) -> Any:
    """The value with each true and false marked: Python takes true for 1."""
    if isinstance(value, list):
        return [_with_types(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_types(item) for key, item in value.items()}
    return (bool, value) if isinstance(value, bool) else value


def _check_integer(answer: Any, **columns: Any) -> None:
    _expected(answer, integer=True)


def _check_number(answer: Any, **columns: Any) -> None:
    _expected(answer, integer=False)


@with_check(_check_integer)
def last_integer(
    completions: Sequence[Completion], answer: Sequence[Any], log_extra: LogExtra | None = None, **kwargs: Any
) -> list[float | None]:
    """1.0 if the last number of the completion equals the integer at the end of the row's answer, else 0.0.

    completions: n strings, or n conversations, whose last message is read. The number is logged as `extracted_answer`.
    answer: n values: a number, a string such as "42" or "1,234", or a reference text that ends with the answer, as GSM8K's
    "... #### 1,234".

    Raises ValueError, naming the row, if an answer has no integer: no completion could ever be correct.
    """
    return _equal(completions, answer, log_extra, integer=True)


@with_check(_check_number)
def last_number(
    completions: Sequence[Completion], answer: Sequence[Any], log_extra: LogExtra | None = None, **kwargs: Any
) -> list[float | None]:
    """The same for all numbers: 1.0 if the last numbers of both are equal, else 0.0.

    They are compared exactly: "4.0" equals "4", "3/4" equals "0.75", and "0.333" does not equal "0.3333".

    Raises ValueError, naming the row, if an answer has no number.
    """
    return _equal(completions, answer, log_extra, integer=False)


def _equal(
    completions: Sequence[Completion], answer: Sequence[Any], log_extra: LogExtra | None, *, integer: bool
) -> list[float | None]:
    found = [last_number_in(text_of(completion)) for completion in completions]
    scores: list[float | None] = []
    for row, (number, written) in enumerate(zip(found, answer, strict=True)):
        try:
            expected = _expected(written, integer=integer)
        except ValueError as error:
            raise ValueError(str(error).replace("the answer", f"the answer of row {row}", 1)) from None
        scores.append(None if expected is None else float(number == expected))
    if log_extra is not None:
        log_extra(EXTRACTED_ANSWER, [None if number is None else number_text(number) for number in found])
    return scores


def _expected(answer: Any, *, integer: bool) -> Fraction | None:
    """The number at the end of an answer; None without one. Raises ValueError if it has no number, or no integer."""
    if answer is None:
        return None
    is_number = isinstance(answer, numbers.Real | Decimal) and not isinstance(answer, bool)
    number = _exact(answer) if is_number else last_number_in(str(answer))
    if number is None or (integer and number.denominator != 1):
        is_ambiguous = not integer and any(character.isdecimal() for character in str(answer))
        in_one_way = " at its end that can be read in only one way" if is_ambiguous else ""
        complaint = "does not end with an integer" if integer else f"has no number{in_one_way}"
        raise ValueError(f"the answer {complaint}: {str(answer)[-60:]!r}")
    return number


def _exact(number: Any) -> Fraction | None:
    """The number that is written: 1/10 for 0.1. None for NaN and infinity."""
    if isinstance(number, numbers.Rational):
        return Fraction(number)
    decimal = Decimal(str(number))
    return Fraction(decimal) if decimal.is_finite() else None
