"""Models that training cannot use: every command says so in one sentence, before anything is loaded or started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rankup.grpo.cli.main import main

COMMANDS = ("train", "eval", "check", "plan", "export")


@pytest.fixture
def words_of(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> Callable[[str], list[str]]:
    """The words of a command about the model `tmp_path / "model"`."""
    shutil.copytree(tiny_model_path("llama"), tmp_path / "model")
    values = {"model": str(tmp_path / "model"), "data": {"train": "gone.jsonl", "eval": "gone.jsonl"}, "engine": "torch"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "rewards": {"functions": ["last_integer"]}}))
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").touch()
    shutil.copyfile(tmp_path / "run.yaml", tmp_path / "run" / "config.yaml")
    names = {"plan": tmp_path / "model", "export": tmp_path / "run"}
    return lambda command: [command, str(names.get(command, tmp_path / "run.yaml"))]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_quantized_model(words_of, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    assert main(words_of(command)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rankup: error: model {tmp_path / 'model'}: its weights are quantized already (GPTQ), and training")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter(words_of, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    assert main(words_of(command)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    model = tmp_path / "model"
    assert line == (
        f"rankup: error: model {model} is an adapter, not a model: set model.name to its base model, someone/base, and "
        f"lora.start_from={model}"
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("content", "reason"), [("[]", "is no mapping"), ("{", "is no JSON: "), ("7", "is no mapping")])
def test_a_damaged_configuration(
    words_of, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: str, reason: str
) -> None:
    (tmp_path / "model" / "config.json").write_text(content)
    assert main(words_of(command)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rankup: error: model {tmp_path / 'model'}: its config.json {reason}")


def test_a_kind_of_model_that_transformers_does_not_know(words_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no-such-type"}')
    row, model = tmp_path / "rows.jsonl", tmp_path / "model"
    row.write_text('{"prompt": "2+2", "answer": 4}')
    assert main([*words_of("train"), f"data.train={row}", f"data.eval={row}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rankup: error: model {model}: cannot read its config.json: ") and "no-such-type" in line


def test_a_run_folder(words_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    (model / "config.json").unlink()
    (model / "adapter").mkdir()
    (model / "adapter" / "adapter_config.json").write_text("{}")
    assert main(words_of("train")) == 1
    assert capsys.readouterr().err == (
        f"rankup: error: model {model} is a run folder, not a model: set model.name to its base model and "
        f"lora.start_from={model / 'adapter'}\n"
    )
