"""Built-in rewards that compare a completion's answer with the row's.

    rewards:
      functions: rankup.rewards.answers:last_integer

How numbers are read, in completions and in the `answer` column alike:

- thousands separators are part of the number: "1,234" is 1234;
- a full stop that ends a sentence is not: "12." is 12;
- a minus sign counts unless it joins two terms: "-5", "(-5)", "-$5" and "is -5" are minus five, "7-5" and "3 - 5" end
  in plain five;
- a decimal number is one number: "4.0" is the integer 4, and "12.5" is no integer (neither 12 nor 5).

The *last number* decides. "42, or rather 42.5" has no integer answer, though an integer stands in it.
"""

import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}]) [-\u2212] \$? )?                        # a minus (or the typographic one) after no operand
    (?P<whole> [0-9]{1,3} (?: ,[0-9]{3} )+ (?![0-9]) | [0-9]+ )     # 1,234,567 or 1234567
    (?: \. (?P<fraction> [0-9]+ ) )?
    """,
    re.VERBOSE,
)


def last_integer(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """1.0 where the last number of the completion is the integer that the row's answer ends with, else 0.0.

    completions: n strings, or n conversations, of which the last message counts.
    answer: n values: an int, a string such as "42" or "1,234", or a reference text that ends with the answer, as
    GSM8K's "... #### 1,234". A row whose answer is None gets None.

    Raises ValueError, naming the row, where an answer has no integer: no completion could ever be right.
    """
    return [_matches(row, *pair) for row, pair in enumerate(zip(completions, answer, strict=True))]


def _matches(row: int, completion: Any, answer: Any) -> float | None:
    if answer is None:
        return None
    expected = _final_integer(str(answer))
    if expected is None:
        raise ValueError(f"the answer of row {row} does not end with an integer: {str(answer)[-60:]!r}")
    text = completion if isinstance(completion, str) else completion[-1]["content"] or ""
    return float(_final_integer(text) == expected)


def _final_integer(text: str) -> str | None:
    """The last number of `text` as canonical digits; None where there is none, or where it has a fraction."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers or (numbers[-1]["fraction"] or "").strip("0"):
        return None
    last = numbers[-1]
    # Text instead of int(): Python refuses to convert a few thousand digits, which a degenerate completion can hold.
    digits = last["whole"].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if last["sign"] and digits != "0" else digits
