"""Rows in the forms that people bring: in tables of text, with tools, with special tokens; and those that are refused."""

import json

import datasets
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pages import ROOT, code_blocks
from prompt_tokenizers import CHAT_TEMPLATE, make_tokenizer, prepared, user
from tokenizers import processors

from rankup.grpo.config import DataConfig
from rankup.grpo.data.prompts import prepare_prompts
from rankup.grpo.data.sources import load_rows


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


PAGE = [block for language, block in code_blocks((ROOT / "docs" / "data.md").read_text()) if language in ("json", "yaml")]


def test_the_page_s_rows_and_run_file(tokenizer):
    rows = [json.loads(line) for line in PAGE[0].splitlines()]
    text, conversation, parts = prepared(rows, tokenizer).rows
    assert tokenizer.decode(text.token_ids) == "<s>2 + 3 ="
    assert conversation.token_ids == parts.token_ids and parts.content == rows[2]["prompt"]
    (options,) = [yaml.safe_load(block)["data"] for block in PAGE if "chat_template" in block]
    (row,) = prepared([{"prompt": json.dumps(user("one"))}, {"prompt": ""}], make_tokenizer(), **{
        name: value for name, value in options.items() if name == "on_bad_row"
    }).rows  # fmt: skip
    assert row.content == user("one")
    own = make_tokenizer(chat_template=options["chat_template"])
    assert own.decode(prepared([{"prompt": user("one")}], own).rows[0].token_ids) == "user: one\nassistant:"


# ------------------------------------------------------------------------------------------ special tokens


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("<s> $A </s>", "one", "<s>one"),
        ("<s> $A </s>", "<s>user : one</s>", "<s>user : one</s>"),  # its own EOS and BOS, rendered beforehand
        ("$A </s> </s>", "one </s>", "one </s>"),
        ("</s> $A", "one", "</s>one"),
        ("$A", "a a", "a a"),
    ],
)
def test_a_text_does_not_end_with_what_the_tokenizer_adds(form, text, expected):
    adding = make_tokenizer()
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (row,) = prepared([{"prompt": text}], adding).rows
    assert adding.decode(row.token_ids) == expected
    (row,) = prepared([{"prompt": user("one")}], adding).rows
    assert adding.decode(row.token_ids) == "<s>user : one</s>assistant : "


@pytest.mark.parametrize(
    ("prompt", "prefix"),
    [
        (user("one"), "<think>\n"),
        ("Assistant: <think>", "<think>"),
        ("Assistant: Let me think. <answer> \n", "<answer> \n"),
        ("Begin with <think>, please", ""),
        ("one <s>", ""),
        ("one", ""),
        ([*user("one <x>"), {"role": "assistant", "content": "Let me see.\n<think>\nOne"}], "<think>\nOne"),
        ([*user("one <x>"), {"role": "assistant", "content": "The sum"}], ""),
    ],
)
def test_what_a_prompt_has_written_of_the_completion_is_known(prompt, prefix):
    thinking = make_tokenizer(chat_template=CHAT_TEMPLATE.replace("assistant : {%", "assistant : <think>\n{%"))
    data = prepared([{"prompt": prompt}], thinking)
    assert data.rows[0].completion_prefix == prefix
    assert data.remarks.get("opened", 0) == bool(prefix)


# ------------------------------------------------------------------------------------------ tables of text, tools


def test_a_conversation_in_a_table_of_text_goes_through_the_template_with_a_remark(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    rows = [{"prompt": json.dumps(user("one"))}, {"prompt": str(user("two"))}, {"prompt": "[1, 2]"}]
    datasets.Dataset.from_list(rows).to_csv(path)
    data = prepared(load_rows(str(path), split="train"), tokenizer)
    assert [row.content for row in data.rows] == [user("one"), user("two"), "[1, 2]"]
    assert tokenizer.decode(data.rows[1].token_ids) == "<s>user : two</s>assistant : "
    assert data.remarks == {"from_text": 2, "plain": 1}


TEXTS = st.text(min_size=1, max_size=20)
ARGUMENTS = st.dictionaries(st.sampled_from("abc"), TEXTS, min_size=1)
TALKS = st.builds(
    lambda question, arguments, result: [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "content": result, "name": "f"},
    ],
    TEXTS, ARGUMENTS, TEXTS,
)  # fmt: skip
CALLS = (  # with sorted keys: the keys of a typed table have one order
    "{% for m in messages %}{{ m.role }}{{ m.content if m.content is not none }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson(sort_keys=true) }}"
    "{% endfor %}{% endfor %}"
)


@settings(max_examples=3, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TALKS, min_size=30, max_size=40))
def test_a_conversation_is_the_same_prompt_from_every_kind_of_source(tmp_path, talks):
    tokenizer = make_tokenizer(chat_template=CALLS)
    expected = prepared([{"prompt": talk} for talk in talks], tokenizer, max_prompt_length=10**4)
    assert [row.content for row in expected.rows] == talks
    rows, texts = ([{"prompt": write(talk)} for talk in talks] for write in (lambda talk: talk, json.dumps))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(texts).to_csv(tmp_path / "rows.csv")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (table, *(str(tmp_path / f"rows.{suffix}") for suffix in ("parquet", "csv", "jsonl"))):
        found = prepared(load_rows(source, split="train"), tokenizer, max_prompt_length=10**4)
        assert [row.token_ids for row in found.rows] == [row.token_ids for row in expected.rows]
        assert [row.content for row in found.rows] == talks


