"""The command `rankup trl`: which names a script gets, its arguments, its errors, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trl

from rankup import RunInterrupted
from rankup.grpo.cli.main import main
from rankup.grpo.cli.trl.trl import split_words

COMMAND = Path(sys.executable).with_name("rankup")


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a script with this text by `rankup trl`, in this process."""
    monkeypatch.chdir(tmp_path)

    def run_text(text: str, *arguments: str, before: tuple[str, ...] = ()) -> Outcome:
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "script.py").write_text(text)
        status = main(["trl", *before, "folder/script.py", *arguments])
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return run_text


# -------------------------------------------------------------------------------------------------------- names

NAMES = """
import sys
from trl import GRPOConfig, GRPOTrainer
import trl
from trl.trainer import GRPOConfig as B, GRPOTrainer as C
from trl import SFTConfig, TrlParser, get_peft_config
print("heavy:", "trl.trainer.grpo_trainer" in sys.modules)
from trl.trainer.grpo_config import GRPOConfig as D
from trl.trainer.grpo_trainer import GRPOConfig as E, GRPOTrainer as F
import trl.trainer.grpo_trainer as module
from trl.rewards import think_format_reward
import rankup
for config in (GRPOConfig, trl.GRPOConfig, B, D, E, module.GRPOConfig):
    assert isinstance(config(), rankup.GRPOConfig)
for trainer in (GRPOTrainer, trl.GRPOTrainer, C, F, module.GRPOTrainer):
    assert trainer is rankup.GRPOTrainer
assert {each.__module__.split(".")[0] for each in (SFTConfig, TrlParser, get_peft_config, think_format_reward)} == {"trl"}
print("names checked")
"""


def test_all_ways_to_import_the_two_names_give_rankups_and_others_stay_trls(run):
    from trl.trainer.grpo_trainer import GRPOTrainer

    outcome = run(NAMES)
    assert outcome.status == 0
    assert outcome.out.endswith("names checked\n")
    assert outcome.out.startswith(
        f"rankup trl: GRPOConfig and GRPOTrainer are those of rankup, everything else is TRL {trl.__version__}\n"
    )
    assert getattr(trl, "GRPOTrainer") is GRPOTrainer  # noqa: B009  # type checkers find no such name
    assert GRPOTrainer.__module__ == "trl.trainer.grpo_trainer"
    assert sys.modules["trl.trainer.grpo_trainer"].GRPOTrainer is GRPOTrainer


@pytest.mark.slow
def test_trls_trainer_is_imported_only_if_the_script_names_its_module(tmp_path: Path):
    (tmp_path / "script.py").write_text(NAMES)
    result = subprocess.run([COMMAND, "trl", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1:] == ["heavy: False", "names checked"]


def test_trls_trainers_that_derive_from_it_are_refused(run):
    outcome = run("from trl.experimental.gmpo import GMPOConfig, GMPOTrainer")
    assert outcome.status == 1
    assert outcome.err.startswith("rankup: error: GMPOTrainer overrides ")


def test_without_trl_the_error_says_what_to_do(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    outcome = run("import trl")
    assert outcome.status == 1
    assert outcome.err == (
        "rankup: error: trl is not installed: change the script's import to `from rankup import ...`, or pip install trl\n"
    )


# --------------------------------------------------------------------------------------------------- arguments

SURROUNDINGS = """
import sys
from beside import VALUE
print(sys.argv, sys.path[0], __name__, __file__, VALUE)
"""


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["-h"], ["--traceback"], ["--resume", "x"], ["a=1", "--", "--b"], ["--", "x"], ["trl", "--he"], ["-"]],
)
def test_everything_after_the_script_belongs_to_it(run, tmp_path: Path, arguments: list[str]):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").write_text("VALUE = 5")
    argv, path = sys.argv, list(sys.path)
    shown = run(SURROUNDINGS, *arguments).out.splitlines()[1]
    assert shown == f"{['folder/script.py', *arguments]} {tmp_path / 'folder'} __main__ folder/script.py 5"
    assert sys.argv is argv and sys.path == path


def test_words_of_other_commands_are_not_split():
    for words in (["train", "trl", "x"], [], ["--help"], ["trl"], ["trl", "--help"]):
        assert split_words(words) == (words, [])
    assert split_words(["trl", "--traceback", "a.py", "b.py"]) == (["trl", "--traceback", "a.py"], ["b.py"])


