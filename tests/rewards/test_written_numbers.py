"""Numbers as people and models write them: read as the number that is written, or not at all."""

import json
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.rewards.written_numbers import last_number_in, number_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{9{,}500}", "9500"),
        (r"\boxed{9\,500}", "9500"),
        (r"$9\ 500$", "9500"),
        (r"1{,}234{,}567.5", "1234567.5"),
        ("9 500", "9500"),
        ("9\u00a0500", "9500"),
        ("9\u202f500 km", "9500"),
        ("It is 9\u2009500\u2009000.", "9500000"),
        ("9 500,25", "9500.25"),
        ("9 500.25", "9500.25"),
        ("In 2019 500 people", "500"),
        ("1'234'567.5", "1234567.5"),
        ("1\u2019234", "1234"),
        ("1_000_000", "1000000"),
        ("1.234", "1.234"),
        ("1.234,50", "1234.5"),
        ("1.234.567", "1234567"),
        ("1.234.567,891", "1234567.891"),
        ("1e-05", "1/100000"),
        ("1.5E3", "1500"),
        ("2.5e+2 kg", "250"),
        ("-1e-3.", "-1/1000"),
        (r"1.5 \times 10^{3}", "1500"),
        (r"1.5\times10^{-3}", "3/2000"),
        ("1.5 × 10^3", "1500"),
        ("1.5*10**3", "1500"),
        ("6.02 x 10^23", "602000000000000000000000"),
        ("3 × 10⁻²", "3/100"),
        ("10^3", "1000"),
        ("10³", "1000"),
        ("2^5", "32"),
        ("2^{-1}", "1/2"),
        ("-2^2", "-4"),
        ("3/4", "3/4"),
        ("-3 / 4", "-3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"\frac34", "3/4"),
        (r"2\frac{1}{2}", "5/2"),
        (r"\frac{1234567890123}{2}", "1234567890123/2"),
        ("2 1/2 cups", "5/2"),
        ("½", "1/2"),
        ("2½", "5/2"),
        ("about 1 ⅓ cups", "4/3"),
        ("\u22125", "-5"),
        ("\u20135", "-5"),
        ("-€5", "-5"),
        (r"-\$5", "-5"),
        ("$-5", "-5"),
        ("x = - 5", "-5"),
        ("__-5__", "-5"),
        ("5 - 3 = \u22122", "-2"),
        ("+5", "5"),
        ("007", "7"),
        ("12.", "12"),
        (r"50\%", "50"),
        ("5 million", "5"),
        ("**42**", "42"),
        ("1. **5**\n2. **7**", "7"),
        ("The values:\n- 3\n- 5", "5"),
        ("Step 3: 42", "42"),
        ("(3, 4)", "4"),
        ("1.5,2.5", "2.5"),
        ("3.14...", "3.14"),
    ],
)
def test_a_number_is_read_as_it_is_written(text: str, number: str):
    assert last_number_in(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        "12,5",
        "1,2345",
        "12345,678",
        "1,23,456",
        "1.2.3",
        "192.168.1.10",
        "12:30",
        "3:4",
        "5/12/2024",
        "1/2/3",
        "1/0",
        r"\frac{1}{0}",
        r"\frac{x}{4}",
        r"\frac{4}{x}",
        r"\frac{2x}{4}",
        r"\sqrt{4}",
        r"\sqrt[3]{8}",
        "√2",
        r"2\pi",
        "3π",
        "±5",
        r"\pm 5",
        "x^2",
        "x**2",
        "e^{3}",
        "0x1F",
        "1e999999999",
        "9^99999999",
        "0^{-1}",
        "10 12/5",
        "5'10",
        "no number",
        "",
    ],
)
def test_what_may_be_another_number_is_none(text: str):
    assert last_number_in(text) is None


def test_only_a_complete_number_is_one():
    assert number_of(" -1,234.50\n") == Fraction("-1234.5") and number_of("+3") == 3 and number_of("3.") is None
    assert number_of("5%") is None and number_of("is 5") is None and number_of("5 6") is None


INTEGERS = st.integers() | st.integers(-(10**40), 10**40)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
AROUND = st.sampled_from(["{}", " {}.", "It is {}!", "= {}\n", r"\boxed{{{}}}", "**{}**", "${}$", "({})"])


@given(INTEGERS, AROUND)
def test_integers_are_read_back(number: int, around: str):
    for text in (
        str(number),
        repr(number),
        json.dumps(number),
        f"{number:,}",
        f"{number:_}",
        f"{number:+}",
        f"{number:,}".replace(",", "{,}"),
    ):
        assert last_number_in(around.format(text)) == number
        assert number_of(text) == number


@given(FLOATS, AROUND)
def test_floats_are_read_back(number: float, around: str):
    for text in (
        str(number),
        json.dumps(number),
        f"{number:,}",
        f"{number:.17g}",
        f"{number:.17e}",
        f"{number:.3E}",
        f"{number:,.2f}",
    ):
        read = last_number_in(around.format(text))
        assert read == Fraction(Decimal(text.replace(",", ""))) == number_of(text)


@given(st.decimals(allow_nan=False, allow_infinity=False), st.fractions())
def test_decimals_and_fractions_are_read_back(decimal: Decimal, fraction: Fraction):
    for text in (str(decimal), f"{decimal:f}"):
        assert last_number_in(text) == Fraction(decimal) == number_of(text)
    assert last_number_in(str(fraction)) == fraction


@given(
    st.integers(1, 10**30),
    st.sampled_from([" ", "\u00a0", "\u202f", "\u2009", r"\,", "'", "{,}"]),
    st.sampled_from(["", ",5", ".5"]),
)
def test_groups_of_all_kinds_are_read_back(number: int, space: str, decimals: str):
    if decimals == ",5" and space in ("'", "{,}"):
        decimals = ".5"
    if number < 1000 and decimals == ",5":
        return
    text = f"{number:,}".replace(",", space) + decimals
    assert last_number_in(f"x is {text} m") == number + (Fraction(1, 2) if decimals else 0)


@given(st.text(alphabet="0123456789.,eE+-^/\\{}'_ ×frac½π$:=x", max_size=40))
def test_any_text_is_read_without_an_error_and_a_complete_number_like_the_last_one(text: str):
    complete = number_of(text)
    last = last_number_in(text)
    assert complete is None or last is None or complete == last


@pytest.mark.parametrize(
    "text", ["1" * 50_000, "1 234" * 10_000, "1,234" * 10_000, r"\frac{" * 10_000, "1 " * 20_000, "-" * 50_000, "1/" * 20_000]
)
def test_long_texts_take_no_long_time(text: str):
    started = time.perf_counter()
    last_number_in(text)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("space", [*" \u00a0\u202f\u205f", *map(chr, range(0x2000, 0x200B))])
def test_single_spaces_of_any_width_group_digits(space: str):
    assert last_number_in(f"It is 1{space}234.") == 1234
