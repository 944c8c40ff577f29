"""JSON that gives back what it was given."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.grpo.common.exact_json import decode, encode

KEYS = st.text(max_size=3) | st.integers() | st.booleans() | st.none() | st.sampled_from(["$rankup.dict", "$rankup.bytes"])
NUMBERS = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.decimals(allow_nan=False)
VALUES = st.recursive(
    st.none() | NUMBERS | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


@given(VALUES)
def test_values_come_back_with_their_types(value: Any):
    assert repr(decode(encode(value))) == repr(value)


def test_ordinary_values_are_ordinary_json():
    assert encode({"a": [1, "x", None, 1.0, True]}) == '{"a": [1, "x", null, 1.0, true]}'
    assert decode(encode((1, {(2, "a"): Decimal("1.50")}))) == [1, {(2, "a"): Decimal("1.50")}]


@pytest.mark.parametrize("value", ["\ud800", "\u2028", "\0", "é"])
def test_every_text_comes_back(value: str):
    assert decode(encode([value])) == [value]


def test_other_values_are_what_the_caller_says():
    assert encode([{1}], default=lambda value: type(value).__name__) == '["set"]'
    assert encode({1}) == '"{1}"'


def test_tuples_in_keys_come_back_at_every_depth():
    value = {(1, (2, (b"x", None))): [{(): True}]}
    assert decode(encode(value)) == value
