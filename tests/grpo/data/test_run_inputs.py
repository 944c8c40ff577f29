"""What a run reads of its data sets: as many rows of a stream as it can use, and several evaluation sets by name."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_runs import ROWS, tiny_config
from transformers import AutoTokenizer

from rankup.grpo.config import GRPOConfig, load_config
from rankup.grpo.data.prompts import Prompt, PromptData
from rankup.grpo.data.run_inputs import RunInputs, load_run_inputs, read_streams, with_template_text
from rankup.grpo.user_inputs import UserInputs

TRAIN = datasets.Dataset.from_list(ROWS)


def endless() -> Iterator[dict[str, Any]]:
    return ({"prompt": f"count to {n}", "target": n} for n in itertools.count())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def load(tiny_model_path, tmp_path: Path) -> Callable[..., RunInputs]:
    """The inputs of a run of two steps of three prompts."""

    def inputs(train: Any, evaluation: Any = None, **changes: Any) -> RunInputs:
        config = tiny_config(tmp_path / "run", name=str(tiny_model_path("llama")), **changes)
        return load_run_inputs(config, train, evaluation)

    return inputs


def texts(data: PromptData | None) -> list[str]:
    assert data is not None
    return [str(prompt.content) for prompt in data.rows]


def of_sets(inputs: RunInputs) -> dict[str | None, list[str]]:
    """The texts of each evaluation set."""
    assert inputs.eval_prompts is not None
    names = dict.fromkeys(prompt.eval_set for prompt in inputs.eval_prompts.rows)
    return {name: [str(p.content) for p in inputs.eval_prompts.rows if p.eval_set == name] for name in names}


# ------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("make", [endless, lambda: datasets.IterableDataset.from_generator(endless)])
def test_of_an_infinite_training_set_the_prompts_of_all_steps_are_read(load, make):
    assert texts(load(make(), max_steps=4).train_prompts) == [f"count to {n}" for n in range(12)]


def test_the_training_split_of_a_dictionary_of_streams_is_read(load):
    stream = datasets.IterableDataset.from_generator(endless)
    both = datasets.IterableDatasetDict({"train": stream, "extra": stream})
    assert len(load(both).train_prompts.rows) == 6
    assert len(load(both, train_split="extra", max_steps=1).train_prompts.rows) == 3
    assert len(load(datasets.DatasetDict({"train": TRAIN, "test": TRAIN})).train_prompts.rows) == 12


def test_a_stream_and_a_number_of_epochs_are_refused(load):
    message = r"optim\.max_steps must be set: the training data has no length .*optim\.num_train_epochs=2 is no number of steps"
    with pytest.raises(ValueError, match=message):
        load(endless(), max_steps=None, num_train_epochs=2)
    assert len(load(endless(), max_steps=1, num_train_epochs=2).train_prompts.rows) == 3, "max_steps takes precedence"
    assert len(load(ROWS, max_steps=None, num_train_epochs=2).train_prompts.rows) == 12


def test_of_a_stream_for_evaluation_eval_rows_are_read_or_all(load):
    assert texts(load(ROWS, endless(), eval_rows=5).eval_prompts) == [f"count to {n}" for n in range(5)]
    assert len(load(ROWS, iter(ROWS)).eval_prompts.rows) == 12


def test_inputs_with_streams_can_be_sent_to_workers(tmp_path: Path):
    streamed = datasets.IterableDatasetDict({"easy": datasets.IterableDataset.from_generator(endless)})
    inputs = UserInputs(reward_funcs="last_integer", train_dataset=endless(), eval_dataset=streamed)
    sent = pickle.loads(pickle.dumps(inputs.without_streams(tiny_config(tmp_path, eval_rows=2))))
    assert sent.train_dataset == list(itertools.islice(endless(), 6)) and sent.eval_dataset == {"easy": ROWS[:2]}
    assert sent.reward_funcs == "last_integer"


def test_workers_get_the_rows_of_streams(tmp_path: Path):
    stream = datasets.IterableDataset.from_generator(endless)
    config = tiny_config(tmp_path, eval_rows=2)
    assert read_streams(config, endless(), endless()) == (list(itertools.islice(endless(), 6)), ROWS[:2])
    by_split = datasets.IterableDatasetDict({"train": stream})
    train, sets = read_streams(config, by_split, {"a": stream, "b": "b.jsonl", "c": TRAIN})
    assert (train, sets) == (list(itertools.islice(endless(), 6)), {"a": ROWS[:2], "b": "b.jsonl", "c": TRAIN})
    assert read_streams(config, ROWS, datasets.IterableDatasetDict({"easy": stream})) == (ROWS, {"easy": ROWS[:2]})
    assert read_streams(config, None, None) == (None, None)
    assert read_streams(config, "train.jsonl", TRAIN) == ("train.jsonl", TRAIN)
    with pytest.raises(ValueError, match=r"optim\.max_steps must be set"):
        read_streams(tiny_config(tmp_path, max_steps=None, num_train_epochs=1), endless(), None)


# ------------------------------------------------------------------------------------------ evaluation sets


def test_several_evaluation_sets_of_any_kind_are_evaluated_by_name(load, tmp_path: Path):
    hard = write(tmp_path / "hard.jsonl", ROWS[3:5])
    inputs = load(ROWS, {"easy": ROWS[:2], "hard": str(hard), "stream": iter(ROWS[5:6])})
    assert of_sets(inputs) == {
        "easy": ["count to 0", "count to 1"], "hard": ["count to 3", "count to 4"], "stream": ["count to 5"],
    }  # fmt: skip
    assert of_sets(load(ROWS, ROWS[:1])) == {None: ["count to 0"]}


def test_all_splits_of_a_dictionary_of_data_sets_are_evaluated(load):
    by_split = datasets.DatasetDict({datasets.Split.TEST: TRAIN, "dev": TRAIN.select(range(1))})
    assert {name: len(rows) for name, rows in of_sets(load(ROWS, by_split)).items()} == {"test": 12, "dev": 1}
    streams = datasets.IterableDatasetDict({"dev": datasets.IterableDataset.from_generator(endless)})
    assert of_sets(load(ROWS, streams, eval_rows=1)) == {"dev": ["count to 0"]}


def test_eval_rows_counts_for_each_set(load):
    inputs = load(ROWS, {"easy": ROWS, "hard": endless()}, eval_rows=2)
    assert of_sets(inputs) == {"easy": ["count to 0", "count to 1"], "hard": ["count to 0", "count to 1"]}


def test_sets_with_other_columns_get_none_for_them(load):
    inputs = load(ROWS, {"easy": ROWS[:1], "hard": [{"prompt": "x", "tests": "y"}]})
    assert [prompt.columns for prompt in inputs.eval_prompts.rows] == [
        {"target": 0, "tests": None}, {"target": None, "tests": "y"},
    ]  # fmt: skip


def test_long_prompts_of_all_sets_are_counted_together(load):
    long = {"prompt": "x" * 500, "target": 0}
    assert load(ROWS, {"easy": [long, *ROWS], "hard": [long, long, *ROWS]}).eval_prompts.dropped == 3


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\n", 5])
def test_a_name_that_would_make_metrics_ambiguous_is_refused(load, name):
    with pytest.raises(ValueError, match=r"eval_dataset: an evaluation set cannot be called .*without slashes and white space"):
        load(ROWS, {name: ROWS})


def test_mistakes_in_a_set_name_it(load, tmp_path: Path):
    with pytest.raises(ValueError, match="eval_dataset: the mapping of evaluation sets is empty"):
        load(ROWS, {})
    with pytest.raises(ValueError, match="evaluation set 'hard': the data set has no rows"):
        load(ROWS, {"easy": ROWS, "hard": []})
    with pytest.raises(ValueError, match="evaluation set 'hard': no column 'prompt'"):
        load(ROWS, {"easy": ROWS, "hard": [{"question": "x"}]})
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.jsonl"):
        load(ROWS, {"easy": str(tmp_path / "nowhere.jsonl")})


# ------------------------------------------------------------------------------------------ run files


def test_a_run_file_may_map_names_to_files_beside_it(tiny_model_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "there"
    folder.mkdir()
    for name, rows in (("train", ROWS), ("easy", ROWS[:1]), ("hard", ROWS[1:4])):
        write(folder / f"{name}.jsonl", rows)
    (folder / "make.py").write_text("def rows(): return [{'prompt': 'made'}]\n")
    (folder / "run.yaml").write_text(
        "data: {train: train.jsonl, eval: {easy: easy.jsonl, hard: hard.jsonl, made: 'make.py:rows'}}\n"
    )
    monkeypatch.chdir(tmp_path)
    model = f"model={tiny_model_path('llama')}"
    config = load_config("there/run.yaml", [model, "data.eval.easy=there/hard.jsonl", "data.eval_rows=2"])
    assert config.data.eval == {"easy": "there/hard.jsonl", "hard": "there/hard.jsonl", "made": "there/make.py:rows"}
    assert {name: len(rows) for name, rows in of_sets(load_run_inputs(config)).items()} == {"easy": 2, "hard": 2, "made": 1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a b": "x.jsonl"}, r"data\.eval: an evaluation set cannot be called 'a b'"),
        ({"": "x.jsonl"}, r"data\.eval: an evaluation set cannot be called ''"),
        ({}, r"data\.eval: the mapping of evaluation sets is empty"),
        ({"easy": 5}, r"data\.eval\.easy: must be text"),
        (5, r"^data\.eval: must be text \(got 5\)$"),
        ([], r"data\.eval: must have 1 or more items"),
        ({"easy": ["x.jsonl", 5]}, r"data\.eval\.easy\.1: must be text"),
    ],
)
def test_a_mapping_with_mistakes_is_refused_in_a_run_file(value, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(data={"eval": value})


# ------------------------------------------------------------------------------------------ tokenizer

TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


def test_a_chat_template_is_text_or_a_file_beside_the_run_file(
    tiny_model_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "mine.jinja").write_text(TEMPLATE)
    write(folder / "train.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    (folder / "run.yaml").write_text("data: {train: train.jsonl, chat_template: mine.jinja}\n")
    monkeypatch.chdir(tmp_path)
    for overrides in ([], [f"data.chat_template={json.dumps(TEMPLATE)}"], [f"data.chat_template={folder}/mine.jinja"]):
        config = load_config("there/run.yaml", [f"model={tiny_model_path('llama')}", *overrides])
        inputs = load_run_inputs(config)
        assert inputs.tokenizer.decode(list(inputs.train_prompts.rows[0].token_ids)) == "<a>"
        assert inputs.tokenizer.chat_template == TEMPLATE == with_template_text(config).data.chat_template


def test_a_chat_template_that_is_no_file_is_an_error(load):
    with pytest.raises(FileNotFoundError, match=r"^data\.chat_template: no file nowhere\.jinja"):
        load(ROWS, chat_template="nowhere.jinja")


def test_a_token_beyond_the_embedding_is_found_by_row_in_every_data_set(tiny_model_path, tmp_path: Path, load):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "more")
    new = [{"prompt": "count to <new>", "target": 0}]
    reason = r"the prompt of row 12 has the token '<new>' with the id 260, and the model's embedding has 260 rows: .*resize"
    for inputs in ([[*ROWS, *new]], [ROWS, {"easy": ROWS, "hard": [*ROWS, *new]}]):
        with pytest.raises(ValueError, match=reason):
            load(*inputs, tokenizer=str(tmp_path / "more"))
    dropped = load(ROWS, [*ROWS, *new], tokenizer=str(tmp_path / "more"), on_bad_row="drop")
    assert dropped.counts()["evaluation"]["bad_rows"] == 1


def test_bad_rows_of_sets_name_them(load):
    bad = [{"prompt": ""}]
    inputs = load(ROWS, {"easy": [*ROWS, *bad], "hard": [*bad, *ROWS]}, on_bad_row="drop")
    assert inputs.eval_prompts.bad_rows == (
        "evaluation set 'easy': the prompt of row 12 is empty: remove the row",
        "evaluation set 'hard': the prompt of row 0 is empty: remove the row",
    )
    with pytest.raises(ValueError, match="evaluation set 'hard': the prompt of row 0 is empty"):
        load(ROWS, {"easy": ROWS, "hard": bad})


# ------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_of_a_single_set_has_not_changed_and_sets_are_told_apart():
    def fingerprint(*eval_sets: str | None) -> Any:
        rows = [Prompt("one", (1, 2), {"answer": 1}), Prompt("two", (3,), {"answer": {2.5}})]
        evaluation = [Prompt(row.content, row.token_ids, row.columns, name) for name in eval_sets for row in rows]
        eval_prompts = PromptData(rows=evaluation, dropped=0) if eval_sets else None
        inputs = RunInputs(
            model_path="",
            tokenizer=None,  # type: ignore[arg-type]
            train_prompts=PromptData(rows=rows, dropped=1),
            eval_prompts=eval_prompts,
        )
        assert inputs.fingerprint()["training data"] == two_rows
        return inputs.fingerprint()["evaluation data"]

    two_rows = {"rows": 2, "hash": "fb838ad70ce16ce9141822c573c3ffb4"}
    assert fingerprint() is None
    assert fingerprint(None) == two_rows
    assert fingerprint("easy", "hard") == {"easy": two_rows, "hard": two_rows}


def test_loaded_evaluation_data_has_the_fingerprint_of_the_same_training_data(load):
    found = load(ROWS, ROWS).fingerprint()
    assert found["evaluation data"] == found["training data"]


@pytest.mark.parametrize(
    "values",
    [(1, "1", 1.0, True), (None, "", "None", []), ({1: 2}, {"1": 2}, [[1, 2]]), (b"a", "a", b"b"), (0.1, 0.1 + 2**-56)],
)
def test_the_fingerprint_changes_with_the_type_of_a_value(load, values):
    hashes = {load([{"prompt": "a", "answer": value}]).fingerprint()["training data"]["hash"] for value in values}
    assert len(hashes) == len(values)


# ------------------------------------------------------------------------------------------ files


def test_options_about_files_reach_every_data_set(load, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_bytes("prompt,answer\ncafé,007\nthé,8\n".encode("latin-1"))
    names = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    options = {"encoding": "latin-1", "column_types": {"answer": "int"}}
    inputs = load(names, {"some": names, "pattern": str(tmp_path / "*.csv")}, **options, train_split="train[1:3]", eval_rows=3)
    assert [(prompt.content, prompt.columns) for prompt in inputs.train_prompts.rows] == [
        ("thé", {"answer": 8}),
        ("café", {"answer": 7}),
    ]
    assert of_sets(inputs) == {"some": ["café", "thé", "café"], "pattern": ["café", "thé", "café"]}
    with pytest.raises(ValueError, match=r"data\.column_types: no column 'anwser' \(columns: prompt, answer\)"):
        load(names, encoding="latin-1", column_types={"anwser": "int"})


def test_a_key_that_a_row_lacks_is_none_for_reward_functions(load):
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b", "y": None}]
    assert [prompt.columns for prompt in load(rows).train_prompts.rows] == [{"x": 1, "y": None}, {"x": None, "y": None}]
