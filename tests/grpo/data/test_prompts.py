import json
import os
import subprocess
import sys

import datasets
import pytest
from prompt_tokenizers import CHAT_TEMPLATE, make_tokenizer, prepared, user
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from rankup.grpo.config.data import ColumnType
from rankup.grpo.data.sources import load_rows


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# ------------------------------------------------------------------------------------------ files

ROWS = [{"prompt": "one", "answer": 1}, {"prompt": "two, or so", "answer": 2}]


def write(path, rows):
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_files_of_all_kinds_are_read_without_noise(tmp_path, monkeypatch, capfd, suffix):
    path = tmp_path / f"rows{suffix}"
    write(path, ROWS)
    types: dict[str, ColumnType] = {"answer": "int"} if suffix == ".csv" else {}
    capfd.readouterr()
    assert load_rows(str(path), split="test", column_types=types) == ROWS
    monkeypatch.chdir(tmp_path)
    assert load_rows(f"rows{suffix}", split="train", column_types=types) == ROWS
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()


def test_an_edited_file_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    for rows in (ROWS, list(reversed(ROWS))):
        write(path, rows)
        assert load_rows(str(path), split="train") == rows


def test_conversations_survive_a_file(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": user("one")}, {"prompt": [{"role": "user", "content": "two", "name": "x"}]}]
    write(path, rows)
    data = prepared(load_rows(str(path), split="train"), tokenizer)
    # Reading through Arrow gives the first message a name of None, which the template would see.
    assert data.rows[0].content == user("one")
    assert "named" not in tokenizer.decode(data.rows[0].token_ids)
    assert "named" in tokenizer.decode(data.rows[1].token_ids)


def test_the_error_for_a_missing_file_names_it():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.jsonl"):
        load_rows("nowhere.jsonl", split="train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "prompt,answer\n", "has no rows"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt":\n', r"cannot read .*a\.jsonl, line 2: no JSON: Expecting value"),
        ("a.parquet", "not parquet", "cannot read .*Parquet"),
    ],
)
def test_the_error_for_a_file_without_usable_rows_is_one_line(tmp_path, capfd, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(str(path), split="train")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------ hub


def test_the_error_for_an_unreachable_hub_is_one_line(tmp_path):
    code = "from rankup.grpo.data.sources import load_rows; load_rows('nobody/no-such-set', split='train', subset='main')"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: cannot reach the Hub for data set 'nobody/no-such-set'")


def test_a_folder_is_read_by_split(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[:1])
    assert load_rows(str(tmp_path), split="test") == ROWS[:1]
    with pytest.raises(ValueError, match=r"has no split 'nope' \(splits: train, test\)"):
        load_rows(str(tmp_path), split="nope")


def test_this_module_does_not_import_torch():
    code = "import sys, rankup.grpo.data.prompts; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------ functions and rows


def test_a_function_returns_rows_and_takes_options(tmp_path):
    (tmp_path / "data.py").write_text(
        "import datasets\n"
        "rows = [{'prompt': 'fixed'}]\n"
        "def train(count=1):\n"
        "    return ({'prompt': str(i)} for i in range(count))\n"
        "def both():\n"
        "    part = datasets.Dataset.from_list([{'prompt': 'a'}])\n"
        "    return datasets.DatasetDict(train=part, test=part.map(lambda row: {'prompt': 'b'}))\n"
        "def wrong(): return 5\n"
        "def worse(): return ['text']\n"
        "def empty(): return []\n"
    )

    def load(name, split="train", **options):
        return load_rows(f"{tmp_path}/data.py:{name}", split=split, options=options)

    assert load("train", count=2) == [{"prompt": "0"}, {"prompt": "1"}]
    assert load("rows") == [{"prompt": "fixed"}]
    assert load("both", split="test") == [{"prompt": "b"}]
    with pytest.raises(ValueError, match=r"has no split 'dev' \(splits: train, test\)"):
        load("both", split="dev")
    with pytest.raises(ValueError, match=r"cannot be called with the data options \(size\)"):
        load("train", size=2)
    with pytest.raises(ValueError, match="returned int: it must return rows"):
        load("wrong")
    with pytest.raises(ValueError, match=r"row 0 of .* is a str"):
        load("worse")
    with pytest.raises(ValueError, match="has no rows"):
        load("empty")


def test_rows_and_data_sets_pass_through():
    assert load_rows(ROWS, split="train") == ROWS
    assert load_rows(datasets.Dataset.from_list(ROWS).with_format("numpy"), split="train") == ROWS


def test_options_for_a_source_without_options_are_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, ROWS)
    with pytest.raises(ValueError, match=r"data.options \(size\) are for reasoning_gym tasks and functions"):
        load_rows(str(path), split="train", options={"size": 3})


