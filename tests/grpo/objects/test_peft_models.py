"""A `peft.PeftModel` becomes its base model and its adapter in PEFT's format, which together compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankup import GRPOConfig
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.objects.adapter import adapter_name, base_model_of, save_adapter
from rankup.grpo.objects.base import base_of
from rankup.grpo.objects.given import from_objects

Load = Callable[..., PreTrainedModel]
Logits = Callable[..., torch.Tensor]
Make = Callable[..., PeftModel]



@pytest.fixture
def make_peft(load_model: Load) -> Make:
    """A function that wraps a tiny model, with a strong random adapter."""

    def make(kind: str = "llama", *, adapter: str = "default", **options: Any) -> PeftModel:
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})
        with quiet_stderr():
            model = get_peft_model(load_model(kind), config, adapter_name=adapter)
        randomise(model, adapter)
        return model.eval()

    return make


def randomise(model: PeftModel, adapter: str, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and name.removesuffix(".weight").endswith(f".{adapter}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def files_of(model: PeftModel) -> tuple[str, Path]:
    """The folders of base model and adapter."""
    name = adapter_name(model)
    base = base_of(base_model_of(model), GRPOConfig().model, None).name
    return base, save_adapter(model, name, base=base)


def reloaded(base: str, adapter: Path) -> PeftModel:
    with quiet_stderr():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 2}},
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.0\..*_proj", "exclude_modules": ["o_proj"]},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "v_proj"]},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_base_and_adapter_compute_the_same(kind: str, options: dict[str, Any], make_peft: Make, logits: Logits):
    model = make_peft(kind, **options)
    base, adapter = files_of(model)
    with model.disable_adapter():
        assert torch.equal(logits(base), logits(model))
    assert torch.equal(logits(reloaded(base, adapter)), logits(model))
    assert not torch.equal(logits(base), logits(model))


def test_the_base_of_an_unchanged_model_is_its_own_folder(make_peft: Make, tiny_model_path, cache: Path):
    base, adapter = files_of(make_peft())
    assert base == str(tiny_model_path("llama")) and not (cache / "models").exists()
    assert adapter.parent == cache / "adapters"


def test_a_base_that_pissa_changed_is_saved(make_peft: Make, cache: Path):
    base, adapter = files_of(make_peft(init_lora_weights="pissa"))
    assert base.startswith(str(cache / "models"))
    assert json.loads((adapter / "adapter_config.json").read_text())["init_lora_weights"] is True  # not to change it again


def test_the_saved_configuration_selects_layers_by_target_modules_alone(make_peft: Make):
    options = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "exclude_modules": ["v_proj"]}
    _, adapter = files_of(make_peft(**options, lora_dropout=0.2))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == r"model\.layers\.0\.self_attn\.q_proj"
    assert (config["layers_to_transform"], config["exclude_modules"], config["lora_dropout"]) == (None, None, 0.0)


def test_the_same_adapter_gives_the_same_folder_and_another_one_another(make_peft: Make):
    folders = []
    for seed in (0, 0, 1):
        model = make_peft(target_modules=["v_proj", "q_proj", "k_proj", "o_proj"])
        randomise(model, "default", seed=seed)
        folders.append(files_of(model)[1])
    assert folders[0] == folders[1] != folders[2]


def test_the_active_one_of_several_adapters_is_used(make_peft: Make, logits: Logits):
    model = make_peft()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    randomise(model, "other", seed=3)
    model.set_adapter("other")
    base, adapter = files_of(model)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    assert torch.equal(logits(reloaded(base, adapter)), logits(model))


def test_the_model_is_not_modified(make_peft: Make, logits: Logits):
    model = make_peft()
    with torch.no_grad():
        base_model_of(model).get_parameter("model.norm.weight")[0] += 1  # so that it is saved
    hook = model.register_forward_hook(lambda *_: None)
    config = model.peft_config["default"].to_dict()
    weights = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    before = logits(model)
    files_of(model)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(after[name].data_ptr() == at and torch.equal(after[name], value) for name, (at, value) in weights.items())
    assert model.peft_config["default"].to_dict() == config and hook.id in model._forward_hooks
    assert torch.equal(logits(model), before)


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_peft_config_in_addition_is_refused(make_peft: Make):
    with pytest.raises(ValueError, match=r"peft_config: the model is a PeftModel already: pass it alone"):
        from_objects(GRPOConfig(), model=make_peft(), peft_config=LoraConfig())


def test_a_merged_adapter_is_refused(make_peft: Make):
    model: Any = make_peft()
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged into the base weights: call unmerge_adapter"):
        from_objects(GRPOConfig(), model=model)


def test_a_disabled_adapter_is_refused(make_peft: Make):
    model: Any = make_peft()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="its adapter is disabled: call enable_adapter_layers"):
        from_objects(GRPOConfig(), model=model)


def test_several_active_adapters_are_refused(make_peft: Make):
    model: Any = make_peft()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"one adapter must be active \(active: default, other\): call set_adapter"):
        from_objects(GRPOConfig(), model=model)


@pytest.mark.parametrize("make", [IA3Config, lambda **task: PromptTuningConfig(num_virtual_tokens=2, **task)])
def test_other_methods_are_refused(make: Callable[..., Any], load_model: Load):
    config = make(task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=rf"must be a peft.LoraConfig, .* \(got {type(config).__name__}\)"):
        from_objects(GRPOConfig(), model=get_peft_model(load_model(), config))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"bias": "all"}, {"lora_bias": True}])
def test_parts_that_are_not_supported_are_refused(options: dict[str, Any], make_peft: Make):
    with pytest.raises(ValueError, match=rf"peft_config.{next(iter(options))}: is not supported"):
        from_objects(GRPOConfig(), model=make_peft(**options))


def test_saved_modules_of_another_adapter_are_refused(make_peft: Make):
    model = make_peft()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["norm"]))
    with pytest.raises(ValueError, match="an adapter has modules_to_save or trainable tokens"):
        from_objects(GRPOConfig(), model=model)


def test_a_changed_scale_is_refused(make_peft: Make):
    model = make_peft()
    layer: Any = base_model_of(model).get_submodule("model.layers.1.mlp.down_proj")
    layer.scale_layer(0.5)
    with pytest.raises(ValueError, match=r"scale of model.layers.1.mlp.down_proj is 1, not alpha / rank, which is 2"):
        from_objects(GRPOConfig(), model=model)


def test_a_wrapped_model_without_its_peft_model_is_refused(make_peft: Make):
    with pytest.raises(ValueError, match="has layers of PEFT: pass the PeftModel"):
        from_objects(GRPOConfig(), model=make_peft().get_base_model())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ configuration


def test_training_starts_from_the_adapter(make_peft: Make, tiny_model_path, cache: Path):
    given = from_objects(GRPOConfig(per_device_train_batch_size=8), model=make_peft(lora_dropout=0.1))
    assert (given.config.model.name, given.config.model.dtype) == (str(tiny_model_path("llama")), "float32")
    folder = given.config.lora.start_from
    assert folder is not None
    assert Path(folder).parent == cache / "adapters"
    assert [note.partition(":")[0] for note in given.notes] == ["model", "peft_config.lora_dropout"]
