"""On which layers of a model there can be no adapter, known before a model is loaded. Imports neither vLLM nor PEFT.

    not_adaptable(config)      # {"gate_up_proj": "vLLM loads adapters on gate_proj and up_proj instead"} for GLM 4

The presets of `lora.targets` leave these layers out. An engine refuses them if they are named, and likewise any layer of a
model that this table does not know (`RolloutEngine`). A test holds the table against the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

SPLIT = "vLLM loads adapters on gate_proj and up_proj, which this model has in one layer"

MAMBA = "PEFT has no adapters on it in models with Mamba, as kernels for training read its weight alone"

EXPERTS = "PEFT takes such names for layers of the experts in this model"

NAMES_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")

EXPERTS_BY_NAME = frozenset({
    *("afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo"),
    *("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe"),
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "solar_open"),
})
"""Kinds of models in whose adapters PEFT 0.21 takes `NAMES_OF_EXPERTS` for the experts, linear layers in transformers 4; also
where a shared expert or a dense MLP has layers of these names."""

LEFT_OUT: dict[str, dict[str, str]] = {
    **{kind: dict.fromkeys(NAMES_OF_EXPERTS, EXPERTS) for kind in EXPERTS_BY_NAME},
    "glm4": {"gate_up_proj": SPLIT},
    "nemotron_h": {"out_proj": MAMBA},
    "falcon_h1": {"out_proj": MAMBA},
}
"""Reasons by kind of model (`model_type`) and layer."""


def not_adaptable(config: PretrainedConfig) -> Mapping[str, str]:
    """The layers, by the last part of their names, and the reasons."""
    return LEFT_OUT.get(config.get_text_config().model_type, {})
