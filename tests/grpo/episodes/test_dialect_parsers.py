"""Tool calls in what models write, well-formed or not, in every form."""

import json
from typing import Any

import pytest
from dialects import CHATML, LLAMA3, QWEN3, SCHEMAS, dialect_tokenizer, ids, template_of
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import add_response_schema

from rankup.grpo.config import DataConfig
from rankup.grpo.episodes.dialect import Dialect
from rankup.grpo.episodes.parsers import Parsed, parser_named

TOKENIZER = dialect_tokenizer(CHATML)


def parsed(form: str, text: str, prefix: str = "") -> Parsed:
    return parser_named(form, TOKENIZER, SCHEMAS)(text, prefix=prefix)


def written(form: str, name: str, arguments: dict[str, Any]) -> str:
    """A call as this form has it."""
    if form == "hermes":
        return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)}\n</tool_call>'
    if form == "llama":
        return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


FORMS = ["hermes", "llama", "qwen_xml"]


@pytest.mark.parametrize("form", FORMS)
def test_several_calls_between_text_in_any_language(form: str):
    first, second = {"word": "的 é 🙂", "flag": True}, {"a": 1, "b": -2}
    text = f"Ich rechne 的 🙂.\n{written(form, 'look_up', first)}\n{written(form, 'add', second)}"
    found = parsed(form, text)
    assert [(call.name, call.arguments) for call in found.calls] == [("look_up", first), ("add", second)]
    assert [call.error for call in found.calls] == [None, None]
    assert found.content == "Ich rechne 的 🙂."
    behind = parsed(form, f"{written(form, 'add', second)} Fertig.")
    assert behind.content == "Fertig." and len(behind.calls) == 1
    assert parsed(form, written(form, "add", {})).calls[0].arguments == {}


@pytest.mark.parametrize("form", FORMS)
def test_a_text_without_calls_is_content_as_it_is(form: str):
    for text in ("", "\n Five. \n", "<tool_response>5</tool_response>", "{}", '{"answer": 5}', '{"name": "Ada", "age": 36}'):
        assert parsed(form, text) == Parsed(content=text)


@pytest.mark.parametrize("form", FORMS)
def test_thinking_is_no_place_for_calls(form: str):
    call = written(form, "add", {"a": 1})
    assert parsed(form, f"<think>\nI could write {call}.\n</think>\n\nFive.").calls == ()
    assert parsed(form, f"I could write {call}.\n</think>\n\nFive.", prefix="<|im_start|>assistant\n<think>\n").calls == ()
    assert parsed(form, f"<think>\nI could write {call}").calls == ()
    assert parsed(form, f"Hm <think>{call}</think> no.").calls == ()
    assert parsed(form, call, prefix="assistant\n<think>\n").calls == ()  # the thinking that the prompt opened goes on
    found = parsed(form, f"<think>\n{call}\n</think>\n\n{written(form, 'add', {'a': 2})}")
    assert [one.arguments for one in found.calls] == [{"a": 2}] and found.content.startswith("<think>")
    assert len(parsed(form, call, prefix="assistant\n<think>\n\n</think>\n\n").calls) == 1


@pytest.mark.parametrize("form", FORMS)
def test_marks_inside_of_an_argument_are_text(form: str):
    for value in ("<think>", "</think>", "a </tool_call> b", "<tool_call>", "{", '"', "\\", "}", "<parameter=x>"):
        found = parsed(form, written(form, "look_up", {"word": value}))
        assert [(call.arguments, call.error) for call in found.calls] == [({"word": value}, None)]


