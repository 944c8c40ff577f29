r"""Numbers as people and language models write them, read exactly.

    last_number_in("So it costs $1,234.50.")        # Fraction(2469, 2)
    last_number_in(r"\boxed{9{,}500}")              # Fraction(9500, 1)
    last_number_in("between 12,5 and 13,5")         # None: 13.5, or a list that ends with 5?
    number_of("1e-05"), number_of("1e-05 m")        # Fraction(1, 100000), None

- Digits are grouped in threes by commas (`1,234`, in LaTeX `1{,}234`), by single spaces of any width (`9 500`, `9\,500`), by
  apostrophes (`1'234`) or underscores (`1_234`). A point is the decimal sign, also in `1.234`. `1.234,50` and `1.234.567` can
  only be continental: there points group, and a comma is the decimal sign.
- `1e-05`, `1.5E3`, `1.5 \times 10^{3}`, `10^3`, `2^5`, `3/4`, `\frac{3}{4}`, `2 1/2` and `2½` are one number each.
- A minus (`-` or a typographic one) counts unless it joins two terms: "-5", "(-5)", "-$5" and "is -5" are minus five, "7-5" and
  "3 - 5" end with plain five.
- A full stop that ends a sentence, percent signs, currencies, units and words are not part of a number: "5%" and "$5 million"
  are 5.
- What may be several numbers is none: `12,5`, versions (`1.2.3`), times and ratios (`12:30`), dates (`5/12/2024`), `±5`, and
  numbers inside of a root or of a fraction of formulas. `1,2,3` is a list, whose last number is 3.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from decimal import Decimal
from fractions import Fraction

LARGEST_EXPONENT = 10_000
"""Numbers with larger powers of ten are none: a completion must not use up the memory."""

_MINUS = "[-\u2010\u2212\u2013\ufe63\uff0d]"
_SPACE = r"(?:[\u0020\u00a0\u2000-\u200a\u202f\u205f]|\\[,;:!\u0020])"
_COMMA = r"(?:,|\{,\}|\\text\{,\}|,\\!|\{,\\!\})"
_SIGNED = rf"(?:{_MINUS}|\+)?[0-9]+"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_EXPONENT = rf"(?:[ ]?\^[ ]?(?:\{{[ ]?{_SIGNED}[ ]?\}}|\({_SIGNED}\)|{_SIGNED})|\*\*(?:\({_SIGNED}\)|{_SIGNED})|[⁻⁰¹²³⁴-⁹]+)"

_NUMBER = re.compile(
    rf"""
    (?= [-\u2010\u2212\u2013\ufe63\uff0d.0-9\\¼-¾⅐-⅞] )                      # for speed only: most characters start no number
    (?P<sign>
        (?: (?<![^\W_])(?<![)\]}}]) {_MINUS} | (?: (?<=[=(:\[{{]) | (?<=[=(:\[{{][ ]) ) {_MINUS} [ ] )
        (?: \\?[$€£¥₹] [ ]? )?
    )?
    (?:
        (?P<whole> [0-9]+ [ ]? )? \\[dtc]?frac [ ]?
        (?: \{{ [ ]? (?P<top> {_SIGNED} ) [ ]? \}} | (?P<top_digit> [0-9] ) ) [ ]?
        (?: \{{ [ ]? (?P<bottom> {_SIGNED} ) [ ]? \}} | (?P<bottom_digit> [0-9] ) )
      | (?P<mixed> [0-9]+ ) [ ] (?P<part> [0-9]{{1,3}} ) [ ]? [/⁄] [ ]? (?P<parts> [0-9]{{1,4}} ) (?![0-9])
      | (?P<digits>
            (?<![0-9]) [0-9]{{1,3}} (?: {_SPACE} [0-9]{{3}} )+ (?![0-9]) (?: [.,] [0-9]+ )?
          | [0-9]+ (?: (?: [.'’_] | {_COMMA} ) [0-9]+ )*
          | (?<![\w.]) \. [0-9]+
        )
        (?P<e> [eE] [-+\u2212]? [0-9]+ (?!\w) )?
        (?: [ ]? (?: \\times | \\cdot | [×·⋅x*] ) [ ]? 10 (?P<scientific> {_EXPONENT} ) )?
        (?P<power> {_EXPONENT} )?
        (?P<vulgar> [ ]? [¼-¾⅐-⅞] )?
        (?: [ ]? [/⁄] [ ]? (?P<divisor> [0-9]+ (?: \. [0-9]+ )? ) (?! [.]?[0-9] ) )?
      | (?P<only_vulgar> [¼-¾⅐-⅞] )
    )
    """,
    re.VERBOSE,
)

_BEFORE = re.compile(  # what the number that follows is only a part of
    r"""(?: [0-9] (?: [:/⁄] | [ ][/⁄][ ] ) | [±∓] | \\(?:pm|mp) [ ]? | √ [ ]? | (?: \^ [ ]? | [\w)\]}]\*\* ) [{(]?
      | 0[xX][0-9A-Fa-f]*
      | \\ (?: sqrt (?:\[[^\]]*\])? | [dtc]?frac (?: [ ]?\{[^{}]*\} )? ) [ ]? \{ [^{}]* ) \Z""",
    re.VERBOSE,
)
_AFTER = re.compile(r"[/:⁄][0-9] | [ ]? (?: π | \\pi\b )", re.VERBOSE)

_DECIMAL = r"(?:\.(?P<fraction>[0-9]+))?"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?P<integer>[0-9]*){_DECIMAL}",
        rf"(?P<integer>[0-9]{{1,3}}(?:{_COMMA}[0-9]{{3}})+){_DECIMAL}",
        rf"(?P<integer>[0-9]{{1,3}}(?:{_SPACE}[0-9]{{3}})+)(?:[.,](?P<fraction>[0-9]+))?",
        rf"(?P<integer>[0-9]{{1,3}}(?:['’][0-9]{{3}})+){_DECIMAL}",
        rf"(?P<integer>[0-9]{{1,3}}(?:_[0-9]{{3}})+){_DECIMAL}",
        r"(?P<integer>[0-9]{1,3}(?:\.[0-9]{3})+),(?P<fraction>[0-9]+)",
        r"(?P<integer>[0-9]{1,3}(?:\.[0-9]{3}){2,})",
    )
)
_LIST = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:,[0-9]+(?:\.[0-9]+)?)+")


def last_number_in(text: str) -> Fraction | None:
    """The last number of a text; None if there is none, or if it is a part of something that is no number."""
    found = deque(_NUMBER.finditer(text), maxlen=1)
    last = found[0] if found else None
    if last is None or _BEFORE.search(text, max(0, last.start() - 100), last.start()) or _AFTER.match(text, last.end()):
        return None
    return _value(last)


def number_of(text: str) -> Fraction | None:
    """The number that a text consists of, apart from white space around it and a sign; None if it is anything else."""
    text = text.strip().removeprefix("+")
    match = _NUMBER.fullmatch(text)
    return None if match is None else _value(match)


def number_text(number: Fraction) -> str:
    """The number as text, the same for every way to write it: "42", "2.5", "1/3"; very large ones in hexadecimal."""
    if max(abs(number.numerator).bit_length(), number.denominator.bit_length()) > 4096:  # Python refuses to write such decimals
        return f"{number.numerator:#x}/{number.denominator:#x}"
    decimal = Decimal(number.numerator) / Decimal(number.denominator)
    return f"{decimal:f}" if number.denominator > 1 and Fraction(decimal) == number else str(number)


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of what `_NUMBER` matched; None if it is ambiguous or out of bounds."""
    sign = -1 if match["sign"] else 1
    if (top := match["top"] or match["top_digit"]) is not None:
        value = _ratio(_signed(top), _signed(match["bottom"] or match["bottom_digit"]))
        return None if value is None else sign * (value + _signed(match["whole"] or "0"))
    if match["mixed"] is not None:
        part, parts = int(match["part"]), int(match["parts"])
        return sign * (_signed(match["mixed"]) + Fraction(part, parts)) if part < parts else None
    if match["only_vulgar"] is not None:
        return sign * _vulgar(match["only_vulgar"])
    value = _with_exponents(_decimal(match["digits"]), match)
    if value is not None and match["vulgar"]:
        value += _vulgar(match["vulgar"].strip())
    if value is not None and match["divisor"]:
        value = _ratio(value, Fraction(Decimal(match["divisor"])))
    return None if value is None else sign * value


def _with_exponents(value: Fraction | None, match: re.Match[str]) -> Fraction | None:
    """The value times powers of ten, and to a power; None if it is out of bounds."""
    exponent = _exponent(match["e"]) + _exponent(match["scientific"])
    power = _exponent(match["power"]) if match["power"] else 1
    if value is None or abs(exponent) > LARGEST_EXPONENT or (value == 0 and power < 0):
        return None
    bits = value.numerator.bit_length() + value.denominator.bit_length()
    if power != 1 and abs(power) * bits > 4 * LARGEST_EXPONENT:
        return None
    return value * Fraction(10) ** exponent if power == 1 else value**power


def _decimal(digits: str) -> Fraction | None:
    """The value of digits with separators; None if they may mean several numbers."""
    for form in _FORMS:
        if match := form.fullmatch(digits):
            integer = re.sub(r"[^0-9]", "", match["integer"])
            return Fraction(Decimal(f"{integer or 0}.{match.groupdict().get('fraction') or 0}"))
    items = digits.split(",")
    is_list = _LIST.fullmatch(digits) is not None and (len(items) > 2 or "." in digits)
    is_list = is_list and all(len(item.partition(".")[0]) != 3 for item in items[1:])  # 1,23,456 is a number in India
    return Fraction(Decimal(items[-1])) if is_list else None


def _exponent(text: str | None) -> int:
    """Of `e-05`, `^{3}`, `**3`, `^(-3)` or `³`, at most just out of bounds; 0 if there is none."""
    if not text:
        return 0
    exponent = _signed(re.sub(r"[eE\s^*{}()]", "", text.translate(_SUPERSCRIPTS)))
    return int(max(-LARGEST_EXPONENT - 1, min(exponent, LARGEST_EXPONENT + 1)))


def _signed(text: str) -> Fraction:
    """An integer with or without a sign. Decimal is exact at any length; int() refuses a few thousand digits."""
    digits = re.sub(rf"\A(?:{_MINUS}|\+)", "", text.strip())
    number = Fraction(Decimal(digits))
    return -number if len(digits) < len(text.strip()) and not text.strip().startswith("+") else number


def _ratio(top: Fraction, bottom: Fraction) -> Fraction | None:
    return top / bottom if bottom else None


def _vulgar(character: str) -> Fraction:
    return Fraction(unicodedata.numeric(character)).limit_denominator(10)