def test_the_help_of_the_command_has_its_examples(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["trl", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: rankup trl [-h] [--traceback] SCRIPT.py [arguments of the script ...]" in shown
    assert "rankup trl train_grpo.py --config grpo.yaml" in shown


def test_a_script_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["trl", "no_such_script.py"]) == 1
    assert capsys.readouterr().err == "rankup: error: script not found: no_such_script.py\n"


# ------------------------------------------------------------------------------------------------------- errors

WRONG_OPTION = "from trl import GRPOConfig\nGRPOConfig(deepspeed='ds.json')"
WRONG_DATA = """
import trl

trainer = trl.GRPOTrainer(
    model="smollm2-135m-instruct",
    reward_funcs=lambda completions, **kwargs: [0.0],
    args=trl.GRPOConfig(),
    train_dataset="none.jsonl",
)
"""
WRONG_WORD = """
from trl import GRPOConfig, TrlParser

TrlParser(GRPOConfig).parse_args_and_config(["--learning_rate", "-1"])
"""


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (WRONG_OPTION, "deepspeed: is not supported; "),
        (WRONG_DATA, "none.jsonl"),
        (WRONG_WORD, "optim.learning_rate: must be "),
    ],
)
def test_an_error_that_rankup_raises_is_one_line(run, text: str, error: str):
    outcome = run(text)
    assert outcome.status == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith("rankup: error: ") and error in line


def test_the_traceback_of_such_an_error_is_shown_with_its_option(run):
    with pytest.raises(ValueError, match="deepspeed"):
        run(WRONG_OPTION, before=("--traceback",))


@pytest.mark.parametrize(
    ("text", "last_line"),
    [
        ("def f():\n    raise ValueError('mine')\nf()", "ValueError: mine"),
        ("open('no_such_file')", "FileNotFoundError: [Errno 2] No such file or directory: 'no_such_file'"),
        ("import json\njson.loads('{')", "json.decoder.JSONDecodeError: "),
        ("from trl import NoSuchName", "ImportError: cannot import name 'NoSuchName' from 'trl'"),
        ("from trl import GRPOTrainer\nGRPOTrainer(no_such_argument=1)", "TypeError: GRPOTrainer.__init__() got an unexpected"),
        ("import trl\nclass C(trl.GRPOTrainer):\n    x = int('y')", "ValueError: invalid literal for int()"),
        ("1 +", "SyntaxError: invalid syntax"),
    ],
)
def test_the_scripts_own_errors_keep_their_traceback(run, text: str, last_line: str):
    outcome = run(text)
    assert outcome.status == 1
    lines = outcome.err.splitlines()
    assert lines[-1].startswith(last_line)
    assert "rankup: error" not in outcome.err and "runpy" not in outcome.err
    if "SyntaxError" not in last_line:
        assert lines[0] == "Traceback (most recent call last):" and lines[1].startswith('  File "folder/script.py", line ')


FAILING_CALLBACK = """
import sys
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise ValueError("in the callback")

def reward(completions, **kwargs):
    {in_reward}
    return [float(len(text)) for text in completions]

args = GRPOConfig(
    output_dir="out", use_vllm=False, max_completion_length=4, max_steps=3, per_device_train_batch_size=8, bf16=False
)
rows = [{{"prompt": str(n)}} for n in range(4)]
GRPOTrainer(model=sys.argv[1], reward_funcs=reward, args=args, train_dataset=rows, callbacks=[{callbacks}]).train()
print("the end")
"""


@pytest.mark.runs
def test_an_error_in_code_that_rankup_calls_keeps_its_traceback(run, tiny_model_path):
    outcome = run(FAILING_CALLBACK.format(in_reward="", callbacks="Failing()"), str(tiny_model_path("llama")))
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1] == "ValueError: in the callback"


@pytest.mark.runs
def test_an_error_in_a_reward_is_shown_as_in_other_commands(run, tiny_model_path):
    outcome = run(FAILING_CALLBACK.format(in_reward="1 / 0", callbacks=""), str(tiny_model_path("llama")))
    assert outcome.status == 1
    assert outcome.err.startswith("rankup: error: ") and "division by zero" in outcome.err


# -------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize(("call", "code"), [("sys.exit(3)", 3), ("sys.exit()", None), ("sys.exit('because')", "because")])
def test_the_scripts_exit_status_passes_through(run, call: str, code: object):
    with pytest.raises(SystemExit) as exit_:
        run(f"import sys\n{call}")
    assert exit_.value.code == code


def test_ctrl_c_outside_of_a_run_is_the_exit_status_that_shells_expect(run):
    assert run("raise KeyboardInterrupt").status == 130


@pytest.mark.runs
def test_ctrl_c_saves_the_run_and_says_how_to_resume(run, tiny_model_path, capsys):
    script = FAILING_CALLBACK.format(in_reward="import os, signal; os.kill(os.getpid(), signal.SIGINT)", callbacks="")
    with pytest.raises(RunInterrupted) as interrupted:
        run(script, str(tiny_model_path("llama")))
    assert interrupted.value.code == 0 and interrupted.value.signal == "SIGINT"
    shown = capsys.readouterr().out
    assert "to resume: set train(resume_from_checkpoint=True) in folder/script.py, and run it again" in shown
    assert "the end" not in shown and Path("out/checkpoints/step_000001").is_dir()
