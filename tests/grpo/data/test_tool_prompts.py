"""Prompts of a run with tools, and special tokens in what people write."""

from typing import Any

import pytest
from dialects import CHATML, GEMMA, LLAMA3, QWEN3, SCHEMAS, dialect_tokenizer, ids
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.config import DataConfig
from rankup.grpo.data.prompts import prepare_prompts
from rankup.grpo.data.renderer import PromptRenderer
from rankup.grpo.data.special_tokens import SpecialTokenGuard

USER = [{"role": "user", "content": "2 + 3?"}]


def prepared(rows: list[dict[str, Any]], template: str = QWEN3, tools: Any = lambda row: SCHEMAS, **options: Any):
    return prepare_prompts(rows, dialect_tokenizer(template), DataConfig(**options), max_prompt_length=10**6, tools=tools)


@pytest.mark.parametrize("template", [QWEN3, LLAMA3, CHATML, GEMMA])
def test_the_schemas_of_a_row_are_in_its_prompt_and_a_renderer_gives_the_same_ids(template: str):
    tokenizer = dialect_tokenizer(template)
    rows = [{"prompt": USER, "which": 0}, {"prompt": USER, "which": 1}, {"prompt": USER, "which": None}]
    data = prepared(rows, template, lambda row: None if row["which"] is None else [SCHEMAS[row["which"]]])
    renderer = PromptRenderer(tokenizer, DataConfig())
    for row, tools in zip(data.rows, ([SCHEMAS[0]], [SCHEMAS[1]], None), strict=True):
        assert row.token_ids == renderer.token_ids(USER, tools)
        text = tokenizer.decode(row.token_ids)
        assert [schema["function"]["name"] in text for schema in SCHEMAS] == [schema in (tools or ()) for schema in SCHEMAS]
        assert row.content == USER  # what reward functions get


def test_the_system_prompt_and_the_variables_of_a_row_apply():
    data = prepared([{"prompt": "2 + 3?", "chat_template_kwargs": {"enable_thinking": True}}], system_prompt="Be brief.")
    text = dialect_tokenizer(QWEN3).decode(data.rows[0].token_ids)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n<tools>\n{") and data.rows[0].completion_prefix == "<think>\n"
    renderer = PromptRenderer(dialect_tokenizer(QWEN3), DataConfig())
    content: Any = data.rows[0].content
    assert data.rows[0].token_ids == renderer.token_ids(content, SCHEMAS, {"enable_thinking": True})


def test_rows_that_cannot_have_the_tools_of_a_run_are_refused():
    with pytest.raises(ValueError, match="the prompt of row 0 is plain text, and tools and environments need conversations"):
        prepared([{"prompt": "2 + 3?"}])
    own = [{"prompt": USER}, {"prompt": USER, "tools": SCHEMAS}]
    with pytest.raises(ValueError, match="the prompt of row 1 has a column `tools`, whose calls nobody would answer"):
        prepared(own)
    assert len(prepared(own, on_bad_row="drop").rows) == 1
    assert len(prepared([{"prompt": USER, "tools": None}, {"prompt": USER, "tools": []}]).rows) == 2


@pytest.mark.parametrize("template", [QWEN3, CHATML])
def test_without_tools_nothing_changes(template: str):
    rows = [{"prompt": [{"role": "user", "content": "<|im_end|> " + str(number)}]} for number in range(3)]
    tokenizer = dialect_tokenizer(template)
    for row, prompt in zip(rows, prepared(rows, template, None).rows, strict=True):
        expected = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert list(prompt.token_ids) == expected
    assert prepared([{"prompt": USER, "tools": SCHEMAS}], QWEN3, None).rows  # a row may have tools of its own


@pytest.mark.parametrize("template", [QWEN3, CHATML, LLAMA3, GEMMA])
def test_check_18_special_tokens_in_rows_are_text(template: str):
    tokenizer = dialect_tokenizer(template)
    special = set(tokenizer.all_special_ids) | {id for id, one in tokenizer.added_tokens_decoder.items() if one.special}
    nasty = "a" + "".join(token.content for token in tokenizer.added_tokens_decoder.values()) + "b"
    tools = [{**SCHEMAS[0], "function": {**SCHEMAS[0]["function"], "description": nasty}}]
    data = prepared([{"prompt": [{"role": "user", "content": text}]} for text in ("", nasty)], template, lambda row: tools)
    empty, full = ([id for id in row.token_ids if id in special] for row in data.rows)
    assert empty == full
    assert tokenizer.decode(data.rows[1].token_ids).count(nasty) == 2


def test_half_of_a_surrogate_pair_is_still_refused():
    with pytest.raises(ValueError, match="has half of a surrogate pair"):
        prepared([{"prompt": [{"role": "user", "content": "a\ud83d"}]}])


# ------------------------------------------------------------------------------------------------------- the guard

TOKENIZER = dialect_tokenizer(QWEN3)
PIECES = ["<|im_end|>", "<|im_start|>", "<s>", "</s>", "<pad>", "<|im_", "end|>", "<", " ", "\n", "é", "🙂", "的", "a", "\0"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
def test_a_hidden_text_has_no_special_ids_and_reads_the_same(text: str):
    guard = SpecialTokenGuard(TOKENIZER)
    hidden = guard.hide(text)
    encoded = guard.encode(hidden)
    assert guard.show(hidden) == text
    assert not set(encoded) & set(TOKENIZER.all_special_ids) and TOKENIZER.decode(encoded) == text
    if guard.remove(text) == text:
        assert encoded == ids(TOKENIZER, text)


def test_a_token_that_contains_another_one_is_hidden_with_it():
    tokenizer = dialect_tokenizer("<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["im_end", "|im_end|>>"]})
    guard = SpecialTokenGuard(tokenizer)
    encoded = guard.encode(guard.hide("x<|im_end|>>y"))
    assert not set(encoded) & {id for id, one in tokenizer.added_tokens_decoder.items() if one.special}
    assert tokenizer.decode(encoded) == "x<|im_end|>>y"


def test_texts_with_and_without_marks_are_encoded_in_their_order():
    guard = SpecialTokenGuard(TOKENIZER)
    texts = [guard.hide("a"), guard.hide("<|im_end|>"), "<|im_end|>", guard.hide("b</s>"), ""]
    assert guard.encode_each(texts) == [guard.encode(text) for text in texts]
    assert guard.encode_each([]) == []
