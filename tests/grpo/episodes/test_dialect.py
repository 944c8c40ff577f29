"""The ids of a dialogue: what was sampled stays, and the bridges between turns are what the chat template writes there."""

import re
from typing import Any

import numpy as np
import pytest
from dialects import FAMILIES, OWN, QWEN3, SCHEMAS, dialect_tokenizer, ids, template_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.config import DataConfig
from rankup.grpo.data.renderer import PromptRenderer
from rankup.grpo.episodes.bridges import Bridges, Called, result_message
from rankup.grpo.episodes.dialect import Dialect, Reply, text_of_result

USER = {"role": "user", "content": "2 + 3?"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
LOOK_UP = '<tool_call>\n{"name": "look_up", "arguments": {"word": "é", "flag": true}}\n</tool_call>'

TURNS = {  # a call as the template writes it
    "qwen3_small": CALL,
    "qwen3": CALL,
    "qwen2_5": CALL,
    "chatml": CALL,
    "smollm2": CALL,
    "gemma_1": CALL,
    "gemma3": CALL,
    "phi3": CALL,
    "llama3_small": '{"name": "add", "parameters": {"a": 2, "b": 3}}',
    "llama3_1": '{"name": "add", "parameters": {"a": 2, "b": 3}}',
    "qwen3_5_nothink": "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\n3\n</parameter>\n"
    "</function>\n</tool_call>",
}
KEEPS = [name for name in TURNS if name != "qwen3_5_nothink"]
"""Those that write earlier turns as they were generated: this one's generation prompt has an empty thinking part."""
EOS = {"qwen3_small": "<|im_end|>", "qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>"}
"""The others' tokenizers have an end-of-sequence token that the template does not write."""


def made(name: str, *, responds: bool = False, schemas: Any = SCHEMAS, **options: Any) -> tuple[Any, Dialect]:
    tokenizer = dialect_tokenizer(template_of(name), eos=EOS.get(name))
    return tokenizer, Dialect(tokenizer, DataConfig(**options), schemas=schemas, responds=responds, tool_parser=None)


def prompt(tokenizer: Any, **kwargs: Any) -> list[int]:
    return list(PromptRenderer(tokenizer, DataConfig()).token_ids([USER], SCHEMAS, kwargs))


def closed(tokenizer: Any, dialect: Dialect, text: str, before: list[int]) -> tuple[list[int], Reply]:
    """A turn of this text with the token that closes it."""
    reply = dialect.parse(ids(tokenizer, text), before=before)
    closing = dialect.closing_id(reply)
    assert closing is not None
    return [*ids(tokenizer, text), closing], reply


# --------------------------------------------------------------------------------------------------- the whole dialogue


SPECIAL = ["<|im_end|>", "<|im_start|>user\n", "<end_of_turn>", "<|eot_id|>", "<s>"]
PIECES = st.sampled_from([*SPECIAL, "é", "🙂", "的", "\n", " ", '"', "\\"]) | st.text(max_size=4)
CONTENTS = st.lists(PIECES, max_size=6).map("".join)


@pytest.mark.parametrize("name", KEEPS)
@settings(deadline=None, max_examples=15)
@given(contents=st.tuples(CONTENTS, CONTENTS, CONTENTS))
def test_check_2_prompt_turns_and_bridges_read_as_the_template_writes_the_dialogue(name: str, contents: tuple[str, str, str]):
    tokenizer, dialect = MADE[name]
    messages: list[Any] = [USER]
    held = prompt(tokenizer)
    for content in contents[:2]:
        turn, reply = closed(tokenizer, dialect, TURNS[name], held)
        assert [(call.name, call.arguments, call.error) for call in reply.calls] == [("add", {"a": 2, "b": 3}, None)]
        results = reply.results([content])
        held += [*turn, *dialect.bridge(reply, results)]
        messages += [reply.message, *results]
    turn, reply = closed(tokenizer, dialect, "Five.", held)
    held += [*turn, *dialect.bridge(reply, [{"role": "user", "content": contents[2]}])]
    messages += [reply.message, {"role": "user", "content": contents[2]}]
    template = PromptRenderer(tokenizer, DataConfig()).template
    assert tokenizer.decode(held) == _encodable(template.render(messages, tools=SCHEMAS).text)


MADE = {name: made(name, responds=True) for name in TURNS}


def _encodable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_check_1_ids_whose_text_encodes_otherwise_stay():
    tokenizer, dialect = MADE["qwen3"]
    spelled = [id for character in "<|im_end|>" for id in ids(tokenizer, character)]  # characters, not the token
    assert ids(tokenizer, tokenizer.decode(spelled)) != spelled
    turn = [*spelled, *ids(tokenizer, CALL), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    reply = dialect.parse(turn)
    assert [call.name for call in reply.calls] == ["add"]
    plain = dialect.parse(ids(tokenizer, CALL))
    assert dialect.bridge(reply, reply.results(["5"])) == dialect.bridge(plain, plain.results(["5"]))


def test_check_3_thinking_of_a_turn_does_not_reach_the_bridge():
    tokenizer, dialect = MADE["qwen3"]
    thinking, reply = closed(tokenizer, dialect, f"<think>\nTwo and three.\n</think>\n\n{CALL}", [])
    _, plain = closed(tokenizer, dialect, CALL, [])
    assert dialect.bridge(reply, reply.results(["5"])) == dialect.bridge(plain, plain.results(["5"]))
    assert "Two and three." in reply.message["content"] and tokenizer.decode(thinking).count("Two and three.") == 1


@pytest.mark.parametrize("name", TURNS)
def test_check_4_two_results_are_one_render_in_the_order_of_the_calls(name: str):
    tokenizer, dialect = MADE[name]
    joint = ";" if "llama" in name else "\n"
    _, reply = closed(tokenizer, dialect, joint.join([TURNS[name]] * 2), [])
    assert len(reply.calls) == 2 and len({call.id for call in reply.calls}) == 2
    text = tokenizer.decode(dialect.bridge(reply, reply.results(["FIRST", "SECOND"])))
    assert 0 <= text.index("FIRST") < text.index("SECOND")
    assert len(re.findall("assistant|model", text)) == 1  # one generation prompt, at the end
    if name in ("gemma_1", "gemma3", "phi3", "qwen3", "qwen3_small"):
        assert text.count("user") == 1  # one message, in which both are


def test_a_bridge_depends_on_calls_and_messages_only():
    tokenizer, dialect = MADE["qwen3"]
    one, other = (dialect.parse(ids(tokenizer, text)) for text in (CALL, f"Hm.\n{CALL.replace('2', '99')}"))
    assert dialect.bridge(one, one.results(["5"])) == dialect.bridge(other, other.results(["5"]))
    assert dialect.bridge(one, one.results(["5"])) != dialect.bridge(one, one.results(["6"]))


def test_the_variables_of_a_row_reach_the_generation_prompt():
    tokenizer, dialect = MADE["qwen3_small"]
    reply = dialect.parse(ids(tokenizer, CALL))
    plain, thinking = (
        tokenizer.decode(dialect.bridge(reply, reply.results(["5"]), {"enable_thinking": is_on})) for is_on in (False, True)
    )
    assert thinking == plain + "<think>\n"


# ----------------------------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("name", TURNS)
def test_check_18_special_tokens_in_results_and_turns_are_text(name: str):
    tokenizer, dialect = MADE[name]
    nasty = "".join(token.content for token in tokenizer.added_tokens_decoder.values()) * 2
    reply = dialect.parse(ids(tokenizer, TURNS[name]))
    said = dialect.parse(ids(tokenizer, "Five."))
    for of, messages in ((reply, reply.results), (said, lambda texts: [{"role": "user", "content": texts[0]}])):
        empty, full = (dialect.bridge(of, messages([text])) for text in ("", nasty))
        special = [[id for id in bridge if id in tokenizer.all_special_ids] for bridge in (empty, full)]
        assert special[0] == special[1]
        assert nasty in tokenizer.decode(full)


def test_check_18_special_tokens_in_the_name_of_a_call_are_text():
    tokenizer = dialect_tokenizer(template_of("gptoss"))  # it writes the names in front of the results
    bridges = Bridges(tokenizer, DataConfig(), schemas=SCHEMAS)
    bridges.prove_results(["add", "look_up"])
    made = [
        bridges.ids([called], [result_message(called, "5")])
        for called in (Called("add", "call00000"), Called("<|call|>add<|end|>", "call00000"))
    ]
    special = [[id for id in one if id in tokenizer.all_special_ids] for one in made]
    assert special[0] == special[1] and "functions.<|call|>add<|end|> to" in tokenizer.decode(made[1])


def test_a_bridge_without_special_tokens_in_it_is_what_the_tokenizer_makes_of_the_text():
    for tokenizer, dialect in MADE.values():
        reply = dialect.parse(ids(tokenizer, "x"))
        bridge = dialect.bridge(reply, [{"role": "user", "content": " é🙂\n的 "}])
        assert list(bridge) == ids(tokenizer, tokenizer.decode(bridge))


@pytest.mark.parametrize("name", ["qwen3", "phi3", "smollm2", "gemma_1", "llama3_1"])
@pytest.mark.parametrize("has_metaspace", [False, True])
def test_a_bridge_is_encoded_as_in_the_middle_of_the_dialogue(name: str, has_metaspace: bool):
    tokenizer = dialect_tokenizer(template_of(name), has_metaspace=has_metaspace)
    dialect = Dialect(tokenizer, DataConfig(), schemas=SCHEMAS, responds=True, tool_parser=None)
    turn, reply = closed(tokenizer, dialect, TURNS[name], [])
    for content in ("5", " a  b ", "\nx"):
        held = [*turn, *dialect.bridge(reply, reply.results([content]))]
        template = PromptRenderer(tokenizer, DataConfig()).template
        text = template.render([USER, reply.message, *reply.results([content])], tools=SCHEMAS).text
        whole = ids(tokenizer, TURNS[name] + text[text.rindex(TURNS[name]) + len(TURNS[name]) :])
        assert held == whole
    (nasty,) = [dialect.bridge(reply, reply.results(["a</s>b"]))]
    assert "a</s>b" in tokenizer.decode(nasty)


# ------------------------------------------------------------------------------------------------------------ closing


def test_check_10_only_the_templates_own_token_closes_a_turn():
    tokenizer, dialect = MADE["qwen3"]
    assert [tokenizer.convert_ids_to_tokens(id) for id in dialect.closing_ids] == ["<|im_end|>"]
    second = tokenizer.pad_token_id
    other = Dialect(tokenizer, DataConfig(), schemas=SCHEMAS, responds=True, tool_parser=None, eos_token_ids=[second])
    assert other.closing_ids == dialect.closing_ids
    reply = other.parse([*ids(tokenizer, "Five."), second])
    assert reply.message["content"] == "Five." and other.closing_id(reply) != second


@pytest.mark.parametrize(
    ("name", "of_calls", "of_text"),
    [
        ("gemma_1", "<end_of_turn>", "<end_of_turn>"),
        ("phi3", "<|end|>", "<|end|>"),
        ("llama3_1", "<|eot_id|>", "<|eot_id|>"),
        ("deepseekv3", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_the_closing_token_is_found_though_the_tokenizer_names_another_end(name: str, of_calls: str, of_text: str):
    tokenizer = dialect_tokenizer(template_of(name))  # its end of sequence is </s>
    dialect = Dialect(tokenizer, DataConfig(), schemas=SCHEMAS, responds=True, tool_parser=None)
    replies = [dialect.parse(ids(tokenizer, text)) for text in (TURNS.get(name, CALL), "Five.")]
    assert [tokenizer.convert_ids_to_tokens(dialect.closing_id(reply)) for reply in replies] == [of_calls, of_text]


def test_a_template_whose_turns_are_closed_by_the_next_role_needs_the_engines_end_tokens():
    tokenizer = dialect_tokenizer(template_of("glm4moe"))
    with pytest.raises(ValueError, match="closes a turn by no end-of-sequence token, so nothing can follow it"):
        Dialect(tokenizer, DataConfig(), schemas=[], responds=True, tool_parser=None)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|observation|>")]
    dialect = Dialect(tokenizer, DataConfig(), schemas=[], responds=True, tool_parser=None, eos_token_ids=ends)
    reply = dialect.parse([*ids(tokenizer, "\n<think></think>\nFive."), ends[0]])
    assert dialect.closing_id(reply) == ends[0]
    assert tokenizer.decode(dialect.bridge(reply, [{"role": "user", "content": "U"}])) == "\nU<|assistant|>"


def test_nothing_follows_a_turn_without_a_call_unless_the_environment_responds():
    tokenizer, dialect = made("qwen3")
    assert dialect.closing_id(dialect.parse(ids(tokenizer, "Five."))) is None
    assert dialect.closing_id(dialect.parse(ids(tokenizer, CALL))) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer, alone = made("qwen3", schemas=[], responds=True)
    reply = alone.parse(ids(tokenizer, CALL))
    assert alone.parser_name is None and reply.calls == () and reply.message["content"] == CALL
    assert alone.closing_id(reply) is not None


# ----------------------------------------------------------------------------------------------------------- messages


def test_ids_of_calls_go_on_through_the_episode():
    tokenizer, dialect = MADE["qwen3"]
    reply = dialect.parse(ids(tokenizer, f"{CALL}\n{LOOK_UP}"), num_calls=3)
    assert [call.id for call in reply.calls] == ["call00003", "call00004"]
    assert [call["id"] for call in reply.message["tool_calls"]] == ["call00003", "call00004"]
    assert [one["tool_call_id"] for one in reply.results(["a", "b"])] == ["call00003", "call00004"]
    assert [one["name"] for one in reply.results(["a", "b"])] == ["add", "look_up"]
    assert reply.message["tool_calls"][1]["function"] == {"name": "look_up", "arguments": {"word": "é", "flag": True}}


def test_a_call_without_a_result_and_a_role_that_the_template_refuses_are_errors():
    tokenizer, dialect = MADE["gemma_1"]
    reply = dialect.parse(ids(tokenizer, f"{CALL}\n{CALL}"))
    with pytest.raises(ValueError, match="2 calls, and 1 results: each call needs one"):
        dialect.bridge(reply, reply.results(["5", "6"])[:1])
    said = dialect.parse(ids(tokenizer, "Five."))
    with pytest.raises(ValueError, match="the dialogue is refused by the chat template: Conversation roles must alternate"):
        dialect.bridge(said, [{"role": "system", "content": "Be brief."}])
    with pytest.raises(ValueError, match="a part of type 'image'"):
        dialect.bridge(said, [{"role": "user", "content": [{"type": "image"}]}])


def test_turns_of_an_environment_may_have_parts_of_text_and_several_messages():
    tokenizer, dialect = MADE["qwen3"]
    said = dialect.parse(ids(tokenizer, "Five."))
    parts = [{"type": "text", "text": "No"}, {"type": "text", "text": ", try again."}]
    one = dialect.bridge(said, [{"role": "user", "content": parts}])
    assert tokenizer.decode(one) == "\n<|im_start|>user\nNo, try again.<|im_end|>\n<|im_start|>assistant\n"
    two = dialect.bridge(said, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "U"}])
    assert tokenizer.decode(two).startswith("\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nU")


def test_results_of_any_kind_are_text():
    loop: list[Any] = []
    loop.append(loop)
    assert text_of_result("é\n") == "é\n"
    assert text_of_result({"a": [1, None, "é"]}) == '{"a": [1, null, "é"]}'
    assert text_of_result(None) == "null"
    assert text_of_result(np.float32(0.5)) == "0.5" and text_of_result(np.arange(2)) == "[0, 1]"
    assert text_of_result({3, 1}) == "[1, 3]" and text_of_result(b"a") == '"b\'a\'"'
    assert text_of_result(Reply(message={"role": "assistant"})) == '{"message": {"role": "assistant"}, "calls": []}'
    assert text_of_result({(1, 2): 3}) == "{(1, 2): 3}" and text_of_result(loop) == "[[...]]"


@pytest.mark.parametrize("content", ["", "\n\n x \n\n", "\ud83d", "\ud83d\ude42", "\x00", "a" * 100_000])
def test_contents_that_are_empty_huge_or_no_unicode_are_bridged(content: str):
    tokenizer, dialect = MADE["qwen3"]
    reply = dialect.parse(ids(tokenizer, CALL))
    text = tokenizer.decode(dialect.bridge(reply, reply.results([content])))
    inside = text.partition("<tool_response>\n")[2].partition("\n</tool_response>")[0]
    assert inside == content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_a_malformed_call_is_answered_like_a_call():
    for name in ("qwen3", "gemma_1", "llama3_1", "smollm2"):
        tokenizer, dialect = MADE[name]
        reply = dialect.parse(ids(tokenizer, TURNS[name].replace('"name": "add", ', "")))
        assert [(call.name, call.error) for call in reply.calls] == [(None, "the call has no name")]
        text = tokenizer.decode(dialect.bridge(reply, reply.results([reply.calls[0].error])))
        assert "the call has no name" in text
        assert reply.message["tool_calls"][0]["function"]["name"] == "unknown"


def test_white_space_behind_the_generation_prompt_is_what_the_model_continues():
    """A file of a template often ends with a line that is no part of it."""
    template = template_of("chatml") + "  \n"
    tokenizer = dialect_tokenizer(template, eos="<|im_end|>")
    dialect = Dialect(tokenizer, DataConfig(), schemas=SCHEMAS, responds=True, tool_parser=None)
    assert dialect.parser_name == "hermes"
    _, reply = closed(tokenizer, dialect, CALL, prompt(tokenizer))
    text = tokenizer.decode(dialect.bridge(reply, reply.results(["5"])))
    assert text == "\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n  "


@pytest.mark.parametrize("name", TURNS)
def test_a_call_that_the_prompt_has_begun_is_the_models(name: str):
    """As in prompts that make a model call a tool: their last message is the assistant's, which the model continues."""
    tokenizer, dialect = MADE[name]
    before, text = prompt(tokenizer), TURNS[name]
    for length in (len(text.split()[0]), len(text) // 2):
        begun = [*before, *ids(tokenizer, text[:length])]
        reply = dialect.parse(ids(tokenizer, text[length:]), before=begun)
        assert [(call.name, call.arguments, call.error) for call in reply.calls] == [("add", {"a": 2, "b": 3}, None)]
    thinking = [*before, *ids(tokenizer, f"<think>\n{text[: len(text) // 2]}")]
    assert dialect.parse(ids(tokenizer, text[len(text) // 2 :] + "</think>\nFive."), before=thinking).calls == ()
    ended = [*before, *ids(tokenizer, f"{text}\n")]
    assert dialect.parse(ids(tokenizer, "Five."), before=ended).calls == ()


# ---------------------------------------------------------------------------------------------------------- refusals


def refusal(template: str, **options: Any) -> str:
    settings = {"schemas": SCHEMAS, "responds": True, "tool_parser": None, **options}
    with pytest.raises(ValueError) as caught:
        Dialect(dialect_tokenizer(template), DataConfig(), **settings)
    return str(caught.value)


def test_a_template_that_cannot_write_the_dialogue_is_refused_by_what_fails():
    assert "has no chat template" in refusal("")
    numbered = QWEN3.replace("<|im_start|>user{% endif %}", "<|im_start|>user{{ loop.index }}{% endif %}")
    assert "writes a tool's result otherwise in a later turn of a dialogue: set another data.chat_template" in refusal(numbered)
    late = QWEN3.replace("<|im_start|>user{% endif %}", "<|im_start|>user{% if loop.index > 7 %}!{% endif %}{% endif %}")
    assert "writes a tool's result otherwise in a later turn of a dialogue" in refusal(late)
    next_one = "loop.nextitem if not loop.last and loop.nextitem.role == 'tool'"
    swapped = f"({next_one} else loop.previtem if loop.previtem.role == 'tool' else m).content"
    in_another_order = QWEN3.replace("+ m.content", f"+ {swapped}")
    assert "loses two results of one turn, or writes them in another order: set another" in refusal(in_another_order)
    once = QWEN3 + (
        "{% if messages | length > 3 and messages[-1].role == 'user' %}{{ raise_exception('one question') }}{% endif %}"
    )
    assert "cannot write a user's turn: the dialogue is refused by the chat template: one question" in refusal(once)
    unclosed = QWEN3.replace("<|im_end|>", "")
    assert "closes a turn with tool calls by no end-of-sequence token" in refusal(unclosed)
    odd = QWEN3.replace('{"name": "', '{"call": "')
    assert "no parser reads the calls that the chat template writes ('<tool_call>" in refusal(odd)


def test_a_parser_that_does_not_read_the_templates_calls_is_refused_by_its_name():
    assert refusal(QWEN3, tool_parser="llama").startswith("rollout.tool_parser=llama: it does not read the calls that")
    assert refusal(QWEN3, tool_parser="response_template").startswith(
        "rollout.tool_parser=response_template: the tokenizer has no response_template: set another one"
    )
    tokenizer = dialect_tokenizer(QWEN3)
    assert Dialect(tokenizer, DataConfig(), schemas=SCHEMAS, responds=False, tool_parser="hermes").parser_name == "hermes"


def test_families_and_own_templates_have_different_names():
    assert not set(FAMILIES) & set(OWN)
