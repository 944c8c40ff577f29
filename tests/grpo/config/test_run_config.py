"""The configuration: fields, ranks, names, and errors."""

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.config import (
    GRPOConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardsConfig,
    dump_config,
)
from rankup.grpo.config.algorithm import OBJECTIVES

SECTIONS = ["model", "lora", "rollout", "algorithm", "correction", "guards", "optim"]
SECTIONS += ["rewards", "data", "logging", "checkpoint", "cluster"]

Load = Callable[..., GRPOConfig]
ErrorOf = Callable[..., str]

# The models


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_docstring(section: str) -> None:
    fields = type(getattr(GRPOConfig(), section)).model_fields
    assert GRPOConfig.model_fields[section].description
    assert fields
    assert [name for name, field in fields.items() if not field.description] == []


def test_sections_are_complete() -> None:
    assert list(GRPOConfig.model_fields) == [*SECTIONS, "seed", "deterministic"]


def test_options_are_read_by_their_flat_names_too() -> None:
    config: Any = GRPOConfig(learning_rate=3e-5, output_dir="runs/mine", save_total_limit=7)
    assert (config.learning_rate, config.output_dir, config.lora_r) == (3e-5, Path("runs/mine"), config.lora.rank)
    assert config.save_total_limit == config.keep_last == config.checkpoint.keep_last == 7
    assert not hasattr(config, "no_such_option") and not hasattr(config, "__no_such_method__")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_import_is_light() -> None:
    code = "import sys, rankup.grpo.config; print(*{'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_config_does_not_change() -> None:
    config = GRPOConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.optim.max_steps = 5


def test_defaults_are_not_shared() -> None:
    GRPOConfig().data.options["size"] = 5
    assert GRPOConfig().data.options == {}


# Ranks and scale


@pytest.mark.parametrize("rank", range(1, 129))
def test_the_buffer_of_a_rank(rank: int) -> None:
    assert GRPOConfig(rank=rank).lora.max_rank == (64 if rank <= 64 else 128)
    assert GRPOConfig(rank=rank, max_rank=128).lora.max_rank == 128
    assert GRPOConfig(rank=rank, max_rank=None).lora.max_rank == GRPOConfig(rank=rank).lora.max_rank


@pytest.mark.parametrize("rank", [129, 256])
def test_the_error_for_a_rank_above_128_gives_the_reason(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"^lora.rank: must be at most 128 \(got {rank}\).*buffers.*quality.*$"):
        GRPOConfig(rank=rank)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "many", None])
def test_rank_is_a_positive_integer(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"^lora.rank: must be "):
        GRPOConfig(rank=rank)


@pytest.mark.parametrize("max_rank", [96, 32, 256, "large"])
def test_max_rank_is_64_or_128(max_rank: Any) -> None:
    with pytest.raises(ValueError, match=r"^lora.max_rank: must be 64 or 128 \(got"):
        GRPOConfig(max_rank=max_rank)


def test_rank_must_fit_max_rank() -> None:
    with pytest.raises(ValueError, match=r"^lora.max_rank: must be at least lora.rank, which is 65"):
        GRPOConfig(rank=65, max_rank=64)


@settings(deadline=None)
@given(rank=st.integers(1, 128), alpha=st.floats(0.5, 512))
def test_scaling_is_that_of_peft(rank: int, alpha: float) -> None:
    assert LoraConfig(rank=rank, alpha=alpha).scaling == alpha / rank
    assert LoraConfig(rank=rank, alpha=alpha, use_rslora=True).scaling == alpha / rank**0.5


@pytest.mark.parametrize("targets", ["qkv", "attention", "all-linear", ["up_proj"]])
def test_targets_are_kept_as_they_are_written(targets: str | list[str]) -> None:
    assert LoraConfig(targets=targets).targets == targets


@pytest.mark.parametrize("targets", ["everything", "all_linear", "q_proj,v_proj", "", [], [1], None])
def test_wrong_targets(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"^lora.targets: must be qkv, attention, all-linear, a list of module names, or"):
        GRPOConfig(targets=targets)


@pytest.mark.parametrize("targets", [".*q_proj", r"model\.layers\.(0|1)\..*(q|v)_proj", "model.layers.0.mlp.up_proj"])
def test_targets_by_regular_expression(load: Load, targets: str) -> None:
    assert GRPOConfig(targets=targets).lora.targets == targets
    assert load("", f"lora.targets={targets}").lora.targets == targets
    assert load(dump_config(GRPOConfig(targets=targets))).lora.targets == targets