def test_a_row_s_tools_and_variables_reach_the_template_and_the_reward_functions():
    shows = make_tokenizer(chat_template="{{ tools }}|{{ level }}|{{ base }}|{{ messages[0].content }}")
    rows = [
        {"prompt": user("q"), "tools": [{"name": "add"}], "chat_template_kwargs": {"level": 1}},
        {"prompt": user("q"), "tools": '[{"name": "add"}]', "chat_template_kwargs": '{"level": 2, "base": 3}'},
        {"prompt": user("q"), "tools": None, "chat_template_kwargs": None},
    ]
    data = prepared(rows, shows, chat_template_kwargs={"level": 0, "base": 0})
    assert [shows.decode(row.token_ids) for row in data.rows] == [
        "[{'name': 'add'}]|1|0|q", "[{'name': 'add'}]|2|3|q", "None|0|0|q"
    ]  # fmt: skip
    assert data.rows[0].columns == {"tools": [{"name": "add"}], "chat_template_kwargs": {"level": 1}}
    assert "without_tools" not in data.remarks


def test_what_a_user_should_know_is_counted(tokenizer):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    rows = [
        {"prompt": "one"},
        {"prompt": "<s>user : rendered beforehand"},
        {"prompt": user("q"), "tools": [{"name": "add"}]},
        {"prompt": [*user("q"), {"role": "assistant", "content": "so"}]},
        {"prompt": [*user("q"), call, {"role": "tool", "content": "5"}]},
    ]
    assert prepared(rows, tokenizer).remarks == {"plain": 1, "without_tools": 1, "continued": 1, "without_calls": 1}
    assert prepared(rows[:2], make_tokenizer(chat_template=None)).remarks == {}
    assert prepared(rows[:1], tokenizer, system_prompt="brief").remarks == {}
    assert prepared([{"prompt": "user : a</s>"}], tokenizer).remarks == {"ended": 1}
    ends = make_tokenizer(chat_template=CHAT_TEMPLATE.replace("assistant : ", ""))
    assert prepared([{"prompt": user("q")}, {"prompt": user("p")}], ends).remarks == {"ended": 2}


# ------------------------------------------------------------------------------------------ bad rows

IMAGE = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "is empty: remove the row"),
        (None, "is neither a text nor a conversation"),
        ("[{'role': 'user', 'content': 'a'} x]", "is text that begins like a conversation"),
        (IMAGE, r"has a part of type 'image' in message 0 \(user\)"),
        ([{"role": "system", "content": "x"}, *user("q")], "is refused by the chat template: no system role"),
        ("cut \ud83d", r"has half of a surrogate pair, '\\ud83d'"),
        (user("cut \ud83d"), r"has half of a surrogate pair, '\\ud83d'"),
        ("assistant", r"has the token '.*' with the id \d+, and the model's embedding has \d+ rows"),
    ],
)
def test_a_bad_row_of_any_kind_stops_by_its_place_or_is_dropped_and_counted(tokenizer, prompt, reason):
    rows = [{"prompt": text, "n": n} for n, text in enumerate(["one", prompt, "two", "one " * 50, prompt])]
    largest = max(max(tokenizer(text)["input_ids"]) for text in ("two", "one " * 50))
    vocab_size = largest + 1 if prompt == "assistant" else None

    def prepare(**options):
        config = DataConfig(chat_template_kwargs={"no_system": True}, **options)
        return prepare_prompts(rows, tokenizer, config, max_prompt_length=40, vocab_size=vocab_size)

    with pytest.raises(ValueError, match=rf"^the prompt of row 1 {reason}.*\(data\.on_bad_row=drop leaves such rows out\)$"):
        prepare()
    data = prepare(on_bad_row="drop")
    assert [(row.columns["n"], row.row) for row in data.rows] == [(0, 0), (2, 2)]
    assert len(data.bad_rows) == 2 and data.bad_rows[1].startswith("the prompt of row 4 ")
    assert data.dropped == 1 and data.total == 5
    assert data.counts() == {"prompts": 2, "too_long": 1, "bad_rows": 2, "errors": list(data.bad_rows)}


def test_data_without_a_good_row_is_an_error_whatever_the_option(tokenizer):
    with pytest.raises(ValueError, match=r"^all 2 rows are bad: the prompt of row 0 is empty"):
        prepared([{"prompt": ""}, {"prompt": ""}], tokenizer, on_bad_row="drop")
    with pytest.raises(ValueError, match=r"no prompts are left: 1 are longer than .*, and 1 are bad: the prompt of row 0 is"):
        prepared([{"prompt": ""}, {"prompt": "one " * 50}], tokenizer, on_bad_row="drop", max_prompt_length=5)
    with pytest.raises(ValueError, match=r"has no chat template: set data\.chat_template"):
        prepared([{"prompt": "x"}, {"prompt": user("one")}], make_tokenizer(chat_template=None), on_bad_row="drop")