MALFORMED = {
    "hermes": {
        '<tool_call>{"arguments": {"a": 1}}</tool_call>': (None, "the call has no name"),
        '<tool_call>{"name": null, "arguments": {}}</tool_call>': (None, "the call has no name"),
        '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>': (None, "the name must be a text, not a list"),
        '<tool_call>{"name": "add"}</tool_call>': ("add", "the call has no arguments: write an object, {} if there are none"),
        '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>': ("add", "arguments must be an object with the names"),
        '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>': ("add", "not a text"),
        '<tool_call>{"name": "add", "arguments": true}</tool_call>': ("add", "not a truth value"),
        '<tool_call>{"name": "add", arguments: {}}</tool_call>': (None, "the call is not valid JSON: Expecting property name"),
        "<tool_call>add(1, 2)</tool_call>": (None, "the call is not valid JSON: Expecting value at character 0"),
        "<tool_call></tool_call>": (None, "the call is not valid JSON"),
        '<tool_call>["add", {"a": 1}]</tool_call>': (None, "the call must be one JSON object, not a list"),
        '<tool_call>[{"name": "add", "arguments": {}}]</tool_call>': (None, "the call must be one JSON object, not a list"),
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>': (None, "NaN is no JSON"),
        '<tool_call>{"name": "add", "arguments": {"a": "\\ud83d"}}</tool_call>': ("add", "half of a surrogate pair"),
        '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>': (None, "half of a surrogate pair"),
        '<tool_call>{"name": "add", "arguments": {}} {}</tool_call>': ("add", "more than one JSON value"),
        '<tool_call>{"name": "add", "arguments": {"a": 1': (None, "not valid JSON"),
        '<tool_call>{"name": "add", "arguments": {"a": 1}}': ("add", "the call is not complete: it has no '</tool_call>'"),
        "<tool_call>": (None, "the call is not complete"),
        "<tool_call>" + "[" * 100_000: (None, "not valid JSON"),
        f'<tool_call>{{"name": "add", "arguments": {{"a": {"1" * 5000}}}}}</tool_call>': (None, "not valid JSON"),
    },
    "llama": {
        '{"parameters": {"a": 1}}': (None, "the call has no name"),
        '{"name": "add"}': ("add", "the call has no parameters"),
        '{"name": "add", "parameters": [1, 2]}': ("add", "parameters must be an object with the names of the parameters"),
        '{"name": "add", "parameters": {"a": 1': (None, "not valid JSON"),
        '{"name": add}': (None, "not valid JSON"),
        "<|python_tag|>": (None, "not valid JSON"),
        '<|python_tag|>add.call(a="1")': (None, "not valid JSON"),
        "<|python_tag|>[1]": (None, "the call must be one JSON object, not a list"),
    },
    "qwen_xml": {
        "<tool_call>\n<function=>\n</function>\n</tool_call>": (None, "the call has no name"),
        "<tool_call>\n</tool_call>": (None, "the call has no <function=name>"),
        '<tool_call>\n{"name": "add"}\n</tool_call>': (None, "the call has no <function=name>"),
        "<tool_call>\n<function=add>\n<parameter=a>\n1": ("add", "its parameters must be"),
        "<tool_call>\n<function=add>\n1, 2\n</function>\n</tool_call>": ("add", "its parameters must be"),
        "<function=add>\n<parameter=a>1</parameter>": ("add", "its parameters must be"),
        "<function=add": (None, "the call has no <function=name>"),
    },
}


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, texts in MALFORMED.items() for text in texts])
def test_check_11_a_malformed_call_is_one_error(form: str, text: str):
    name, error = MALFORMED[form][text]
    found = parsed(form, f"I try.\n{text}")
    assert len(found.calls) == 1 and found.content == "I try."
    assert found.calls[0].name == name and error in str(found.calls[0].error)


def test_check_11_a_good_call_beside_a_malformed_one_is_read():
    good = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    found = parsed("hermes", f"{good}\n<tool_call>\nadd\n</tool_call>\n{good}")
    assert [call.error is None for call in found.calls] == [True, False, True]


MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "<function=add>", "</function>"]
PARTS = ['{"name": "add", "arguments": {"a": 1}}', '{"name": ', "{", "}", "<parameter=a>", "</parameter>", '"parameters": ']
ANYTHING = st.lists(st.sampled_from([*MARKS, *PARTS, ";", "\n", "[", "é🙂"]) | st.text(max_size=5), max_size=12).map("".join)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=150)
@given(text=ANYTHING, prefix=st.sampled_from(["", "<think>\n"]))
def test_whatever_a_model_writes_is_no_exception(form: str, text: str, prefix: str):
    found = parsed(form, text, prefix)
    good = [call for call in found.calls if call.error is None]
    assert all(call.name and isinstance(call.arguments, dict) for call in good)
    assert found.calls or found.content == text
    json.dumps([call.name for call in found.calls], ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------------------ each form


def test_llama_s_calls_with_a_tag_a_separator_or_other_keys():
    for text in (
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}',
        '{"type": "function", "name": "add", "parameters": {"a": 1}};{"name": "add", "arguments": {"a": 2}}',
        '{"name": "add", "parameters": {"a": 1}}\n{"parameters": {"a": 2}, "name": "add"}',
    ):
        found = parsed("llama", text)
        assert [(call.name, call.arguments) for call in found.calls] == [("add", {"a": 1}), ("add", {"a": 2})]
        assert found.content == ""


