"""The command `rankup`: bad input ends in one clear line, before an engine starts and before anything is written."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny_models import tiny_tokenizer

from rankup.grpo.cli.eval.command import EXAMPLES as EVAL_EXAMPLES
from rankup.grpo.cli.eval.compare import EXAMPLES as COMPARE_EXAMPLES
from rankup.grpo.cli.main import EXAMPLES, main, make_parser

RUN_FILE = """
model: tiny
data: {train: rows.jsonl, eval: rows.jsonl}
rewards: {functions: reward.py:score}
"""
REWARD = """
def score(completions, **kwargs):
    return [float(len(text)) for text in completions]
"""


@dataclass
class Outcome:
    """The result of a command."""

    status: int
    out: str
    error_lines: list[str]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a run file `run.yaml`, its data, its reward function, and a model without weights."""
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tiny")
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path / "tiny")
    save_file({}, tmp_path / "tiny" / "model.safetensors")
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    (tmp_path / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "1 + 1?"}]}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder except Python's caches; empty folders too."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder" for path in paths}


@pytest.fixture
def rankup(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command in this process; fails if it makes an engine, or changes anything in the working directory."""

    def refuse(*args: object) -> None:
        pytest.fail("the command started an engine")

    for engine in ("RolloutEngine", "TorchEngine"):
        monkeypatch.setattr(f"rankup.grpo.update.session.{engine}", refuse)

    def run(*arguments: str) -> Outcome:
        before = contents(project)
        capfd.readouterr()
        status = main(arguments)
        captured = capfd.readouterr()
        assert contents(project) == before
        return Outcome(status, captured.out, captured.err.splitlines())

    return run


BAD_INPUT = {
    "unknown key": (["run.yaml", "optim.learning_rat=1"], ["optim.learning_rat", "did you mean optim.learning_rate?"]),
    "unknown flat key": (["run.yaml", "learning_rat=1"], ["learning_rat", "did you mean optim.learning_rate?"]),
    "not an override": (["run.yaml", "seed"], ["seed", "section.field=value"]),
    "rank 256": (["run.yaml", "lora.rank=256"], ["lora.rank", "at most 128", "256", "vLLM's buffers", "quality"]),
    "missing run file": (["other.yaml"], ["run file not found", "other.yaml"]),
    "missing data file": (["run.yaml", "data.train=other.jsonl"], ["other.jsonl"]),
    "empty data set": (["run.yaml", "data.train=empty.jsonl"], ["empty.jsonl", "empty"]),
    "empty evaluation set": (["run.yaml", "data.eval=empty.jsonl"], ["empty.jsonl", "empty"]),
    "no training data": (["run.yaml", "data.train=null"], ["data.train"]),
    "missing prompt column": (
        ["run.yaml", "data.prompt_column=question"],
        ["'question'", "data.prompt_column", "'prompt'", "'answer'"],
    ),
    "reward not in its file": (["run.yaml", "rewards.functions=reward.py:scor"], ["'scor'", "did you mean score?"]),
    "reward file missing": (["run.yaml", "rewards.functions=other.py:score"], ["other.py"]),
    "reward module missing": (["run.yaml", "rewards.functions=no_such_module:score"], ["no_such_module"]),
    "no chat template": (["run.yaml", "data.train=chat.jsonl"], ["chat template", "plain-text prompts"]),
    "no chat template for a system prompt": (
        ["run.yaml", "data.system_prompt=Be brief."],
        ["chat template", "data.system_prompt"],
    ),
    "no such model folder": (["run.yaml", "model=./other"], ["model ./other", "no such folder"]),
    "invalid model name": (["run.yaml", "model=not a name"], ["model not a name", "smollm2-135m-instruct"]),
    "prompts too long": (["run.yaml", "rollout.max_prompt_length=2"], ["rollout.max_prompt_length=2"]),
}


@pytest.mark.parametrize(("arguments", "parts"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_clear_line_and_nothing_else(
    rankup: Callable[..., Outcome], arguments: list[str], parts: list[str]
):
    outcome = rankup("train", *arguments)
    assert outcome.status == 1
    (line,) = outcome.error_lines
    assert line.startswith("rankup: error: ")
    assert [part for part in parts if part not in line] == []


def test_two_mistakes_are_two_lines(rankup: Callable[..., Outcome]):
    outcome = rankup("train", "run.yaml", "lora.rank=256", "optim.max_steps=0")
    assert outcome.status == 1
    assert len(outcome.error_lines) == 2
    assert "lora.rank" in outcome.error_lines[0] and "optim.max_steps" in outcome.error_lines[1]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["check", "run.yaml", "model=./other"], "model ./other: no such folder"),
        (["check", "other.yaml"], "run file not found: other.yaml"),
        (["eval", "runs/other"], "run file not found: runs/other"),
        (["eval", "run.yaml", "data.eval=null"], "no evaluation data: set data.eval"),
        (["eval", "tiny"], "tiny is neither a run folder nor a run file: to evaluate a model or an adapter, give its data"),
        (["eval", "run.yaml", "--checkpoint", "best"], "--checkpoint is for a run folder, and run.yaml is none"),
        (["eval", "tiny", "--data", "rows.jsonl"], "no reward functions"),
        (["eval", "tiny", "--data", "rows.jsonl", "--data", "chat.jsonl"], "--data: several sets need names"),
        (["eval", "tiny", "--data", "a=rows.jsonl", "--data", "a=chat.jsonl"], "--data: give each set its own name"),
        (["eval", "tiny", "--data", "a=rows.jsonl", "--reward", "b=last_integer"], "rewards.eval_functions.b: no evaluation"),
        (["eval", "run.yaml", "--top-p", "0.9"], "data.eval_top_p: has no effect on greedy evaluations"),
        (["eval", "run.yaml", "--samples", "2", "--temperature", "0"], "data.eval_temperature: must be above 0"),
        (["eval", "run.yaml", "--output", "tiny"], "--output tiny is a folder"),
        (["compare", "run.yaml", "run.yaml"], "run.yaml cannot be read as an evaluation"),
        (["compare", "tiny", "tiny"], "tiny has no results of an evaluation: rankup eval tiny makes some"),
    ],
)
def test_errors_of_eval_and_check_are_one_line(rankup: Callable[..., Outcome], arguments: list[str], part: str):
    outcome = rankup(*arguments)
    assert outcome.status == 1
    (line,) = outcome.error_lines
    assert part in line


def test_the_traceback_is_shown_with_its_option(rankup: Callable[..., Outcome]):
    with pytest.raises(ValueError, match=r"lora\.rank"):
        rankup("train", "run.yaml", "lora.rank=256", "--traceback")


def run_command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a new process."""
    command = Path(sys.executable).with_name("rankup")
    return subprocess.run(
        [command, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run.yaml", "lora.rnk=64"], "did you mean lora.rank?"),
        (["run.yaml", "model=nobody/no-such-model"], "model nobody/no-such-model: no folder of this name"),
    ],
    ids=["unknown key", "unknown model"],
)
def test_errors_of_the_installed_command_are_one_line(project: Path, arguments: list[str], part: str):
    before = contents(project)
    result = run_command("train", *arguments, cwd=project, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("rankup: error: ") and part in line
    assert contents(project) == before


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        (["--help"], "rankup train configs/quickstart.yaml"),
        (["train", "--help"], "rankup train configs/quickstart.yaml"),
        (["check", "--help"], "rankup train configs/quickstart.yaml"),
        (["eval", "--help"], "rankup eval runs/quickstart"),
        (["compare", "--help"], "rankup compare runs/a runs/b"),
    ],
)
def test_help_shows_examples(capsys: pytest.CaptureFixture[str], arguments: list[str], example: str):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert f"examples:\n  {example}" in capsys.readouterr().out


def test_examples_of_the_help_are_commands_that_work():
    texts = [EXAMPLES, EVAL_EXAMPLES, COMPARE_EXAMPLES]
    lines = [line for text in texts for line in text.replace("\\\n", "").splitlines()[1:]]
    examples = [shlex.split(line.strip().split("  ")[0], comments=True) for line in lines]
    assert len(examples) >= 20
    for _, *arguments in examples:
        assert make_parser().parse_args(arguments).command is not None


def test_without_a_command_the_usage_is_shown(tmp_path: Path):
    result = run_command(cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.startswith("usage: rankup")
    assert result.stdout == ""
