"""A `peft.LoraConfig` selects and scales the same layers as in PEFT, or is refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from rankup import GRPOConfig
from rankup.grpo.config.trl.peft_fields import PEFT_FIELDS
from rankup.grpo.model.targets import find_targets
from rankup.grpo.objects.given import Given, from_objects

Load = Callable[..., PreTrainedModel]


@pytest.fixture
def given(tiny_model_path) -> Callable[..., Given]:
    def make(peft_config: Any, config: GRPOConfig | None = None, *, kind: str = "llama") -> Given:
        return from_objects(config or GRPOConfig(), model=str(tiny_model_path(kind)), peft_config=peft_config)

    return make


def test_the_fields_are_options(given):
    config = LoraConfig(
        r=16,
        lora_alpha=64,
        target_modules=["v_proj", "q_proj"],
        rank_pattern={"v_proj": 4},
        alpha_pattern={"layers.0.self_attn.q_proj": 8},
        use_rslora=True,
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    lora = given(config).config.lora
    assert (lora.rank, lora.alpha, lora.targets) == (16, 64, ["q_proj", "v_proj"])
    assert (lora.rank_pattern, lora.alpha_pattern) == ({"v_proj": 4}, {"layers.0.self_attn.q_proj": 8})
    assert (lora.use_rslora, lora.init_lora_weights) == (True, "gaussian")


def test_the_defaults_are_those_of_peft(given):
    lora = given(LoraConfig()).config.lora
    assert (lora.rank, lora.alpha, lora.use_rslora, lora.init_lora_weights) == (8, 8, False, "default")
    assert lora.targets == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gemma2", {}),
        ("qwen3", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": "All-Linear", "exclude_modules": ["down_proj"]}),
        ("llama", {"target_modules": ["q_proj", "mlp.up_proj"]}),
        ("llama", {"target_modules": {"o_proj", "lm_head", "k_proj"}}),
        ("llama", {"target_modules": r".*layers\.1\..*(up|down)_proj"}),
        ("llama", {"target_modules": ["model.layers.1.self_attn.q_proj"]}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
        ("llama", {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}),
        ("llama", {"target_modules": r".*proj", "exclude_modules": ["o_proj", "gate_proj"]}),
        ("llama", {"layers_to_transform": [1]}),
    ],
)
def test_the_same_layers_are_adapted_as_by_peft(kind: str, options: dict[str, Any], given, load_model: Load):
    targets = given(LoraConfig(**options), kind=kind).config.lora.targets
    model = load_model(kind)
    ours = set(find_targets(model, targets).modules)
    theirs: Any = get_peft_model(model, LoraConfig(**options)).base_model.targeted_module_names
    assert ours == set(theirs) != set()


def test_all_linear_keeps_its_name(given):
    for kind in ("llama", "qwen2", "gemma3"):
        for excluded in (None, ["no_such_layer"]):
            config = LoraConfig(target_modules="all-linear", exclude_modules=excluded)
            assert given(config, kind=kind).config.lora.targets == "all-linear"


def test_selected_layers_are_a_short_expression(given):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1], exclude_modules=r".*\.1\..*v_proj")
    assert given(config).config.lora.targets == (
        r"(model\.layers\.(0|1)\.self_attn\.q_proj|model\.layers\.0\.self_attn\.v_proj)"
    )


def test_a_model_object_is_asked_for_its_layers(load_model: Load):
    model = load_model("qwen3")
    config = from_objects(GRPOConfig(), model=model, peft_config=LoraConfig(target_modules="all-linear")).config
    assert config.lora.targets == "all-linear" and not any(isinstance(module, LoraLayer) for module in model.modules())


def test_the_config_is_not_modified(given):
    config = LoraConfig(target_modules="all-linear", exclude_modules=["o_proj"], lora_dropout=0.1)
    before = config.to_dict()
    given(config)
    assert config.to_dict() == before


# ------------------------------------------------------------------------------------------------------------- table


def test_every_field_of_the_installed_peft_is_known_and_no_other():
    assert list(PEFT_FIELDS) == [field.name for field in dataclasses.fields(LoraConfig)]


def test_the_defaults_of_the_table_are_those_of_peft():
    for field in dataclasses.fields(LoraConfig):
        if field.name == "runtime_config":  # an object that only has switches for PEFT's own layers
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert PEFT_FIELDS[field.name].default == default, field.name


WITH_VALUES: dict[str, Any] = {
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "megatron_config": {"a": 1},
    "trainable_token_indices": [3],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": peft.EvaConfig(),
    "corda_config": object(),
    "lora_ga_config": object(),
    "use_dora": True,
    "velora_config": object(),
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "monteclora_config": object(),
    "layer_replication": [(0, 2)],
    "lora_bias": True,
    "target_parameters": ["experts.up"],
    "use_bdlora": object(),
    "arrow_config": object(),
    "kasa_config": object(),
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("name", [name for name, field in PEFT_FIELDS.items() if field.kind == "refused"])
def test_a_field_that_is_not_supported_is_refused_with_its_reason(name: str, given):
    config = LoraConfig()
    setattr(config, name, WITH_VALUES[name])
    with pytest.raises(ValueError) as caught:
        given(config)
    assert str(caught.value) == f"peft_config.{name}: is not supported; {PEFT_FIELDS[name].note}"


def test_a_field_that_is_not_known_is_refused(given):
    @dataclasses.dataclass
    class Newer(LoraConfig):
        use_magic: bool = False

    given(Newer())
    with pytest.raises(ValueError, match=r"peft_config.use_magic: is not supported; it is not in the version of PEFT"):
        given(Newer(use_magic=True))


def test_all_problems_are_reported_at_once(given):
    with pytest.raises(ValueError) as caught:
        given(LoraConfig(use_dora=True, modules_to_save=["lm_head"], task_type="SEQ_CLS"))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "peft_config.task_type",
        "peft_config.modules_to_save",
        "peft_config.use_dora",
    ]


def test_fields_without_effect_that_a_reader_would_expect_one_of_are_noted(given):
    notes = given(LoraConfig(lora_dropout=0.05, inference_mode=True, revision="main")).config.notes
    assert [note.partition(":")[0] for note in notes] == ["peft_config.inference_mode", "peft_config.lora_dropout"]


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", False])
def test_initialisations_that_are_not_supported_are_refused(init: Any, given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(init_lora_weights=init)
    with pytest.raises(ValueError, match=r"init_lora_weights|eva_config"):
        given(config)


def test_a_rank_above_the_buffers_is_refused_by_its_option(given):
    with pytest.raises(ValueError, match=r"lora.rank: must be at most 128 \(got 256\)"):
        given(LoraConfig(r=256))


def test_other_methods_are_refused(given):
    others = [peft.AdaLoraConfig(total_step=10), peft.IA3Config(), peft.PromptTuningConfig(num_virtual_tokens=4)]
    for config in others:
        with pytest.raises(ValueError, match=rf"must be a peft.LoraConfig, .* \(got {type(config).__name__}\)"):
            given(config)
    with pytest.raises(TypeError, match=r"peft_config must be a peft.LoraConfig \(got dict\)"):
        given({"r": 8})


def test_a_type_of_model_without_a_default_needs_target_modules(tmp_path):
    from transformers import Cohere2Config

    Cohere2Config(num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PEFT has no default for models of type cohere2: set it"):
        from_objects(GRPOConfig(), model=str(tmp_path), peft_config=LoraConfig())


def test_a_preset_of_ours_is_no_expression_of_peft(given):
    with pytest.raises(ValueError, match="no module is called 'attention'; name modules in a list"):
        given(LoraConfig(target_modules="attention"))


def test_a_selection_of_nothing_is_refused(given):
    with pytest.raises(ValueError, match="leave no module of the model"):
        given(LoraConfig(target_modules=["q_proj"], layers_to_transform=[7]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 16}, "peft_config.r: is 8, and the configuration sets lora.rank to 16: keep one of them"),
        ({"alpha": 32}, "peft_config.lora_alpha: is 8, and the configuration sets lora.alpha to 32"),
        ({"targets": ["q_proj"]}, r"peft_config.target_modules: is \['q_proj', 'v_proj'\], and"),
        ({"init_lora_weights": "orthogonal"}, "peft_config.init_lora_weights: is default, and"),
        ({"rank_pattern": {"q_proj": 4}}, r"peft_config.rank_pattern: is \{\}, and"),
    ],
)
def test_an_option_that_is_set_to_another_value_is_an_error(config: dict[str, Any], message: str, given):
    with pytest.raises(ValueError, match=message):
        given(LoraConfig(target_modules=["v_proj", "q_proj"]), GRPOConfig(**config))


def test_an_option_that_is_set_to_the_same_value_is_none(given):
    config = GRPOConfig(rank=8, alpha=8, targets=["v_proj", "q_proj"], max_rank=128, init_lora_weights=True)
    lora = given(LoraConfig(), config).config.lora
    assert (lora.rank, lora.max_rank) == (8, 128)


# ------------------------------------------------------------------------------------------------ without peft_config


def test_a_script_of_trl_without_a_peft_config_is_told_what_is_trained(given):
    config = GRPOConfig(per_device_train_batch_size=8)
    assert given(None, config).config.notes == (
        "training a LoRA adapter of rank 64 on all-linear (peft_config sets another)",
    )
    assert given(None, GRPOConfig(per_device_train_batch_size=8, rank=64)).notes == ()
    assert given(None).notes == () == given(LoraConfig(), config).notes


def test_the_options_train_the_same_adapter(given, load_model: Load):
    """Names, shapes and scales of the layers that are made of the options are those that PEFT makes."""
    from rankup.grpo.model.adapters import inject

    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 2}
    )
    ours, _ = inject(load_model("qwen2"), given(config, kind="qwen2").config.lora, seed=0)
    theirs = get_peft_model(load_model("qwen2"), config)

    def layers(model: Any) -> dict[str, tuple[float, int]]:
        found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        return {name: (layer.scaling["default"], layer.r["default"]) for name, layer in found.items()}

    assert layers(ours) == layers(theirs) and len(layers(ours)) == 14