# ------------------------------------------------------------------------------------------ reasoning gym


def gym_rows(split="train", **options):
    return load_rows("reasoning_gym:chain_sum", split=split, options={"size": 50, **options})


def test_a_reasoning_gym_task_is_a_source():
    rows = gym_rows(seed=3, min_terms=2, max_terms=2, max_digits=2)
    assert len(rows) == 50
    for row in rows:
        assert set(row) == {"prompt", "answer", "metadata", "task"}
        assert str(eval(json.loads(row["metadata"])["expression"])) == row["answer"]
        assert row["task"] == "chain_sum"
    assert rows == gym_rows(seed=3, min_terms=2, max_terms=2, max_digits=2)
    assert rows != gym_rows(seed=4, min_terms=2, max_terms=2, max_digits=2)
    assert gym_rows() == gym_rows()


def test_splits_of_a_reasoning_gym_task_do_not_repeat_each_other():
    splits = [{row["prompt"] for row in gym_rows(split, min_digits=4)} for split in ("train", "test", "validation")]
    assert [len(split) for split in splits] == [50, 50, 50]
    assert len(set.union(*splits)) == 150


def test_errors_of_reasoning_gym_sources():
    with pytest.raises(ValueError, match=r"no task 'chain_sums': did you mean chain_sum"):
        load_rows("reasoning_gym:chain_sums", split="train")
    with pytest.raises(ValueError, match=r"chain_sum has no option 'terms' \(options: min_terms, "):
        gym_rows(terms=3)
    with pytest.raises(ValueError, match="chain_sum: invalid options: size must be positive"):
        gym_rows(size=-1)


# ------------------------------------------------------------------------------------------ tokens


def test_a_text_is_tokenized_unchanged(tokenizer):
    (row,) = prepared([{"prompt": "what is one ?", "answer": 1, "level": "easy"}], tokenizer).rows
    assert tokenizer.decode(row.token_ids) == "<s>what is one ?"
    assert row.content == "what is one ?"
    assert row.columns == {"answer": 1, "level": "easy"}


def test_a_text_that_was_rendered_beforehand_gets_no_second_bos(tokenizer):
    (row,) = prepared([{"prompt": "<s>user : one"}], tokenizer).rows
    assert tokenizer.decode(row.token_ids) == "<s>user : one"


def test_a_conversation_is_rendered_with_one_bos_and_a_generation_prompt(tokenizer):
    (row,) = prepared([{"prompt": user("what is one ?")}], tokenizer).rows
    assert tokenizer.decode(row.token_ids) == "<s>user : what is one ?</s>assistant : "
    assert list(row.token_ids).count(tokenizer.bos_token_id) == 1
    rendered = tokenizer.apply_chat_template(user("what is one ?"), add_generation_prompt=True, return_dict=False)
    assert list(row.token_ids) == rendered


def test_a_conversation_that_ends_with_the_assistant_is_continued(tokenizer):
    prompt = [*user("one plus two ?"), {"role": "assistant", "content": "the sum is"}]
    (row,) = prepared([{"prompt": prompt}], tokenizer).rows
    assert tokenizer.decode(row.token_ids) == "<s>user : one plus two ?</s>assistant : the sum is"


def test_a_system_prompt_precedes_texts_and_conversations(tokenizer):
    own = [{"role": "system", "content": "own"}, *user("three")]
    rows = prepared(
        [{"prompt": "one"}, {"prompt": user("two")}, {"prompt": own}], tokenizer, system_prompt="be brief"
    ).rows
    system = [{"role": "system", "content": "be brief"}]
    assert [row.content for row in rows] == [[*system, *user("one")], [*system, *user("two")], own]
    assert tokenizer.decode(rows[0].token_ids) == "<s>system : be brief</s>user : one</s>assistant : "