def test_values_of_xml_parameters_have_the_types_of_the_schema():
    def value(name: str, key: str, text: str) -> Any:
        call = f"<function={name}>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
        return parsed("qwen_xml", call).calls[0].arguments[key]

    assert value("look_up", "word", "12") == "12" and value("add", "a", "12") == 12
    assert value("look_up", "flag", "true") is True and value("look_up", "flag", "yes") == "yes"
    assert value("add", "other", '{"x": [1]}') == {"x": [1]} and value("nothing", "a", "1") == 1
    assert value("look_up", "word", "two\n\nlines\n") == "two\n\nlines\n"
    assert value("look_up", "word", "") == "" and value("add", "a", "NaN") == "NaN"


def test_xml_calls_without_the_outer_tag():
    found = parsed("qwen_xml", "Well. <function=add><parameter=a>1</parameter></function>")
    assert found.calls[0].arguments == {"a": 1} and found.content == "Well."


# ------------------------------------------------------------------------------------------------------------ dialects


def dialect(template: str, parser: str | None = None, *, eos: str | None = None, plain: tuple[str, ...] = (), **options: Any):
    tokenizer = dialect_tokenizer(template, eos=eos, plain=plain)
    if options.pop("response", False):
        add_response_schema(tokenizer)
    return tokenizer, Dialect(tokenizer, DataConfig(), schemas=SCHEMAS, responds=False, tool_parser=parser, **options)


def test_the_parser_is_the_first_that_reads_what_the_template_writes():
    expected = {
        QWEN3: "hermes", LLAMA3: "llama", CHATML: "hermes",
        template_of("qwen3_5_think"): "qwen_xml", template_of("nemotron_3_nano"): "qwen_xml",
    }  # fmt: skip
    assert {template: dialect(template)[1].parser_name for template in expected} == expected
    assert dialect(template_of("qwen3"), response=True)[1].parser_name == "response_template"
    assert dialect(template_of("qwen3"), "hermes", response=True)[1].parser_name == "hermes"


@pytest.mark.parametrize("kind", ["special", "plain", "text"])
def test_markers_of_calls_may_be_tokens_of_any_kind(kind: str):
    plain = ("<tool_call>", "</tool_call>", "<think>", "</think>") if kind == "plain" else ()
    tokenizer = dialect_tokenizer(QWEN3, plain=plain)
    if kind == "special":
        tokenizer.add_special_tokens({"extra_special_tokens": ["<tool_call>", "</tool_call>"]})
    made = Dialect(tokenizer, DataConfig(), schemas=SCHEMAS, responds=False, tool_parser=None)
    turn = ids(tokenizer, f"Well.\n{written('hermes', 'add', {'a': 1})}")
    reply = made.parse(turn)
    assert reply.calls[0].arguments == {"a": 1} and reply.message["content"] == "Well."
    assert (tokenizer.convert_tokens_to_ids("<tool_call>") in turn) == (kind != "text")


def test_thinking_that_the_prompt_or_a_bridge_has_begun_is_known_from_the_ids_before():
    tokenizer, made = dialect(template_of("qwen3_5_think"), eos="<|im_end|>")
    call = written("qwen_xml", "add", {"a": 1})
    prompt = ids(tokenizer, "<|im_start|>user\nWrite <think>.<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert made.parse(ids(tokenizer, call), before=prompt).calls == ()
    reply = made.parse(ids(tokenizer, f"Hm.\n</think>\n\n{call}"), before=prompt)
    assert len(reply.calls) == 1
    held = [*prompt, *made.bridge(reply, reply.results(["x"]))]
    assert made.parse(ids(tokenizer, call), before=held).calls == ()
    without = ids(tokenizer, "<|im_start|>user\nWrite <think>.<|im_end|>\n<|im_start|>assistant\n")
    assert len(made.parse(ids(tokenizer, call), before=without).calls) == 1


def test_the_content_of_a_turn_without_calls_is_its_text_without_special_tokens():
    tokenizer, made = dialect(QWEN3, eos="<|im_end|>")
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<pad>"])
    for text in ("Five.", " <think>\nHm.\n</think>\n\nFünf 🙂\n", ""):
        turn = ids(tokenizer, text)
        assert made.parse([*turn, end]).message == {"role": "assistant", "content": text}
        assert made.parse([*turn[:3], pad, *turn[3:], end]).message["content"] == text
    assert made.parse([]).message["content"] == ""


RESPONSE = {
    "qwen3": written("hermes", "add", {"a": 1}),
    "qwen3_5_nothink": written("qwen_xml", "add", {"a": 1}),
    "llama3_1": written("llama", "add", {"a": 1}),
    "gptoss": ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}',
    "gemma4_v5": "<|tool_call>call:add{a:1}<tool_call|>",
    "lfm2_2_5": "<|tool_call_start|>[add(a=1)]<|tool_call_end|>",
}


