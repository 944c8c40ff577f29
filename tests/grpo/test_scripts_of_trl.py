"""Scripts in the style of TRL's documentation (`tests/scripts_of_trl`), with the import changed and with nothing changed, and
what TRL itself logs in them.

Each prints, as its last line with brackets, the keys of every entry of `trainer.state.log_history`.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import trl
import yaml
from calling_models import make_calling_model
from script_data import make_data

from rankup.grpo.cli.main import main

FOLDER = Path(__file__).parents[1] / "scripts_of_trl"


@dataclass(frozen=True)
class Expected:
    """What a script logs: training steps, evaluations, and a part of what it prints."""

    steps: int
    evaluations: int = 0
    text: str = ""


SCRIPTS = {
    "quick_start": Expected(2, text='"adapter_config.json"'),
    "data_columns": Expected(2, text="steps seen by the reward: [0, 1]; 2 updates"),
    "several_rewards": Expected(3),
    "async_reward": Expected(2),
    "classifier": Expected(2),
    "classifier_object": Expected(2),
    "conversations": Expected(2),
    "evaluation": Expected(2, evaluations=3, text="eval_reward in the metrics: True"),
    "resume": Expected(3, text="3 updates, 3 of them in the log"),
    "callbacks": Expected(
        2, text="2 rewards logged; train_begin, step_begin 0, step_end 1, step_begin 1, step_end 2, train_end"
    ),
    "early_stopping": Expected(2, evaluations=2, text="2 updates"),
    "peft_config": Expected(2, text='layers.1.self_attn.v_proj.lora_A.weight": [2, 96]'),
    "iterable": Expected(2),
    "peft_model": Expected(2, text='"adapter_model.safetensors"'),
    "tools": Expected(2, text="called: True"),
    "environment": Expected(2, text="called: True"),
    "environment_data": Expected(2, text="rewards of the environment: [True, True]"),
}

CALLS = ("tools", "environment", "environment_data")
"""Those with a model that calls `multiply`."""

NOT_LOGGED = {
    "step_time": "time/rollout, time/reward, time/train and time/publish",
    "total_flos": "floating-point operations are not counted",
    "clip_ratio/low_mean": "nothing is clipped in the first update on new completions, and these scripts make no other",
    "clip_ratio/low_min": "see clip_ratio/low_mean",
    "clip_ratio/high_mean": "see clip_ratio/low_mean",
    "clip_ratio/high_max": "see clip_ratio/low_mean",
    "clip_ratio/region_mean": "see clip_ratio/low_mean",
}
"""Keys of TRL's training entries and of its last entry that rankup does not log in these scripts."""

WITHOUT_UPDATE = {"loss", "grad_norm", "entropy"}
"""Keys that a step lacks whose groups all have zero reward variance: it makes no update, as in `early_stopping`."""

NOT_EVALUATED = {
    "eval_loss": "an evaluation has no loss",
    "eval_entropy": "greedy completions are not passed through the trainer's forward",
    "eval_reward_std": "an evaluation has one completion of each prompt, so groups have no spread",
    "eval_frac_reward_zero_std": "see eval_reward_std",
    "eval_num_tokens": "tokens are counted in training",
    "eval_steps_per_second": "eval_samples_per_second is",
    **{f"eval_{name}": reason for name, reason in NOT_LOGGED.items() if "/" in name},
    **{f"eval_completions/{of}": "mean_length and clipped_ratio are" for of in ("min_length", "max_length")},
    **{f"eval_completions/{of}_terminated_length": "see eval_completions/min_length" for of in ("mean", "min", "max")},
}
"""Those of its evaluations. A name with a slash at its end stands for all that begin with it."""


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b


@pytest.fixture(scope="session")
def data(tiny_model_path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_data(tmp_path_factory.mktemp("script") / "data", model=tiny_model_path("llama")))


@pytest.fixture(scope="session")
def calling_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_calling_model(tmp_path_factory.mktemp("calls") / "model", multiply, {"a": 6, "b": 7}))