def test_mixed_prompts_keep_their_order_and_their_columns(tokenizer):
    rows = [
        {"question": "one", "n": 0},
        {"question": user("two"), "n": 1, "only_here": True},
        {"question": [*user("x"), {"role": "assistant", "content": "three"}], "n": 2},
        {"question": "four", "n": 3},
    ]
    data = prepared(rows, tokenizer, prompt_column="question")
    for row, word in zip(data.rows, ["one", "two", "three", "four"], strict=True):
        assert word in tokenizer.decode(row.token_ids)
    assert [row.columns for row in data.rows] == [
        {"n": 0, "only_here": None},
        {"n": 1, "only_here": True},
        {"n": 2, "only_here": None},
        {"n": 3, "only_here": None},
    ]


def test_prompts_over_the_limit_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": "one " * count, "n": count} for count in (1, 50, 2, 60)]
    lengths = [len(row.token_ids) for row in prepared(rows, tokenizer, max_prompt_length=1000).rows]
    data = prepared(rows, tokenizer, max_prompt_length=lengths[2])
    assert [row.columns["n"] for row in data.rows] == [1, 2]
    assert data.dropped == 2
    assert prepared(rows, tokenizer, max_prompt_length=lengths[2] - 1).dropped == 3


def test_template_variables_reach_the_template(tokenizer):
    options = {"system_prompt": "be brief", "chat_template_kwargs": {"no_system": True}}
    with pytest.raises(ValueError, match="the prompt of row 0 is refused by the chat template: no system role"):
        prepared([{"prompt": "one"}], tokenizer, **options)
    assert prepared([{"prompt": user("one")}], tokenizer, chat_template_kwargs={"no_system": True}).rows


def test_thousands_of_prompts_take_a_few_calls_of_the_tokenizer():
    class CountingTokenizer(PreTrainedTokenizerFast):
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return super().__call__(*args, **kwargs)

    counting = CountingTokenizer(tokenizer_object=make_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    counting.chat_template = CHAT_TEMPLATE
    rows = [{"prompt": user(f"what is {i} plus {i} ?") if i % 2 else f"what is {i} ?"} for i in range(3000)]
    assert len(prepared(rows, counting).rows) == 3000
    assert counting.calls == 4  # texts, conversations, and two for what it adds to a text


# ------------------------------------------------------------------------------------------ mistakes


def test_errors_in_the_rows(tokenizer):
    with pytest.raises(ValueError, match="the data set has no rows"):
        prepared([], tokenizer)
    with pytest.raises(
        ValueError, match=r"no column 'prompt' .*data\.prompt_column to one of \['question', 'answer'\]"
    ):
        prepared([{"question": "one", "answer": 1}], tokenizer)
    with pytest.raises(ValueError, match="data column 'completions' has the name of a reward function's argument"):
        prepared([{"prompt": "one", "completions": 1}], tokenizer)
    with pytest.raises(ValueError, match=r"all 1 prompts are longer than rollout\.max_prompt_length=2"):
        prepared([{"prompt": "what is this ?"}], tokenizer, max_prompt_length=2)


@pytest.mark.parametrize("prompt", [None, 5, [], ["text"], [{"content": "x"}], {"role": "user", "content": "x"}])
def test_the_error_for_a_prompt_of_another_kind_names_its_row(tokenizer, prompt):
    with pytest.raises(ValueError, match="the prompt of row 1 is neither a text nor a conversation"):
        prepared([{"prompt": "one"}, {"prompt": prompt}], tokenizer)


def test_the_error_for_an_empty_prompt_names_its_row(tokenizer):
    plain = make_tokenizer()
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="the prompt of row 1 is empty"):
        prepared([{"prompt": "one"}, {"prompt": ""}], plain)


def test_conversations_need_a_chat_template():
    plain = make_tokenizer(chat_template=None)
    assert prepared([{"prompt": "one"}], plain).rows
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        prepared([{"prompt": user("one")}], plain)
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        prepared([{"prompt": "one"}], plain, system_prompt="be brief")