@pytest.mark.parametrize("name", RESPONSE)
def test_a_response_template_reads_calls_and_begun_ones_are_malformed(name: str):
    tokenizer, made = dialect(template_of(name), response=True)
    assert made.parser_name == "response_template"
    before = ids(tokenizer, _prompt(tokenizer))
    text = RESPONSE[name]
    reply = made.parse(ids(tokenizer, text), before=before)
    assert [(call.name, call.arguments, call.error) for call in reply.calls] == [("add", {"a": 1}, None)]
    assert made.parse(ids(tokenizer, "Five."), before=before).calls == ()
    begun = text[: text.rindex("1")] + "1"
    reply = made.parse(ids(tokenizer, begun), before=before)
    assert len(reply.calls) == 1 and reply.calls[0].error
    assert made.bridge(reply, reply.results([reply.calls[0].error]))


def _prompt(tokenizer: Any) -> str:
    messages = [{"role": "user", "content": "2 + 3?"}]
    return tokenizer.apply_chat_template(messages, tools=SCHEMAS, tokenize=False, add_generation_prompt=True)


def test_a_response_template_gives_the_reasoning():
    tokenizer, made = dialect(template_of("qwen3"), response=True)
    before = ids(tokenizer, _prompt(tokenizer))
    reply = made.parse(ids(tokenizer, f"<think>\nHm.\n</think>\n\nWell.\n{RESPONSE['qwen3']}"), before=before)
    assert (reply.message["reasoning_content"], reply.message["content"]) == ("Hm.", "Well.") and len(reply.calls) == 1
    inside = made.parse(ids(tokenizer, f"<think>\n{RESPONSE['qwen3']}"), before=before)
    assert inside.calls == ()


def test_a_response_template_makes_one_error_of_a_turn_with_a_call_that_is_no_json():
    tokenizer, made = dialect(template_of("qwen3"), response=True)
    text = f"{RESPONSE['qwen3']}\n<tool_call>\n{{bad}}\n</tool_call>"
    reply = made.parse(ids(tokenizer, text), before=ids(tokenizer, _prompt(tokenizer)))
    assert len(reply.calls) == 1 and "does not parse" in str(reply.calls[0].error)


# ---------------------------------------------------------------------------------------------------------------- vLLM


@pytest.mark.slow
def test_a_parser_of_vllm_by_its_name():
    pytest.importorskip("vllm")
    tokenizer, made = dialect(template_of("glm4moe_training"), "glm45", plain=GLM)
    assert made.parser_name == "glm45"
    call = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    reply = made.parse(ids(tokenizer, f"\n<think>{call}</think>\n{call}"))
    assert [(one.id, one.name, one.arguments, one.error) for one in reply.calls] == [("call00000", "add", {"a": 1}, None)]
    begun = made.parse(ids(tokenizer, call.removesuffix("</tool_call>")))
    assert len(begun.calls) == 1 and "is not complete" in str(begun.calls[0].error)
    assert made.parse(ids(tokenizer, "Five.")).calls == ()
    assert made.parse(ids(tokenizer, "<think>A <tool_call>?</think>Five.")).calls == ()
    with pytest.raises(ValueError, match=r"^rollout.tool_parser=nothing: there is no parser 'nothing': there are .*glm45"):
        dialect(QWEN3, "nothing")


GLM = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>", "</think>")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("form", ["hermes", "llama"])
def test_a_number_that_is_no_json_is_an_error_and_not_infinite(form: str, number: str):
    """Python reads 1e999 as infinity, which no JSON file of completions could hold."""
    text = written(form, "add", {"a": 1}).replace("1", number)
    (call,) = parsed(form, text).calls
    assert call.error is not None and number.lstrip("-") in call.error


def test_parsers_of_others_give_no_infinite_numbers():
    from rankup.grpo.episodes.model_parsers import _call_in

    for number in ("1e999", "NaN", "-Infinity"):
        call = _call_in({"function": {"name": "add", "arguments": f'{{"a": [{number}]}}'}})
        assert call.error is not None and "no JSON" in call.error
    assert _call_in({"function": {"name": "add", "arguments": {"a": float("nan")}}}).error is not None
    assert _call_in({"function": {"name": "add", "arguments": '{"a": [1e300]}'}}).error is None


def test_a_call_in_openais_form_is_an_error_for_llama_and_not_an_answer():
    text = '{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}'
    (call,) = parsed("llama", text).calls
    assert call.error == "the call has no name"
