"""The class in the place of TRL's GRPOConfig: made by calls, by parsers and by subclasses; read and changed by scripts."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser
from trl.scripts.utils import ScriptArguments
from trl.scripts.utils import TrlParser as TypedParser
from trl.trainer.grpo_config import GRPOConfig as TrlConfig
from trl.trainer.model_config import ModelConfig

from rankup.grpo.cli.trl.arguments import GRPOConfig, ScriptConfig
from rankup.grpo.config import GRPOConfig as RankupConfig
from rankup.grpo.config.trl.fields import FIELDS

TrlParser: Any = TypedParser
"""It takes dataclasses; type checkers do not know that `GRPOConfig` makes one."""

BATCH: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


def parsed(*words: str, parser: type = HfArgumentParser) -> ScriptConfig:
    (config,) = parser(GRPOConfig).parse_args_into_dataclasses(list(words))
    return config


def test_a_call_gives_the_same_configuration_as_rankups():
    values: dict[str, Any] = {"learning_rate": 1e-5, "rank": 16, "use_vllm": False, **BATCH}
    assert GRPOConfig(**values).model_dump() == RankupConfig(**values).model_dump()
    assert isinstance(GRPOConfig(), RankupConfig)


def test_the_output_folder_may_come_first():
    assert GRPOConfig("runs/first", seed=3).logging.output_dir == Path("runs/first")


def test_mistakes_are_those_of_rankup():
    with pytest.raises(ValueError, match=r"^deepspeed: is not supported; "):
        GRPOConfig(deepspeed="ds.json")


# ------------------------------------------------------------------------------------------------------ parsers


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_only_the_options_of_the_command_line_are_set(parser: type):
    config = parsed("--learning_rate", "1e-5", "--use_vllm", "false", "--max-steps", "7", parser=parser)
    expected = RankupConfig(learning_rate=1e-5, use_vllm=False, max_steps=7)
    assert config.model_dump() == expected.model_dump()
    assert config.optim.model_fields_set == expected.optim.model_fields_set
    assert parsed(parser=parser).model_dump() == RankupConfig().model_dump()


@pytest.mark.parametrize(
    ("words", "dotted", "value"),
    [
        (["--bf16", "false"], "model.dtype", "float32"),
        (["--use_vllm"], "rollout.engine", "vllm"),
        (["--no_gradient_checkpointing"], "optim.gradient_checkpointing", False),
        (["--gradient-checkpointing"], "optim.gradient_checkpointing", True),
        (["--no-shuffle-dataset"], "data.shuffle", False),
        (["--use_bias_correction_kl", "true"], "algorithm.use_bias_correction_kl", True),
        (["--reward_weights", "0.5", "2"], "rewards.weights", [0.5, 2.0]),
        (["--report_to", "wandb"], "logging.report_to", ["wandb"]),
        (["--model_init_kwargs", '{"dtype": "float32"}'], "model.dtype", "float32"),
        (["--generation_kwargs", '{"top_p": 0.5}'], "rollout.top_p", 0.5),
        (["--max_prompt_length", "99"], "rollout.max_prompt_length", 99),
    ],
)
def test_an_option_of_the_command_line_sets_its_option(words: list[str], dotted: str, value: object):
    section, _, name = dotted.partition(".")
    changed = parsed(*words)
    assert getattr(getattr(changed, section), name) == value
    ours, default = changed.model_dump(), RankupConfig().model_dump()
    assert {f"{s}.{n}" for s in ours if isinstance(ours[s], dict) for n in ours[s] if ours[s][n] != default[s][n]} <= {dotted}


def test_every_option_of_trls_command_line_is_one():
    options = {option for action in TrlParser(TrlConfig)._actions for option in action.option_strings}
    ours = {option for action in TrlParser(GRPOConfig)._actions for option in action.option_strings}
    assert options - ours == set()


def test_beside_trls_other_classes_and_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OF_THE_FILE", raising=False)
    file = tmp_path / "grpo.yaml"
    file.write_text("learning_rate: 2e-5\nmax_steps: 9\nlora_r: 8\ngeneration_kwargs: {top_p: 0.5}\nshuffle_dataset: false\n")
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    words = ["--config", str(file), "--dataset_name", "mine", "--model_name_or_path", "tiny", "--max_steps", "4"]
    script, args, model = parser.parse_args_and_config(words)
    assert (script.dataset_name, model.model_name_or_path, model.lora_r) == ("mine", "tiny", 8)
    assert (args.learning_rate, args.max_steps, args.top_p, args.shuffle) == (2e-5, 4, 0.5, False)


def test_the_help_of_a_script_has_the_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        TrlParser(GRPOConfig).parse_args(["--help"])
    assert "--no_gradient_checkpointing" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- subclasses


@dataclass
class MyConfig(GRPOConfig):
    """As users of TRL extend its configuration."""

    learning_rate: float = 5e-5
    system_prompt: str | None = None
    benchmarks: list[str] = dataclasses.field(default_factory=lambda: ["one"])


def test_a_subclass_may_have_more_fields_and_other_defaults():
    config = MyConfig(max_steps=3, system_prompt="Be brief.")
    assert (config.learning_rate, config.max_steps, config.benchmarks) == (5e-5, 3, ["one"])
    assert config.system_prompt == "Be brief." and config.data.system_prompt is None  # it is the script's
    (config,) = TrlParser(MyConfig).parse_args_into_dataclasses(["--benchmarks", "two", "three", "--max_steps", "4"])
    assert (config.learning_rate, config.max_steps, config.benchmarks) == (5e-5, 4, ["two", "three"])


def test_methods_of_a_subclass_would_never_be_called():
    @dataclass
    class WithMethod(GRPOConfig):
        def __post_init__(self) -> None: ...

    with pytest.raises(ValueError, match=r"^WithMethod.__post_init__: `rankup trl` supports fields"):
        WithMethod()


# --------------------------------------------------------------------------------------------- reading, setting


def test_a_script_reads_trls_names():
    config = GRPOConfig("out", use_vllm=False, eval_strategy="steps", eval_steps=5, **BATCH)
    assert (config.use_vllm, config.eval_strategy, config.per_device_train_batch_size) == (False, "steps", 8)
    assert (config.push_to_hub, config.model_init_kwargs, config.resume_from_checkpoint) == (False, None, None)
    assert (config.output_dir, config.eval_steps, config.steps_per_generation) == (Path("out"), 5, None)
    assert not hasattr(config, "no_such_name")


def test_every_field_of_trl_can_be_read():
    config = GRPOConfig(**BATCH)
    assert [name for name in FIELDS if not hasattr(config, name)] == []


def test_a_batch_that_is_not_trls_is_read_in_its_terms():
    config = GRPOConfig(num_generations=4)
    assert config.optim.prompts_per_step == 8
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.generation_batch_size) == (32, 1, 32)


def test_a_script_may_change_its_configuration_before_it_is_used():
    config = GRPOConfig(learning_rate=1e-5, **BATCH)
    config.model_init_kwargs = {"dtype": "float32", "attn_implementation": None}
    config.num_generations = 4
    assert config.model.dtype == "float32" and config.optim.prompts_per_step == 4
    assert config.model_dump() == RankupConfig(learning_rate=1e-5, bf16=False, num_generations=4, **BATCH).model_dump()
    with pytest.raises(ValueError, match=r"^learning_rat: unknown key; did you mean"):
        config.learning_rat = 1.0


def test_what_a_trainer_has_read_does_not_change_any_more():
    read = GRPOConfig(learning_rate=1e-5).model_copy(update={"seed": 7})
    with pytest.raises(ValueError, match=r"^learning_rate: a trainer has read its configuration: set it before"):
        read.learning_rate = 1.0
    assert (read.learning_rate, read.seed) == (1e-5, 7)


def test_a_configuration_can_be_sent_to_other_processes():
    config = pickle.loads(pickle.dumps(MyConfig(use_vllm=False, benchmarks=["two"])))
    assert (config.use_vllm, config.benchmarks, config.rollout.engine) == (False, ["two"], "torch")
