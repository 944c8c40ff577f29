"""Built-in rewards that compare a completion's answer with the row's.

    rewards:
      functions: rankup.rewards.answers:last_integer

`exact_match` compares complete texts, `last_integer` and `last_number` the last number of each text. A row whose answer is
None gets None. Numbers are read in the same way in completions and in the `answer` column:

- thousands separators are part of the number: "1,234" is 1234;
- a full stop that ends a sentence is not: "12." is 12;
- a minus sign counts unless it joins two terms: "-5", "(-5)", "-$5" and "is -5" are minus five, "7-5" and "3 - 5" end
  with plain five;
- a decimal number is one number: "4.0" is the integer 4, ".5" is a half, and "12.5" is not an integer (neither 12 nor 5);
- percent and currency signs are not part of it: "$5" and "5%" are 5.

Only the *last number* counts. "42, or rather 42.5" has no integer answer, although it contains an integer.
"""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from .texts import Completion, Function, text_of

_NUMBER = re.compile(
    r"""
    (?= [-\u2212.0-9] )                                            # for speed only: most characters start no number
    (?P<sign> (?<![\w)\]}]) [-\u2212] \$? )?                        # a minus (or the typographic one) after no operand
    (?P<whole> [0-9]{1,3} (?: ,[0-9]{3} )+ (?![0-9]) | [0-9]+       # 1,234,567 or 1234567
             | (?<![\w.]) (?=\.[0-9]) )                             # or nothing, before the .5 of "is .5"
    (?: \. (?P<fraction> [0-9]+ ) )?
    """,
    re.VERBOSE,
)


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """1.0 if the completion equals the row's answer, ignoring surrounding white space, else 0.0.

    completions: n strings, or n conversations, whose last message is compared. answer: n values, compared as text.
    """
    return _equal(completions, answer, str.strip)


def exact_match_of(*, ignore_case: bool = False, ignore_whitespace: bool = False) -> Function:
    """`exact_match` with options.

    ignore_case: do not distinguish upper and lower case. ignore_whitespace: remove all white space first, not only around
    the text.
    """

    def normalised(text: str) -> str:
        text = "".join(text.split()) if ignore_whitespace else text.strip()
        return text.casefold() if ignore_case else text

    def reward(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
        return _equal(completions, answer, normalised)

    reward.__name__ = "exact_match"
    return reward


def last_integer(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """1.0 if the last number of the completion equals the integer at the end of the row's answer, else 0.0.

    completions: n strings, or n conversations, whose last message is read.
    answer: n values: an int, a string such as "42" or "1,234", or a reference text that ends with the answer, as
    GSM8K's "... #### 1,234".

    Raises ValueError, naming the row, if an answer has no integer: no completion could ever be correct.
    """
    return _equal(completions, answer, _final_integer, "does not end with an integer")


def last_number(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """The same for numbers with decimals: 1.0 if the last numbers of both are equal, else 0.0.

    They are compared exactly: "4.0" equals "4", and "0.333" does not equal "0.3333".

    Raises ValueError, naming the row, if an answer has no number.
    """
    return _equal(completions, answer, _final_number, "has no number")


def _equal(
    completions: Sequence[Completion], answer: Sequence[Any], read: Callable[[str], object], complaint: str = ""
) -> list[float | None]:
    """Whether `read` finds the same in both texts of a row. An answer in which it finds nothing (None) is an error."""
    scores: list[float | None] = []
    for row, (completion, written) in enumerate(zip(completions, answer, strict=True)):
        if written is None:
            scores.append(None)
            continue
        expected = read(str(written))
        if expected is None:
            raise ValueError(f"the answer of row {row} {complaint}: {str(written)[-60:]!r}")
        scores.append(float(read(text_of(completion)) == expected))
    return scores


def _final_integer(text: str) -> Decimal | None:
    number = _final_number(text)
    return number if number is not None and number == number.to_integral_value() else None


def _final_number(text: str) -> Decimal | None:
    """The last number of `text`; None if there is none."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    # Decimal is exact at any length, and int() refuses a few thousand digits, which a degenerate completion can hold.
    whole = last["whole"].replace(",", "") or "0"
    return Decimal(f"{'-' if last['sign'] else ''}{whole}.{last['fraction'] or ''}")
