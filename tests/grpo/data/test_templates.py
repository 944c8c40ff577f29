"""Conversations in the chat templates of many models: each gets the form that it takes, and nothing is lost silently."""

from pathlib import Path
from typing import Any

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from rankup.grpo.data.messages import BadRowError
from rankup.grpo.data.templates import ChatTemplate

FOLDER = Path(trl.__file__).parent / "chat_templates"
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja") if "training" not in path.stem)
WITH_TOOLS = [  # those that write tool calls
    *("deepseek_r1_distill", "deepseekv3", "gemma4_v5", "glm4moe", "gptoss", "lfm2_v2", "llama3_1", "llama3_2", "muse_glimmer"),
    *("nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_vl"),
]
ONLY_TURNS = ["cohere", "gemma", "gemma3", "llava_next"]
"""They refuse roles other than user and assistant, or two turns of one."""

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
USER = {"role": "user", "content": "QUESTION"}
RESULT = {"role": "tool", "content": "RESULT", "name": "weather", "tool_call_id": "abcdefghi"}


class Tokenizer:
    """Only what renders a template."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **options: Any) -> str:
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        return render_jinja_template([messages], chat_template=self.chat_template, **special, **options)[0][0]


def template(text: str, **kwargs: Any) -> ChatTemplate:
    return ChatTemplate(Tokenizer(text), kwargs)  # type: ignore[arg-type]


def of_family(name: str) -> ChatTemplate:
    return template((FOLDER / f"{name}.jinja").read_text())


def call(arguments: Any, **message: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", **message, "tool_calls": [{"type": "function", "id": "abcdefghi", "function": function}]}


# ------------------------------------------------------------------------------------------ content in parts


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_text_are_one_text_in_every_template(family: str):
    one = of_family(family).render([USER]).text
    parts = [{"type": "text", "text": "QUES"}, {"type": "text", "text": "TION"}]
    assert "QUESTION" in one
    assert of_family(family).render([{"role": "user", "content": parts}]).text == one


@pytest.mark.parametrize("family", FAMILIES)
def test_an_assistant_s_message_is_left_open_in_every_template(family: str):
    text = of_family(family).render([USER, {"role": "assistant", "content": [{"type": "text", "text": "The sum"}]}]).text
    assert text.endswith("The sum")


# ------------------------------------------------------------------------------------------ tool calls


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_tool_calls_are_written_alike_however_the_row_writes_them(family: str):
    written = [
        call({"city": "Oslo"}, content=None), call({"city": "Oslo"}, content=""), call({"city": "Oslo"}),
        call('{"city": "Oslo"}', content=None), call('{"city": "Oslo"}'),
    ]  # fmt: skip
    rendered = [of_family(family).render([USER, one, RESULT]) for one in written]
    text = rendered[0].text
    assert len({one.text for one in rendered}) == 1 and not rendered[0].loses_calls
    assert "Oslo" in text and "weather" in text and "None" not in text.replace("'None'", "") and '\\"city' not in text


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ONLY_TURNS])
def test_content_that_is_none_is_never_written(family: str):
    try:
        text = of_family(family).render([USER, call({"city": "Oslo"}, content=None), RESULT]).text
    except BadRowError as error:
        assert "leaves out" in str(error) or "is refused" in str(error)
    else:
        assert "None" not in text.replace("'None'", "") and "null" not in text


def test_a_template_without_tool_calls_says_so():
    rendered = template(PLAIN).render([USER, call({"city": "Oslo"}, content=None), RESULT])
    assert rendered.text == "<user>QUESTION<assistant><tool>RESULT<assistant>" and rendered.loses_calls
    assert not template(PLAIN).render([USER]).loses_calls


def test_arguments_that_are_no_json_object_stay():
    writes = PLAIN + "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function }}{% endfor %}{% endfor %}"
    assert "'arguments': 'five'" in template(writes).render([USER, call("five"), RESULT]).text
    assert "'arguments': '[5]'" in template(writes).render([USER, call("[5]"), RESULT]).text


def test_a_conversation_that_ends_with_a_tool_call_is_refused():
    with pytest.raises(BadRowError, match="ends with a tool call: add its result"):
        of_family("qwen3").render([USER, call({"city": "Oslo"}, content="")])


def test_tools_and_variables_of_the_row_reach_the_template():
    tools = [{"type": "function", "function": {"name": "find_weather", "description": "", "parameters": {}}}]
    assert "find_weather" in of_family("qwen3").render([USER], tools=tools).text
    assert of_family("qwen3").takes("tools") and not template(PLAIN).takes("tools")
    assert "find_weather" in template((FOLDER / "qwen3.jinja").read_text(), tools=tools).render([USER]).text
    shown = template("{{ a }}{{ b }}" + PLAIN, a=1, b=2)
    assert shown.render([USER], kwargs={"b": 3}).text == "13<user>QUESTION<assistant>"
    assert shown.render([USER]).text == "12<user>QUESTION<assistant>"


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "deepseekv3", "phi3"])
def test_messages_of_a_role_that_the_template_leaves_out_are_refused(family: str):
    with pytest.raises(BadRowError, match="messages of the role developer, which the chat template leaves out"):
        of_family(family).render([{"role": "developer", "content": "Be brief."}, USER])


def test_an_empty_message_does_not_hide_what_a_later_one_loses():
    deaf = template("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}")
    assert deaf.render([USER, {"role": "tool", "content": ""}]).text == "QUESTION"
    with pytest.raises(BadRowError, match="messages of the role tool"):
        deaf.render([USER, RESULT])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages[0].content + 5 }}", 'can only concatenate str'),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ messages[0].content | no_such_filter }}", None),
        ("{{ messages[0].content.missing.more }}", "has no attribute 'missing'"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal(text: str, reason: str | None):
    with pytest.raises(ValueError, match=reason and f"is refused by the chat template: .*{reason}") as caught:
        template(text).render([USER])
    assert isinstance(caught.value, BadRowError) == (reason is not None)


def test_arguments_of_rendering_are_no_variables():
    with pytest.raises(ValueError, match=r"^data\.chat_template_kwargs: tokenize is set for each conversation: remove it"):
        template(PLAIN, tokenize=True)
    with pytest.raises(BadRowError, match="has add_generation_prompt in chat_template_kwargs, which is set here"):
        template(PLAIN).render([USER], kwargs={"add_generation_prompt": False})


def test_a_mistake_in_the_template_is_no_fault_of_a_row():
    with pytest.raises(ValueError, match="the chat template has a mistake in line 2: ") as caught:
        template("{% if x %}\n{% endfor %}").render([USER])
    assert not isinstance(caught.value, BadRowError)
