"""TRL's names have the effect that they should; contradictions, mistakes and numbers that come as text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SchedulerType
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from rankup.grpo.config import GRPOConfig, dump_config, resolve_epochs
from rankup.grpo.config.trl.fields import ALIASES, ALL_NAMES, FIELDS, RENAMED
from rankup.rollout.generation_kwargs import GenerationKwargs, StructuredOutputs

Load = Callable[..., GRPOConfig]
ErrorOf = Callable[..., str]


def made(values: dict[str, Any]) -> GRPOConfig:
    """The configuration of a script with these keyword arguments, which a type checker does not know."""
    return GRPOConfig(**values)


def option(config: GRPOConfig, dotted: str) -> Any:
    """The value of `section.field` or of a top-level option."""
    section, _, field = dotted.partition(".")
    return getattr(getattr(config, section), field) if field else getattr(config, section)


# --------------------------------------------------------------------------------------------------- same value

OTHER_VALUES: dict[str, Any] = {
    "output_dir": "other/folder",
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {},
    "report_to": ["wandb"],
    "run_name": "mine",
    "min_p": 0.1,
    "delta": 2.5,
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "importance_sampling_level": "sequence",
    "reward_weights": [1.0, 2.0],
    "multi_objective_aggregation": "normalize_then_sum",
    "scale_rewards": "batch",
    "loss_type": "cispo",
    "vllm_importance_sampling_mode": "token_mask",
    "vllm_importance_sampling_clip_max": 4.0,
    "vllm_importance_sampling_cap": 4.0,
    "off_policy_mask_threshold": 0.5,
    "chat_template_kwargs": {"enable_thinking": False},
    "lora_target_modules": ["q_proj"],
    "lora_dropout": 0.0,
    "loraplus_lr_ratio": 4.0,
    "embedding_lr": 1e-5,
    "lora_alpha": 8.0,
    "warmup_ratio": 0.25,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "temperature": 0.5,
    "top_entropy_quantile": 0.5,
    "vllm_gpu_memory_utilization": 0.5,
}
"""A value that is valid, where one made from the type might not be."""

SAME = [name for name in RENAMED if name not in ("vllm_importance_sampling_correction", "load_best_model_at_end")]


def another_value(name: str) -> Any:
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    default = option(GRPOConfig(), RENAMED[name])
    match ALL_NAMES[name].type.partition(" ")[0]:
        case "bool":
            return not default
        case "int":
            return (default or 0) + 1
        case "float":
            return (default or 0.0) + 0.25
    return "something"


@pytest.mark.parametrize("name", SAME)
def test_a_mapped_name_sets_its_option_and_nothing_else(name: str):
    value = another_value(name)
    config = made({name: value})
    assert option(config, RENAMED[name]) == value or str(option(config, RENAMED[name])) == value
    section, _, field = RENAMED[name].partition(".")
    assert config.model_dump() == made({section: {field: value}} if field else {section: value}).model_dump()
    assert (config.notes, config.has_trl_batch) == ((), False)


@pytest.mark.parametrize("name", [name for name in SAME if "." in RENAMED[name]])
def test_a_mapped_name_and_our_option_at_once_are_an_error(name: str):
    value = another_value(name)
    section, _, field = RENAMED[name].partition(".")
    with pytest.raises(ValueError, match=rf"^{name}: is the same option as {section}\.{field}, which is set too"):
        made({name: value, section: {field: value}})


NUMBERS = [name for name in SAME if ALL_NAMES[name].type.partition(" ")[0] in ("int", "float") and name != "epsilon_high"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_come_as_text(name: str):
    value = another_value(name)
    assert made({name: str(value)}).model_dump() == made({name: value}).model_dump()


@settings(deadline=None, max_examples=30)
@given(rate=st.floats(1e-9, 1.0))
def test_a_learning_rate_in_any_notation(rate: float):
    for text in (repr(rate), f"{rate:e}", f"{rate:.17g}"):
        assert math.isclose(made({"learning_rate": text}).optim.learning_rate, rate, rel_tol=1e-6)


# ---------------------------------------------------------------------------------------------- computed values


SCRIPTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bf16": True}, {"model.dtype": "bfloat16"}),
    ({"bf16": False}, {"model.dtype": "float32"}),
    ({"bf16": False, "fp16": False}, {"model.dtype": "float32"}),
    ({"fp16": True}, {"model.dtype": "float16"}),
    ({"fp16": True, "bf16": False}, {"model.dtype": "float16"}),
    ({"fp16": True, "model_init_kwargs": {"dtype": "float32"}}, {"model.dtype": "float16"}),
    ({"model_init_kwargs": {"torch_dtype": torch.float16}}, {"model.dtype": "float16"}),
    ({"model_init_kwargs": {"torch_dtype": torch.float32}}, {"model.dtype": "float32"}),
    ({"model_init_kwargs": {"dtype": "auto", "revision": "v2"}}, {"model.dtype": "bfloat16", "model.revision": "v2"}),
    ({"model_init_kwargs": '{"dtype": "float32", "device_map": "auto"}'}, {"model.dtype": "float32"}),
    ({"bf16": True, "model_init_kwargs": {"dtype": "float32"}}, {"model.dtype": "bfloat16"}),
    ({"use_vllm": False}, {"rollout.engine": "torch"}),
    ({"use_vllm": True}, {"rollout.engine": "vllm"}),
    ({"use_vllm": None}, {"rollout.engine": "vllm"}),
    ({"optim": "adamw_torch"}, {"optim.optimizer": "adamw"}),
    ({"optim": "adamw_bnb_8bit", "learning_rate": 1e-5}, {"optim.optimizer": "adamw_8bit", "optim.learning_rate": 1e-5}),
    ({"optim": "paged_adamw_8bit"}, {"optim.optimizer": "paged_adamw_8bit"}),
    ({"optim": OptimizerNames.PAGED_ADAMW}, {"optim.optimizer": "adamw"}),
    ({"lr_scheduler_type": SchedulerType.COSINE}, {"optim.lr_scheduler_type": "cosine"}),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
        {"optim.lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ),
    ({"warmup_steps": 5}, {"optim.warmup_steps": 5, "optim.warmup_ratio": 0.0}),
    ({"warmup_steps": 0.1}, {"optim.warmup_steps": 0, "optim.warmup_ratio": 0.1}),
    ({"max_steps": -1}, {"optim.max_steps": 100, "optim.num_train_epochs": None}),
    ({"max_steps": -1, "num_train_epochs": 2}, {"optim.num_train_epochs": 2.0}),
    ({"max_steps": 7, "num_train_epochs": 2}, {"optim.max_steps": 7, "optim.num_train_epochs": None}),
    ({"eval_strategy": "no"}, {"logging.eval_steps": 0, "logging.eval_before": False}),
    (
        {"eval_strategy": "no", "eval_steps": 5, "eval_on_start": True},
        {"logging.eval_steps": 0, "logging.eval_before": True},
    ),
    ({"eval_strategy": "steps"}, {"logging.eval_steps": 10, "logging.eval_before": False}),
    ({"eval_strategy": "steps", "eval_on_start": True}, {"logging.eval_before": True}),
    ({"eval_steps": 5}, {"logging.eval_before": True}),
    ({"eval_strategy": "steps", "logging_steps": 3}, {"logging.eval_steps": 3}),
    ({"evaluation_strategy": IntervalStrategy.STEPS, "eval_steps": 25}, {"logging.eval_steps": 25}),
    ({"eval_strategy": "steps", "eval_steps": 0.1, "max_steps": 55}, {"logging.eval_steps": 6}),
    ({"eval_strategy": "steps", "eval_steps": 0.5, "num_train_epochs": 3}, {"logging.eval_epochs": 1.5}),
    ({"eval_strategy": "epoch", "eval_steps": 5}, {"logging.eval_epochs": 1.0, "logging.eval_steps": 0}),
    ({"eval_on_start": False}, {"logging.eval_before": False}),
    ({"save_strategy": "no", "save_steps": 5}, {"checkpoint.save_steps": 0}),
    ({"save_strategy": SaveStrategy.STEPS, "save_steps": 5}, {"checkpoint.save_steps": 5}),
    ({"save_strategy": "epoch"}, {"checkpoint.save_epochs": 1.0}),
    ({"save_steps": 0.25, "max_steps": 100}, {"checkpoint.save_steps": 25}),
    ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, {"guards.load_best_model_at_end": True}),
    ({"metric_for_best_model": "eval_reward", "greater_is_better": True}, {"guards.load_best_model_at_end": False}),
    ({"log_completions": True}, {"logging.completions_steps": 10}),
    ({"log_completions": True, "logging_steps": 2}, {"logging.completions_steps": 2}),
    ({"log_completions": False, "logging_steps": 2}, {"logging.completions_steps": 0}),
    ({"logging_steps": 2}, {"logging.completions_steps": 10}),
    ({"generation_kwargs": {"top_p": 0.5, "stop": "</a>"}}, {"rollout.top_p": 0.5, "rollout.stop": ["</a>"]}),
    ({"top_p": 0.5, "generation_kwargs": {"top_p": 0.5, "do_sample": True}}, {"rollout.top_p": 0.5}),
    ({"generation_kwargs": '{"max_new_tokens": 64}'}, {"rollout.max_completion_length": 64}),
    (
        {"generation_kwargs": {"max_tokens": 9, "skip_special_tokens": False, "include_stop_str_in_output": True, "n": 1}},
        {
            "rollout.max_completion_length": 9,
            "rollout.skip_special_tokens": False,
            "rollout.include_stop_str_in_output": True,
            "rollout.generation_kwargs": GenerationKwargs(),
        },
    ),
    (
        {"generation_kwargs": {"min_new_tokens": 4, "temperature": 0.5, "bad_words": ["x"], "logit_bias": {"7": -5}}},
        {
            "rollout.temperature": 0.5,
            "rollout.generation_kwargs": GenerationKwargs(min_tokens=4, bad_words=["x"], logit_bias={7: -5.0}),
        },
    ),
    ({"generation_kwargs": None}, {"rollout.generation_kwargs": GenerationKwargs()}),
    (
        {"generation_kwargs": {"presence_penalty": 1}, "vllm_structured_outputs_regex": "a+"},
        {"rollout.generation_kwargs": GenerationKwargs(presence_penalty=1, structured_outputs=StructuredOutputs(regex="a+"))},
    ),
    (
        {"vllm_guided_decoding_regex": "a|b", "generation_kwargs": {"structured_outputs": {"regex": "a|b"}}},
        {"rollout.generation_kwargs": GenerationKwargs(structured_outputs=StructuredOutputs(regex="a|b"))},
    ),
    ({"repetition_penalty": 1.1}, {"rollout.repetition_penalty": 1.1}),
    ({"vllm_max_model_length": 1000}, {"rollout.max_prompt_length": 744}),
    ({"vllm_max_model_len": 1000, "max_completion_length": 400}, {"rollout.max_prompt_length": 600}),
    ({"vllm_max_model_length": 1000, "max_prompt_length": 50}, {"rollout.max_prompt_length": 50}),
    (
        {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.2},
        {"correction.mode": "icepop", "correction.floor": 0.2},
    ),
    ({"vllm_importance_sampling_correction": False}, {"correction.mode": "none"}),
    ({"data_seed": 5}, {"data.shuffle_seed": 5, "seed": 42}),
    ({"ddp_timeout": 60}, {"cluster.step_timeout": 60.0}),
    ({"use_bias_correction_kl": True, "beta": 0.1}, {"algorithm.use_bias_correction_kl": True}),
]


@pytest.mark.parametrize(("script", "expected"), SCRIPTS)
def test_a_script_becomes_these_options(script: dict[str, Any], expected: dict[str, Any]):
    config = GRPOConfig(**script)
    assert {dotted: option(config, dotted) for dotted in expected} == expected


def test_every_converted_field_has_a_case():
    named = {ALIASES.get(name, name) for script, _ in SCRIPTS for name in script}
    converted = {name for name, field in FIELDS.items() if field.converts and field.kind == "mapped"}
    assert converted - named == {"num_iterations"}  # a field of the batch


BATCH: dict[str, Any] = {"per_device_train_batch_size": 8}


def test_amounts_are_trls_once_a_script_names_a_field_of_the_batch():
    ours, trl = GRPOConfig(learning_rate=1e-5), GRPOConfig(**BATCH)
    assert (ours.optim.prompts_per_step, ours.rollout.max_completion_length, ours.optim.num_train_epochs) == (8, 256, None)
    assert (trl.optim.prompts_per_step, trl.rollout.max_completion_length, trl.optim.num_train_epochs) == (1, 512, 3.0)
    named = GRPOConfig(**BATCH, max_completion_length=64, num_generations=4, max_steps=9)
    assert (named.optim.prompts_per_step, named.rollout.max_completion_length, named.optim.max_steps) == (2, 64, 9)
    assert named.optim.num_train_epochs is None


def test_what_keeps_a_lora_stable_stays_ours():
    changed = GRPOConfig(**BATCH).model_dump()
    ours = GRPOConfig().model_dump()
    differing = {f"{s}.{f}" for s in ours if isinstance(ours[s], dict) for f in ours[s] if ours[s][f] != changed[s][f]}
    assert differing == {"optim.prompts_per_step", "optim.num_train_epochs", "rollout.max_completion_length"}


def test_with_several_iterations_trls_steps_are_divided_by_them():
    script: dict[str, Any] = {"max_steps": 101, "eval_steps": 20, "save_steps": 25, "warmup_steps": 6, "num_iterations": 2}
    config = GRPOConfig(**BATCH, **script, log_completions=True, logging_steps=1)
    assert (config.optim.max_steps, config.optim.warmup_steps, config.checkpoint.save_steps) == (51, 3, 13)
    assert (config.logging.eval_steps, config.logging.completions_steps) == (10, 1)
    assert GRPOConfig(**script).optim.max_steps == 101  # without a field of the batch they are steps


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ({"eval_strategy": "sometimes"}, "eval_strategy: must be no, steps or epoch (got 'sometimes')"),
        ({"save_strategy": "sometimes"}, "save_strategy: must be no, steps or epoch (got 'sometimes')"),
        (
            {"save_strategy": "best"},
            "save_strategy: best is not supported; set steps: checkpoint.keep_best of them are the best ones, and "
            "load_best_model_at_end ends with the best policy",
        ),
        (
            {"metric_for_best_model": "loss"},
            "metric_for_best_model: must be eval_reward, the mean reward of the evaluation (got 'loss')",
        ),
        ({"greater_is_better": False}, "greater_is_better: must be true: the best evaluation has the highest mean reward"),
        (
            {"load_best_model_at_end": True},
            "guards.load_best_model_at_end: needs evaluations during training: set logging.eval_steps",
        ),
        (
            {"load_best_model_at_end": True, "eval_steps": 5, "enabled": False},
            "guards: load_best_model_at_end restores a snapshot: needs guards.enabled and guards.restore",
        ),
        (
            {"generation_kwargs": {"suppress_tokens": [1]}},
            "rollout.generation_kwargs: suppress_tokens is unknown; known are presence_penalty, frequency_penalty, ",
        ),
        (
            {"generation_kwargs": "{"},
            "generation_kwargs: is not valid JSON: Expecting property name enclosed in double quotes: ",
        ),
        ({"generation_kwargs": 5}, "generation_kwargs: must be a mapping (got 5)"),
        (
            {"model_init_kwargs": {"trust_remote_code": True}},
            "model_init_kwargs.trust_remote_code: is not supported; dtype and",
        ),
        (
            {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
            "model_init_kwargs.quantization_config: is not supported; set model.load_in=nf4 for 4 bits",
        ),
        ({"bf16": True, "fp16": True}, "fp16: bf16 is set too; keep one of them"),
        ({"fp16": True, "dtype": "float32"}, "fp16: is the same option as model.dtype, which is set too; keep one of them"),
        ({"bf16": True, "dtype": "float32"}, "bf16: is the same option as model.dtype, which is set too; keep one of them"),
        ({"use_vllm": True, "engine": "torch"}, "use_vllm: is the same option as rollout.engine, which is set too; keep one"),
        ({"use_vllm": False, "repetition_penalty": 1.1}, "rollout.engine: torch has no repetition_penalty: leave it out, or"),
        (
            {"eval_on_start": True, "eval_before": True},
            "eval_on_start: is the same option as logging.eval_before, which is set",
        ),
        ({"log_completions": True, "completions_steps": 5}, "log_completions: is the same option as logging.completions_steps"),
        ({"vllm_max_model_length": 100}, "vllm_max_model_length: must be above max_completion_length, which is 256 (got 100)"),
        ({"vllm_importance_sampling_clip_min": 0.5}, "vllm_importance_sampling_clip_min: only vllm_importance_sampling_mode="),
        ({"optim": "adafactor"}, "optim.optimizer: must be 'adamw', 'adamw_8bit' or 'paged_adamw_8bit' (got 'adafactor')"),
        ({"lr_scheduler_type": "greedy"}, "optim.lr_scheduler_type: must be 'constant', 'constant_with_warmup', 'linear', "),
        ({"repetition_penalty": 1.1, "engine": "torch"}, "rollout.engine: torch has no repetition_penalty: leave it out, or"),
        (
            {"warmup_steps": 0.1, "warmup_ratio": 0.2},
            "warmup_steps: is the same option as optim.warmup_ratio, which is set too",
        ),
        ({"report_to": "mlflow"}, "logging.report_to.0: must be 'tensorboard', 'wandb' or 'trackio' (got 'mlflow')"),
    ],
)
def test_the_error_names_what_the_script_wrote(script: dict[str, Any], error: str):
    with pytest.raises(ValueError) as caught:
        GRPOConfig(**script)
    assert str(caught.value).startswith(error) and "\n" not in str(caught.value)


def test_all_problems_with_trls_names_are_reported_together():
    with pytest.raises(ValueError) as caught:
        GRPOConfig(deepspeed="ds.json", vllm_mode="server", eval_strategy="sometimes", steps_per_generation=0)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        *("deepspeed", "vllm_mode", "steps_per_generation", "eval_strategy")
    ]


# ---------------------------------------------------------------------------------------------- files and notes


def test_trls_names_in_a_run_file_and_in_overrides(load: Load, error_of: ErrorOf):
    config = load("per_device_train_batch_size: 4\noptim: adamw_8bit", "gradient_accumulation_steps=4", "eval_strategy=epoch")
    assert (config.optim.prompts_per_step, config.optim.optimizer, config.logging.eval_epochs) == (2, "adamw_8bit", 1.0)
    assert error_of("per_device_train_batch_size: 8", "optim.prompts_per_step=4").startswith(
        "per_device_train_batch_size: sets"
    )


def test_a_dump_has_our_options_only_and_reads_back(load: Load):
    config = load("", *(f"{name}={value}" for name, value in BATCH.items()), "warmup_steps=0.1", "save_strategy=epoch")
    text = dump_config(config)
    assert "per_device" not in text and "max_steps: null" in text
    assert load(text).model_dump() == config.model_dump()
    resolved = resolve_epochs(config, rows=50)
    assert load(dump_config(resolved)).model_dump() == resolved.model_dump()


def test_options_without_effect_are_reported_if_a_reader_would_expect_one():
    assert GRPOConfig(use_vllm=True, dataloader_num_workers=4, logging_steps=5).notes == ()
    (note,) = GRPOConfig(use_cpu=True, full_determinism=False, torch_compile=True).notes
    assert note == (
        "no effect here: torch_compile (fused kernels take its place); use_cpu (set CUDA_VISIBLE_DEVICES= to hide the GPUs)"
    )


def test_notes_outlive_copies_and_the_resolution_of_epochs():
    config = GRPOConfig(**BATCH, use_cpu=True)
    assert config.has_trl_batch and not GRPOConfig(prompts_per_step=1).has_trl_batch
    for changed in (resolve_epochs(config, rows=11), config.model_copy(update={"seed": 5})):
        assert (changed.notes, changed.has_trl_batch) == (config.notes, True)


# ------------------------------------------------------------------------------------------------------- epochs


@settings(deadline=None)
@given(epochs=st.integers(1, 5), rows=st.integers(1, 200), prompts=st.integers(1, 20))
def test_every_row_is_used_once_an_epoch(epochs: int, rows: int, prompts: int):
    config = resolve_epochs(GRPOConfig(num_train_epochs=epochs, prompts_per_step=prompts), rows=rows)
    assert epochs * rows <= config.optim.max_steps * prompts < epochs * rows + prompts
    assert config.optim.num_train_epochs is None


def test_lengths_in_epochs_become_steps():
    config = GRPOConfig(num_train_epochs=0.1, eval_epochs=1, save_epochs=0.01, prompts_per_step=2, warmup_ratio=0.1)
    resolved = resolve_epochs(config, rows=600)
    assert (resolved.optim.max_steps, resolved.logging.eval_steps, resolved.checkpoint.save_steps) == (30, 300, 3)
    assert (resolved.logging.eval_epochs, resolved.checkpoint.save_epochs) == (None, None)
    assert resolved.optim.num_warmup_steps == 3
    assert resolve_epochs(resolved, rows=5) is resolved


def test_a_warmup_longer_than_the_epochs_is_an_error_once_their_steps_are_known():
    config = GRPOConfig(num_train_epochs=1, warmup_steps=200, prompts_per_step=2)
    with pytest.raises(ValueError, match=r"^optim.warmup_steps: must be below optim.max_steps, which is 5 \(got 200\)$"):
        resolve_epochs(config, rows=10)