@pytest.mark.parametrize("targets", ["(q_proj", "[a-", "*_proj"])
def test_targets_that_are_not_a_valid_regular_expression(targets: str) -> None:
    with pytest.raises(ValueError, match=rf"^lora.targets: '{re.escape(targets)}' is not a valid regular expression: "):
        GRPOConfig(targets=targets)


# Patterns, initialisation, and unsupported options


@settings(deadline=None)
@given(rank=st.integers(1, 128), pattern=st.dictionaries(st.sampled_from(["q_proj", "v_proj", "mlp.*"]), st.integers(1, 128)))
def test_buffers_fit_every_rank_of_the_pattern(rank: int, pattern: dict[str, int]) -> None:
    largest = max(rank, *pattern.values(), 0)
    assert LoraConfig(rank=rank, rank_pattern=pattern).max_rank == (64 if largest <= 64 else 128)
    assert LoraConfig(rank=rank, rank_pattern=pattern, max_rank=128).max_rank == 128
    if rank <= 64 < largest:
        with pytest.raises(ValueError, match=f"at least the largest rank in lora.rank_pattern, which is {largest} .got 64."):
            LoraConfig(rank=rank, rank_pattern=pattern, max_rank=64)


def test_patterns_are_read_in_their_order(load: Load) -> None:
    config = load("lora: {rank_pattern: {z.*: 8, a: 16}, alpha_pattern: {layers.0.mlp.up_proj: 4}}", "lora.rank_pattern.q=2")
    for lora in (config.lora, load(dump_config(config)).lora):
        assert list(lora.rank_pattern.items()) == [("z.*", 8), ("a", 16), ("q", 2)]
        assert lora.alpha_pattern == {"layers.0.mlp.up_proj": 4.0}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj: must be at least 1 (got 0)"),
        ({"rank_pattern": {"q_proj": 1.5}}, "lora.rank_pattern.q_proj: must be an integer (got 1.5)"),
        ({"rank_pattern": 8}, "lora.rank_pattern: must be a mapping (got 8)"),
        ({"rank_pattern": {"(q": 8}}, "lora.rank_pattern: '(q' is not a valid regular expression: missing )"),
        ({"rank_pattern": {"(?i)q": 8}}, "lora.rank_pattern: '(?i)q' is not a valid regular expression: global flags"),
        ({"alpha_pattern": {"[": 8}}, "lora.alpha_pattern: '[' is not a valid regular expression: unterminated"),
        ({"alpha_pattern": {"q_proj": 0}}, "lora.alpha_pattern.q_proj: must be above 0.0 (got 0)"),
        ({"rank_pattern": {"q_proj": 129}}, "lora.rank_pattern.q_proj: must be at most 128 (got 129): the adapter is stored"),
        ({"init_lora_weights": "pissa"}, "lora.init_lora_weights: must be default, gaussian or orthogonal (got 'pissa'): PEFT"),
        ({"init_lora_weights": False}, "lora.init_lora_weights: must be default, gaussian or orthogonal (got False): PEFT"),
        ({"init_lora_weights": "orthogonal", "rank": 15}, "lora.init_lora_weights: must not be orthogonal with odd ranks"),
        (
            {"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}},
            "lora.init_lora_weights: must not be orthogonal with odd ranks, in lora.rank or lora.rank_pattern (got 3)",
        ),
        ({"lora_dropout": 0.1}, "lora.dropout: must be 0 (got 0.1): with dropout, the trained policy is no longer"),
        ({"use_dora": True}, "lora.use_dora: must be false: vLLM cannot serve DoRA"),
    ],
)
def test_unsupported_options_of_peft_are_errors(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError) as caught:
        GRPOConfig(**options)
    assert str(caught.value).startswith(error) and "\n" not in str(caught.value)


def test_supported_options_of_peft() -> None:
    assert GRPOConfig(lora_dropout=0, use_dora=False, init_lora_weights=True).lora == LoraConfig()
    assert GRPOConfig(init_lora_weights="orthogonal", rank_pattern={"q": 2}).lora.init_lora_weights == "orthogonal"


# Names: unknown, flat, short


