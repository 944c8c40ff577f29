"""What counts as a conversation, in which forms, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.grpo.data.messages import BadRowError, messages_in, read_prompt, read_template_kwargs, read_tools

QUESTION = [{"role": "user", "content": "What is 2+3?"}]
TALK = [
    {"role": "system", "content": 'Say "it\'s"'},
    *QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": None}}}]},
    {"role": "tool", "content": "5"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize("talk", [QUESTION, TALK])
@pytest.mark.parametrize("write", [json.dumps, repr, lambda talk: json.dumps(json.dumps(talk)), lambda talk: f" {talk!r}\n"])
def test_a_conversation_in_a_text_is_read_from_json_and_from_python(talk, write):
    assert read_prompt(write(talk)) == talk


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]", '{"a": 1}', "[]", "{}", "[", '["role"]', '"quoted"', '"a" or "b"?', "5", "null", "[x] is checked",
        '[{"a": 1}]', '[{"role": "admin", "name": "Bob"}]', "[{'a': 1}]", "{role}",
        "[{'role': 1, 'name': 2}, x]", '[{"role": "admin", "name": "B',
        '[{"role": "user", "content": "a"}] Which role is this?', '{"role": "admin"}', '{"messages": 5}',
        'Complete: [{"role": "user", "content": "', "array([1, 2])", '[{"from": "Oslo", "to": "Bergen"}]',
    ],
)  # fmt: skip
def test_other_texts_stay_texts_even_if_they_are_json(text):
    assert read_prompt(text) == text


@given(st.text() | st.builds(json.dumps, st.recursive(st.none() | st.integers() | st.text(), st.lists)))
def test_texts_that_hold_no_conversation_are_unchanged(text):
    assert read_prompt(text) == text


CONTENT = st.text(min_size=1)
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT}),
    min_size=1,
    max_size=4,
)


@given(CONVERSATIONS, st.sampled_from([json.dumps, repr, lambda talk: json.dumps(talk, ensure_ascii=False, indent=1)]))
def test_every_conversation_survives_a_table_of_text(talk, write):
    assert read_prompt(talk) == read_prompt(write(talk)) == talk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"role": "user", "content": "a"', "begins like a conversation, but it is neither JSON nor Python's notation"),
        ("[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]", "write the column as JSON"),
        ("array([{'content': 'a', 'role': 'user'}], dtype=object)", "write the column as JSON"),
        ('[{""role"": ""user"", ""content"": ""a""}]', "write the column as JSON"),
        ('{"role": "user", "content": "a"}', "holds one message: put it into a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "a mapping with a conversation: write only the list"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": null}]', r"has no content in message 1 \(user\)"),
        ('[{"role": "user", "content": "a"}, {"content": "b"}]', "is neither a text nor a conversation"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "has a part of type 'image'"),
        ('[{"from": "human", "value": "a"}]', "the keys from and value: call them role and content"),
    ],
)
def test_a_text_that_holds_messages_in_another_form_is_refused(text, message):
    with pytest.raises(BadRowError, match=message):
        messages_in(text)


def test_arrays_of_mappings_are_conversations():
    assert read_prompt(np.array(TALK, dtype=object)) == TALK


def test_fields_that_are_none_are_absent_but_not_what_arguments_hold():
    call = {"id": None, "function": {"name": "add", "arguments": {"b": None}, "strict": None}}
    (message,) = read_prompt([{"role": "assistant", "content": "x", "name": None, "tool_calls": [call]}])
    assert message == {
        "role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "add", "arguments": {"b": None}}}]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]},
         r"has a part of type 'image_url' in message 1 \(user\), and only text can be trained on"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "has a part of type 'input_audio'"),
        ({"role": "user", "content": [5]}, "has a part of type 'int'"),
        ({"role": "user", "content": None}, r"has no content in message 1 \(user\)"),
        ({"role": "user"}, r"has no content in message 1 \(user\)"),
        ({"role": "tool", "content": {"t": 5}}, r"has content of type dict in message 1 \(tool\): write text, JSON as text"),
        ({"role": "assistant"}, r"has no content in message 1 \(assistant\)"),
        ({"role": 5, "content": "x"}, "the role of message 1 is 5"),
        ({"role": "assistant", "tool_calls": "add"}, "has tool_calls in message 1 that are not a list of mappings"),
    ],
)  # fmt: skip
def test_a_message_that_cannot_be_trained_on_is_refused_by_its_place(message, error):
    with pytest.raises(BadRowError, match=error):
        read_prompt([*QUESTION, message])


def test_sharegpt_s_keys_are_named():
    with pytest.raises(BadRowError, match="its keys from and value must be called role and content"):
        read_prompt([{"from": "human", "value": "a"}])


def test_tools_and_variables_are_read_from_json_text_too():
    assert read_tools([TOOL]) == read_tools(json.dumps([TOOL])) == [TOOL]
    assert read_tools(None) is read_tools([]) is read_tools("") is read_tools("[]") is None
    assert read_template_kwargs({"a": 1}) == read_template_kwargs('{"a": 1}') == {"a": 1}
    assert read_template_kwargs(None) == read_template_kwargs("") == {}


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (read_tools, "hammer, saw", "has tools that are not JSON"),
        (read_tools, ["hammer"], "has tools that are not a list of schemas.*rename it if it is for reward functions only"),
        (read_tools, TOOL, "has tools that are not a list of schemas"),
        (read_template_kwargs, "[1]", "has chat_template_kwargs that are not a mapping"),
        (read_template_kwargs, "{", "has chat_template_kwargs that are not JSON"),
    ],
)
def test_other_tools_and_variables_are_refused(read, value, message):
    with pytest.raises(BadRowError, match=message):
        read(value)
