"""The tokenizer of an export: that of the run, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rankup.grpo.cli.export.export import export_adapter, export_merged
from rankup.grpo.cli.export.model_card import read_run
from rankup.grpo.config import dump_config, load_config

SaveRun = Callable[..., Path]


def test_exports_have_the_tokenizer_of_the_run(save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path):
    run, tokenizer = save_run(), AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "mine")
    config = load_config(run / "config.yaml", [f"model.tokenizer={tmp_path / 'mine'}"])
    (run / "config.yaml").write_text(dump_config(config))
    export_adapter(read_run(run), tmp_path / "adapter")
    export_merged(read_run(run), tmp_path / "merged")
    for folder in (tmp_path / "adapter", tmp_path / "merged"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


OTHER_FILES = {  # of tokenizers, which loading and saving again would drop or rewrite
    "tokenizer.model": b"\x00pieces\xff",
    "tokenizer.model.v3": b"pieces",
    "spiece.model": b"pieces",
    "vocab.json": b'{"a":0 }',
    "merges.txt": b"#version: 0.2\na b\n",
    "qwen.tiktoken": b"IQ== 0\n",
    "special_tokens_map.json": b'{"eos_token":   "<eos>"}',
    "added_tokens.json": b"{ }",
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("has_own", [False, True])
def test_the_files_of_the_tokenizer_are_copied_byte_for_byte(
    save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path, merge: bool, has_own: bool
) -> None:
    base = shutil.copytree(tiny_model_path("llama"), tmp_path / "base")
    source = base
    if has_own:
        ignored = shutil.ignore_patterns("*.safetensors", "generation_config.json", "config.json")
        source = shutil.copytree(base, tmp_path / "tokenizer", ignore=ignored)
    (source / "additional_chat_templates").mkdir()
    for name, content in OTHER_FILES.items():
        (source / name).write_bytes(content)
    (source / "notes.json").write_text("{}")
    settings = source / "tokenizer_config.json"
    settings.write_bytes(json.dumps(json.loads(settings.read_text()), indent=7).encode() + b"\n\n")
    run = save_run(base=base)
    if has_own:
        config = load_config(run / "config.yaml", [f"model.tokenizer={source}"])
        (run / "config.yaml").write_text(dump_config(config))
    (export_merged if merge else export_adapter)(read_run(run), tmp_path / "out")
    names = {*OTHER_FILES, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == {
        name: (source / name).read_bytes() for name in names
    }
    assert not (tmp_path / "out" / "notes.json").exists()
    assert (tmp_path / "out" / "generation_config.json").is_file() == merge


@pytest.mark.parametrize("merge", [False, True])
def test_the_export_has_the_tokenizer_and_chat_template(
    save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path, merge: bool
) -> None:
    (export_merged if merge else export_adapter)(read_run(save_run()), tmp_path / "out")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_model_path("llama")))
    talk = [{"role": "user", "content": "2 + 2, ünïcode\n?"}]
    rendered = [t.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] for t in (ours, theirs)]
    assert rendered[0] == rendered[1] and len(rendered[0]) > 10
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("merge", [False, True])
def test_the_export_has_the_template_that_the_run_has_used(save_run: SaveRun, tmp_path: Path, merge: bool) -> None:
    run, template = save_run(), "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    config = load_config(run / "config.yaml", [f"data.chat_template={template}"])
    (run / "config.yaml").write_text(dump_config(config))
    (export_merged if merge else export_adapter)(read_run(run), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