@pytest.fixture
def inputs(request: pytest.FixtureRequest, tiny_model_path, data: str) -> list[str]:
    """The arguments of a script: a model's folder and a folder of data."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("name") in CALLS:
        return [request.getfixturevalue("calling_model"), data]
    return [str(tiny_model_path("llama")), data]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a script. Its data sets are cached there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def logged(output: str) -> list[list[str]]:
    """The keys of every log entry that a script has printed."""
    return json.loads([line for line in output.splitlines() if line.startswith('[["')][-1])


def kind(keys: list[str]) -> str:
    if "reward" in keys:
        return "train"
    return "eval" if any(key.startswith("eval_") for key in keys) else "end"


def kinds(entries: list[list[str]]) -> dict[str, int]:
    return dict(Counter(kind(keys) for keys in entries))


def check(name: str, output: str) -> None:
    """The script has made its steps and evaluations, and printed what it should."""
    expected = SCRIPTS[name]
    evaluations = {"eval": expected.evaluations} if expected.evaluations else {}
    assert kinds(logged(output)) == {"train": expected.steps, **evaluations, "end": 1}
    assert expected.text in output


def test_every_script_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SCRIPTS)


@pytest.mark.runs
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_with_another_import(name: str, inputs, here: Path, monkeypatch, capsys):
    text = (FOLDER / f"{name}.py").read_text()
    for ours in ("GRPOConfig, GRPOTrainer", "GRPOConfig", "GRPOTrainer"):
        for module in ("trl", "trl.trainer.grpo_config", "trl.trainer.grpo_trainer"):
            text = text.replace(f"from {module} import {ours}\n", f"from rankup import {ours}\n")
    text = text.replace("import trl\n", "import rankup as trl\n").replace(
        'GRPOConfig(\n    "out"', 'GRPOConfig(\n    output_dir="out"'
    )
    (here / "script.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["script.py", *inputs])
    runpy.run_path("script.py", run_name="__main__")
    check(name, capsys.readouterr().out)


@pytest.mark.runs
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "quick_start"])
def test_an_unchanged_script(name: str, inputs, here: Path, capsys):
    assert main(["trl", str(FOLDER / f"{name}.py"), *inputs]) == 0
    output = capsys.readouterr().out
    assert output.startswith("rankup trl: GRPOConfig and GRPOTrainer are those of rankup, everything else is TRL 1.")
    check(name, output)


@pytest.mark.slow
def test_an_unchanged_script_with_the_installed_command(inputs, here: Path):
    command = [Path(sys.executable).with_name("rankup"), "trl", FOLDER / "quick_start.py", *inputs]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_DATASETS_CACHE": "cache"}
    )
    assert result.returncode == 0, result.stderr
    check("quick_start", result.stdout)


@pytest.mark.runs
def test_the_script_of_the_documentation_unchanged(inputs, here: Path, capsys):
    """Apart from the model and the sampler."""
    (script,) = re.findall(r"```python\n(from datasets.*?)```", (FOLDER.parents[1] / "docs" / "trl.md").read_text(), re.DOTALL)
    model = ("HuggingFaceTB/SmolLM2-135M-Instruct", inputs[0])
    for text, other in (model, ("use_vllm=True", "use_vllm=False"), ("max_steps=100", "max_steps=2")):
        assert script.count(text) == 1
        script = script.replace(text, other)
    (here / "train_grpo.py").write_text(script)
    assert main(["trl", "train_grpo.py"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0.0"  # no completion has the answer
    assert (here / "sums" / "adapter_model.safetensors").is_file()


REWARDS = """
def short(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]
"""

RUN_FILE = """
reward_funcs: [functions_of_mine.short, get_soft_overlong_punishment]
per_device_train_batch_size: 4
num_generations: 4
max_completion_length: 8
max_steps: 5
use_vllm: false
bf16: false
report_to: none
output_dir: out
"""


@pytest.mark.runs
def test_trls_own_script_with_its_command_line(inputs, here: Path, capsys):
    """`trl/scripts/grpo.py`: `TrlParser` with four dataclasses, a file of options, and options that take precedence."""
    (here / "functions_of_mine.py").write_text(REWARDS)
    (here / "grpo.yaml").write_text(RUN_FILE)
    script = str(Path(trl.__path__[0]) / "scripts" / "grpo.py")
    own = ["--model_name_or_path", inputs[0], "--dtype", "float32", "--dataset_name", inputs[1], "--max_steps", "2"]
    options = ["--config", "grpo.yaml", *own, "--learning_rate", "1e-5", "--no_gradient_checkpointing"]
    assert main(["trl", script, *options]) == 0
    assert "Training completed." in capsys.readouterr().out
    config = yaml.safe_load((here / "out" / "config.yaml").read_text())
    assert (config["optim"]["max_steps"], config["optim"]["learning_rate"], config["model"]["dtype"]) == (2, 1e-5, "float32")
    assert (config["rollout"]["engine"], config["optim"]["gradient_checkpointing"]) == ("torch", False)
    assert (here / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCRIPTS)
def test_trl_itself_logs_the_same_keys_as_often(name: str, inputs, here: Path, capsys):
    """With rankup, and by `python script.py`."""
    assert main(["trl", str(FOLDER / f"{name}.py"), *inputs]) == 0
    ours = logged(capsys.readouterr().out)
    folder = here / "by_trl"
    folder.mkdir()
    environment = {**os.environ, "HF_DATASETS_CACHE": "cache", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, FOLDER / f"{name}.py", *inputs]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    theirs = logged(result.stdout)
    assert name == "quick_start" or SCRIPTS[name].text in result.stdout  # TRL has trained the complete model there
    assert kinds(theirs) == kinds(ours)
    missing = {key for keys in theirs for key in keys} - {key for keys in ours for key in keys}
    assert {key for key in missing if not is_explained(key, name)} == set()


def is_explained(key: str, name: str) -> bool:
    if name == "early_stopping" and key in WITHOUT_UPDATE:
        return True
    # The means of single reward functions are evaluated; one completion of each prompt has no spread to report.
    return key in NOT_LOGGED or key in NOT_EVALUATED or bool(re.fullmatch(r"eval_rewards/.*/std", key))
