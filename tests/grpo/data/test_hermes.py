"""Tools in chat templates: natively where a template proves that it knows them, otherwise in Hermes' form."""

import json
from typing import Any

import pytest
from dialects import CHATML, GEMMA, LLAMA3, QWEN3, SCHEMAS, SMOLLM2, dialect_tokenizer, template_of

from rankup.grpo.data.hermes import HEADING, ToolTemplate, call_as_text
from rankup.grpo.data.messages import BadRowError
from rankup.grpo.data.templates import ChatTemplate

USER = {"role": "user", "content": "2 + 3?"}
CALL = {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CALLED = {"role": "assistant", "content": "I add.", "tool_calls": [CALL, CALL]}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "5"}
CALL_TEXT = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def of(text: str, **kwargs: Any) -> ToolTemplate:
    return ToolTemplate(ChatTemplate(dialect_tokenizer(text), kwargs))


@pytest.mark.parametrize("text", [QWEN3, LLAMA3, template_of("qwen2_5"), template_of("gptoss"), template_of("glm4moe")])
def test_a_template_that_writes_schemas_calls_and_results_is_native(text: str):
    template = of(text)
    assert template.is_native
    assert template.render([USER], tools=SCHEMAS) == ChatTemplate(dialect_tokenizer(text), {}).render([USER], tools=SCHEMAS)


@pytest.mark.parametrize(
    "text",
    [
        CHATML,
        GEMMA,
        CHATML + "{# tools #}{% if tools is string %}{{ tools }}{% endif %}",  # names the variable and writes nothing
        "{{ tools }}" + CHATML,  # no calls
        QWEN3.replace("(tool | tojson)", "tool.function.name"),  # no description
        QWEN3.replace("{{ c.function.arguments | tojson }}", "{}"),  # no arguments
        QWEN3.replace("<tool_response>\n' + m.content", "<tool_response>\n'"),  # no results
    ],
)
def test_a_template_that_misses_one_of_them_is_not(text: str):
    assert text != QWEN3 and not of(text).is_native


def test_the_schemas_are_in_the_system_message_one_object_per_line():
    for messages, begin in (
        ([{"role": "system", "content": "Be brief."}, USER], f"<|im_start|>system\nBe brief.\n\n{HEADING}\n<tools>\n"),
        ([USER], f"<|im_start|>system\n{HEADING}\n<tools>\n"),
        ([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, USER], "<|im_start|>system\nBe brief.\n\n#"),
    ):
        text = of(SMOLLM2).render(messages, tools=SCHEMAS).text
        assert text.startswith(begin) and text.count("<|im_start|>system") == 1
        lines = text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
        assert [json.loads(line) for line in lines] == SCHEMAS
        assert text.endswith("</tool_call><|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_without_system_messages_has_them_before_the_first_question():
    text = of(GEMMA).render([USER, {"role": "assistant", "content": "5"}, USER], tools=SCHEMAS).text
    assert text.startswith(f"<s><start_of_turn>user\n{HEADING}") and text.count("<tools>\n") == 1
    assert "</tool_call>\n\n2 + 3?<end_of_turn>" in text
    with pytest.raises(BadRowError, match="is refused by the chat template: System role not supported"):
        of(GEMMA).render([{"role": "system", "content": "Be brief."}, USER], tools=SCHEMAS)


def test_calls_and_results_of_a_worked_dialogue_are_text():
    text = of(CHATML).render([USER, CALLED, RESULT, RESULT, USER], tools=SCHEMAS).text
    assert f"<|im_start|>assistant\nI add.\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n" in text
    bare = {**CALLED, "content": None, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]}
    assert f"assistant\n{CALL_TEXT}<|im_end|>" in of(CHATML).render([USER, bare, RESULT], tools=SCHEMAS).text


def test_results_are_one_user_message_where_the_role_tool_is_refused_lost_or_written_once():
    together = "<tool_response>\n5\n</tool_response>\n<tool_response>\n5\n</tool_response>"
    loses = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    for text in (GEMMA, loses, template_of("phi3"), template_of("deepseekv3")):
        rendered = of(text).render([USER, CALLED, RESULT, RESULT], tools=SCHEMAS).text
        assert rendered.count(together) == 1
        twice = of(text).render([USER, CALLED, RESULT, RESULT, CALLED, RESULT], tools=SCHEMAS).text
        assert twice.count("<tool_response>") == 3 and twice.count(together) == 1


def test_a_row_without_tools_and_calls_is_rendered_as_before():
    for text in (CHATML, GEMMA, QWEN3):
        assert of(text).render([USER], tools=None) == ChatTemplate(dialect_tokenizer(text), {}).render([USER])
        assert of(text).render([USER], tools=[]) == of(text).render([USER], tools=None)


def test_a_dialogue_that_ends_with_a_call_is_refused_whatever_the_template():
    for text in (CHATML, QWEN3):
        with pytest.raises(BadRowError, match="ends with a tool call: add its result"):
            of(text).render([USER, CALLED], tools=SCHEMAS)


def test_arguments_that_are_no_object_stay_what_they_are():
    for arguments in ("five", [1, 2], None, 7, "é🙂"):
        written = call_as_text({"function": {"name": "add", "arguments": arguments}})
        assert json.loads(written.removeprefix("<tool_call>").removesuffix("</tool_call>"))["arguments"] == arguments
    assert "é🙂" in call_as_text({"name": "add", "arguments": {"word": "é🙂"}})
