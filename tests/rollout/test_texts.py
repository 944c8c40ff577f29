"""The texts that reward functions see: special tokens and stop strings, in and out of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from rankup.rollout.config import SamplingConfig
from rankup.rollout.texts import Texts, special_tokens

TOKENIZER = tiny_tokenizer()
PAD, BOS, EOS, UNK = range(4)
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<think>"]})
TOKENIZER.add_tokens(["<plain>"])
THINK, PLAIN = TOKENIZER.convert_tokens_to_ids(["<think>", "<plain>"])


def texts(**options: Any) -> Texts:
    return Texts(TOKENIZER, SamplingConfig(**options))


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_added_special_tokens_are_special_and_plain_ones_are_not() -> None:
    assert special_tokens(TOKENIZER) == {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": UNK, "<think>": THINK}


def test_special_tokens_are_left_out_unless_they_are_wanted() -> None:
    sampled = [THINK, *ids("a"), PLAIN]
    assert texts().decode(sampled) == "a<plain>"
    assert texts(skip_special_tokens=False).decode(sampled) == "<think>a<plain>"


def test_a_stop_string_that_is_a_special_token_is_a_stop_token_too() -> None:
    found = texts(stop=["<think>", "<plain>", "x", "<eos>"], generation_kwargs={"stop_token_ids": [9, EOS]})
    assert found.stop_token_ids == [THINK, EOS, 9]
    assert found.stop_strings == ["<think>", "<plain>", "x", "<eos>"], "the model may also spell it out"
    assert texts().stop_token_ids == []


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("includes", "expected"), [(False, "ab"), (True, "ab<think>")])
def test_the_stop_string_is_in_the_text_only_if_it_is_wanted(skip: bool, includes: bool, expected: str) -> None:
    options = {"skip_special_tokens": skip, "include_stop_str_in_output": includes}
    assert texts(stop=["<think>"], **options).ended_by_token([*ids("ab"), THINK]) == expected
    assert texts(stop=["<think>"], **options).first_stop(ids("abc")) is None


def test_the_end_of_sequence_is_no_text_unless_all_is_wanted() -> None:
    sampled = [*ids("ab"), EOS]
    assert texts().ended_by_token(sampled) == "ab"
    assert texts(skip_special_tokens=False).ended_by_token(sampled) == "ab"
    assert texts(include_stop_str_in_output=True).ended_by_token(sampled) == "ab"
    assert texts(include_stop_str_in_output=True, skip_special_tokens=False).ended_by_token(sampled) == "ab<eos>"
    assert texts(include_stop_str_in_output=True, stop="<eos>").ended_by_token(sampled) == "ab<eos>"


def test_a_stop_string_inside_of_a_shown_special_token_ends_the_text_as_with_vllm() -> None:
    options: dict[str, Any] = {"skip_special_tokens": False, "stop": ["e", "<unk>"]}
    assert texts(**options, include_stop_str_in_output=True).ended_by_token([*ids("ab"), EOS]) == "ab<e"
    assert texts(**options).ended_by_token([*ids("ab"), EOS]) == "ab"


@pytest.mark.parametrize(("includes", "expected"), [(False, "a"), (True, "a</b>")])
def test_the_text_ends_at_the_first_stop_string(includes: bool, expected: str) -> None:
    found = texts(stop=["</bc", "</b>", "<", "c"][:2], include_stop_str_in_output=includes)
    assert found.first_stop(ids("a</b></bc")) == expected
    assert found.ended_by_string(ids("</b>a</b>"), "</b>") == f"</b>{expected}", "the newest one counts"
    assert found.ended_by_string(ids("ab"), "</b>") is None


@given(before=st.text(max_size=8), after=st.text(max_size=8), stop=st.text(min_size=1, max_size=4))
def test_what_is_cut_off_and_what_is_kept_are_the_whole_text(before: str, after: str, stop: str) -> None:
    sampled = ids(before + stop + after)
    text = texts().decode(sampled)
    at = text.find(stop)
    if at < 0:  # the tokenizer reads a special token across the parts
        return
    assert texts(stop=[stop]).first_stop(sampled) == text[:at]
    assert texts(stop=[stop], include_stop_str_in_output=True).first_stop(sampled) == text[:at] + stop