@pytest.mark.parametrize(
    ("text", "name", "hint"),
    [
        ("optim: {lerning_rate: 1}", "optim.lerning_rate", "did you mean optim.learning_rate?"),
        ("rollout: {learning_rate: 1}", "rollout.learning_rate", "did you mean optim.learning_rate?"),
        ("lora: {r: 8}", "lora.r", "did you mean lora.rank?"),
        ("lora: {lora_alpha: 8}", "lora.lora_alpha", "did you mean lora.alpha?"),
        ("lr: 1", "lr", "did you mean optim.learning_rate?"),
        ("logging: {num_generations_eval: 4}", "logging.num_generations_eval", "it was renamed to data.eval_samples"),
        ("num_generation: 8", "num_generation", "did you mean rollout.num_generations?"),
        ("optimm: {max_steps: 8}", "optimm", "did you mean optim?"),
        ("optim: {zzz: 8}", "optim.zzz", "optim has learning_rate, rescale_learning_rate"),
        ("zzz: 8", "zzz", "sections and keys are model, lora, rollout"),
        ("per_device_train_batch: 8", "per_device_train_batch", "did you mean per_device_train_batch_size?"),
        ("optim: {use_vllm: true}", "optim.use_vllm", "use_vllm is a name of TRL: write it outside of the sections"),
        ("lora: {lora_dropout: 0.1}", "lora.lora_dropout", "did you mean lora.dropout?"),
    ],
)
def test_the_error_for_an_unknown_key_suggests_the_nearest(error_of: ErrorOf, text: str, name: str, hint: str) -> None:
    assert error_of(text).startswith(f"{name}: unknown key; {hint}")


def test_unknown_key_in_an_override(error_of: ErrorOf) -> None:
    assert error_of("", "rollout.num_generation=8") == (
        "rollout.num_generation: unknown key; did you mean rollout.num_generations?"
    )


@pytest.mark.parametrize("name", [f"{s}.{f}" for s in SECTIONS for f in type(getattr(GRPOConfig(), s)).model_fields])
def test_every_field_is_found_by_its_flat_name(load: Load, name: str) -> None:
    section, field = name.split(".")
    value = GRPOConfig(logging={"run_name": "mine"}).model_dump(mode="json")[section][field]
    assert load(yaml.safe_dump({field: value})).model_dump() == load().model_dump()


def test_flat_names_of_trl() -> None:
    config = GRPOConfig(
        learning_rate=1e-5,
        num_generations=4,
        output_dir="out",
        reward_weights=[1, 2],
        scale_rewards=False,
        top_k=0,
        shuffle_dataset=False,
        vllm_gpu_memory_utilization=0.3,
        seed=7,
    )
    assert (config.optim.learning_rate, config.rollout.num_generations, config.seed) == (1e-5, 4, 7)
    assert (config.rewards.weights, config.algorithm.scale_rewards) == ([1.0, 2.0], "none")
    assert (config.rollout.top_k, config.rollout.gpu_memory_utilization) == (-1, 0.3)
    assert (config.data.shuffle, config.logging.output_dir) == (False, Path("out"))


def test_flat_names_join_sections() -> None:
    config = GRPOConfig(optim=OptimConfig(max_steps=5), learning_rate=1e-5, rollout={"top_p": 0.9}, temperature=0.5)
    assert (config.optim.max_steps, config.optim.learning_rate) == (5, 1e-5)
    assert (config.rollout.top_p, config.rollout.temperature) == (0.9, 0.5)
    with pytest.raises(ValueError, match=r"^max_steps: is the same option as optim.max_steps, which is set too"):
        GRPOConfig(optim=OptimConfig(max_steps=5), max_steps=6)


def test_a_model_may_be_a_name(load: Load) -> None:
    expected = ModelConfig(name="some/model", revision="main")
    assert GRPOConfig(model="some/model", revision="main").model == expected
    assert load("model: some/model", "model.revision=main").model == expected
    assert load("model: {revision: main}", "model=some/model").model == expected


def test_one_string_is_a_list_of_one(load: Load) -> None:
    config = load("rewards: {functions: 'a.py:f'}\nrollout: {stop: '</s>'}")
    assert (config.rewards.functions, config.rollout.stop) == (["a.py:f"], ["</s>"])


@pytest.mark.parametrize(
    ("report_to", "names"),
    [
        ("wandb", ["wandb"]),
        ("none", []),
        ("[none]", []),
        ("[]", []),
        ("[trackio, wandb, trackio]", ["trackio", "wandb"]),
    ],
)
def test_trackers(load: Load, report_to: str, names: list[str]) -> None:
    logging = load("", f"report_to={report_to}").logging
    assert (logging.report_to, logging.project) == (names, "rankup")


def test_one_step_to_profile_is_a_list_of_one(load: Load) -> None:
    assert load("", "profile_steps=5").logging.profile_steps == [5]
    assert load("", "profile_steps=[1, 5]").logging.profile_steps == [1, 5]


# Bounds


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("num_generations=1", "rollout.num_generations: must be at least 2 (got 1)"),
        ("report_to=mlflow", "logging.report_to.0: must be 'tensorboard', 'wandb' or 'trackio' (got 'mlflow')"),
        ("report_to=[none, wandb]", "logging.report_to.0: must be 'tensorboard', 'wandb' or 'trackio' (got 'none')"),
        ("project=''", "logging.project: must not be empty (got '')"),
        ("profile_steps=0", "logging.profile_steps.0: must be at least 1 (got 0)"),
        ("profile_steps=[1, x]", "logging.profile_steps.1: must be an integer (got 'x')"),
        ("num_generations=two", "rollout.num_generations: must be an integer (got 'two')"),
        ("num_generations=2.5", "rollout.num_generations: must be an integer (got 2.5)"),
        ("temperature=0", "rollout.temperature: must be above 0.0 (got 0)"),
        ("top_p=0", "rollout.top_p: must be above 0.0 (got 0)"),
        ("top_p=1.1", "rollout.top_p: must be at most 1.0 (got 1.1)"),
        ("top_k=-2", "rollout.top_k: must be at least -1 (got -2)"),
        ("min_p=1.1", "rollout.min_p: must be at most 1.0 (got 1.1)"),
        ("beta=-0.1", "algorithm.beta: must be at least 0.0 (got -0.1)"),
        (
            "loss_type=dpo",
            f"algorithm.loss_type: must be {', '.join(OBJECTIVES)}, or your own function, path/to/file.py:name "
            "(got 'dpo')",
        ),
        ("scale_rewards=yes please", "algorithm.scale_rewards: must be 'group', 'batch' or 'none' (got 'yes please')"),
        ("max_steps=0", "optim.max_steps: must be at least 1 (got 0)"),
        ("warmup_steps=100", "optim.warmup_steps: must be below optim.max_steps, which is 100 (got 100)"),
        ("learning_rate=0", "optim.learning_rate: must be above 0.0 (got 0)"),
        ("adam_beta2=1", "optim.adam_beta2: must be below 1.0 (got 1)"),
        ("initial_loss_scale=0", "optim.initial_loss_scale: must be at least 1.0 (got 0)"),
        ("initial_loss_scale=1000", "optim.initial_loss_scale: must be a power of two (got 1000)"),
        ("alpha=0", "lora.alpha: must be above 0.0 (got 0)"),
        ("data.shuffle=maybe", "data.shuffle: must be true or false (got 'maybe')"),
        ("data={train: [[5]]}", "data.train.0: must be text (got [5])"),
        ("data.options=5", "data.options: must be a mapping (got 5)"),
        ("rewards.weights=5", "rewards.weights: must be a list (got 5)"),
        ("eval_steps=null", "logging.eval_steps: must be an integer (got None)"),
        ("run_name=''", "logging.run_name: must not be empty (got '')"),
        ("logging={output_dir: [x]}", "logging.output_dir: must be a path (got ['x'])"),
        ("workers=0", "cluster.workers: must be at least 1 (got 0)"),
        (
            "workers=9",
            "cluster.workers: must be at most optim.prompts_per_step, which is divided among them and is 8 (got 9)",
        ),
        ("seed=-1", "seed: must be at least 0 (got -1)"),
    ],
)
def test_wrong_value_is_one_readable_line(error_of: ErrorOf, override: str, error: str) -> None:
    assert error_of("", override) == error


def test_all_problems_are_reported_together(error_of: ErrorOf) -> None:
    error = error_of("rollout: {num_generations: 1}\nlora: {rank: 0}\noptim: {foo: 1}")
    assert [line.split(":")[0] for line in error.splitlines()] == ["lora.rank", "rollout.num_generations", "optim.foo"]


def test_the_same_errors_in_python() -> None:
    with pytest.raises(ValueError, match=r"^rollout.num_generations: must be at least 2 \(got 1\)$"):
        GRPOConfig(num_generations=1)
    with pytest.raises(ValueError, match=r"^num_generation: unknown key; did you mean rollout.num_generations\?$"):
        GRPOConfig(num_generation=8)  # type: ignore[call-arg]


def test_one_weight_per_reward_function() -> None:
    assert RewardsConfig(functions=["a:f", "b:g"], weights=[1, 0.5]).weights == [1.0, 0.5]
    assert GRPOConfig(reward_weights=[1, 0.5]).rewards.weights == [1.0, 0.5]  # functions come with the trainer
    with pytest.raises(ValueError, match=r"^rewards.weights: 2 reward weights for 1 reward functions: specify"):
        GRPOConfig(functions="a:f", reward_weights=[1, 0.5])


@settings(deadline=None)
@given(prompts=st.integers(1, 64), generations=st.integers(2, 64))
def test_max_num_seqs_defaults_to_the_completions_of_a_step_up_to_256(prompts: int, generations: int) -> None:
    config = GRPOConfig(prompts_per_step=prompts, num_generations=generations)
    assert config.max_num_seqs == min(prompts * generations, 256)
    assert GRPOConfig(prompts_per_step=prompts, max_num_seqs=300).max_num_seqs == 300
