"""What every field of PEFT's `LoraConfig` becomes, when a script passes one as `peft_config`.

    PEFT_FIELDS["r"].to                     # ("lora.rank",)
    PEFT_FIELDS["use_dora"].kind            # "refused": only PEFT's default is accepted

`grpo/objects/peft_config.py` converts them. A test holds the table complete against the installed PEFT.
"""

from __future__ import annotations

from .field import TrlField, converted, mapped, moot, refused

PEFT_VERSION = "0.21"
"""The version of PEFT whose fields `PEFT_FIELDS` has."""

OF_FILES = "describes saved adapters"
OTHER_POLICY = "vLLM would sample from another policy"
BASE_IS_SHARED = "it changes the base weights, which vLLM also uses"
NEEDS_DATA = "the initialisation needs data: set init_lora_weights to True, 'gaussian' or 'orthogonal'"

PEFT_FIELDS: dict[str, TrlField] = {
    "task_type": moot("str | None", None, "None or CAUSAL_LM; others are an error"),
    "peft_type": moot("str | None", None, "LORA; other types are an error"),
    "auto_mapping": moot("dict | None", None, OF_FILES),
    "peft_version": moot("str | None", None, OF_FILES),
    "base_model_name_or_path": moot("str | None", None, OF_FILES),
    "revision": moot("str | None", None, OF_FILES),
    "inference_mode": moot("bool", False, "the adapter is always trained", is_reported=True),
    "r": mapped("lora.rank", "int", 8, "1 to 128"),
    "target_modules": converted(
        "lora.targets", "list[str] | str | None", None, "None: PEFT's default for the model; all-linear: all but the head"
    ),
    "exclude_modules": converted("lora.targets", "list[str] | str | None", None, "the remaining layers"),
    "lora_alpha": mapped("lora.alpha", "int", 8),
    "lora_dropout": moot("float", 0.0, "training has no dropout, as the policy that samples has none", is_reported=True),
    "fan_in_fan_out": refused("bool", False, "layers are linear ones: leave it out"),
    "bias": refused("str", "none", "biases are of the base model, which stays frozen: leave it at 'none'"),
    "use_rslora": mapped("lora.use_rslora", "bool", False),
    "modules_to_save": refused("list[str] | None", None, "only LoRA layers are trained: name the layers in target_modules"),
    "init_lora_weights": mapped("lora.init_lora_weights", "bool | str", True, "True, gaussian or orthogonal"),
    "layers_to_transform": converted("lora.targets", "list[int] | int | None", None, "the layers with these numbers"),
    "layers_pattern": converted("lora.targets", "list[str] | str | None", None, "where layers_to_transform counts"),
    "rank_pattern": mapped("lora.rank_pattern", "dict", {}),
    "alpha_pattern": mapped("lora.alpha_pattern", "dict", {}),
    "megatron_config": refused("dict | None", None, "Megatron's layers are not supported"),
    "megatron_core": moot("str | None", "megatron.core", "acts only with megatron_config"),
    "trainable_token_indices": refused("list | dict | None", None, "add embed_tokens to target_modules to adapt the embedding"),
    "loftq_config": refused("dict", {}, BASE_IS_SHARED),
    "eva_config": refused("EvaConfig | None", None, NEEDS_DATA),
    "corda_config": refused("CordaConfig | None", None, BASE_IS_SHARED),
    "lora_ga_config": refused("LoraGAConfig | None", None, NEEDS_DATA),
    "use_dora": refused("bool", False, "vLLM cannot serve DoRA"),
    "velora_config": refused("VeloraConfig | None", None, "gradients are exact here; gradient_checkpointing saves memory"),
    "alora_invocation_tokens": refused("list[int] | None", None, "the adapter acts on all tokens"),
    "use_qalora": refused("bool", False, OTHER_POLICY),
    "qalora_group_size": moot("int", 16, "acts only with use_qalora"),
    "monteclora_config": refused("MontecloraConfig | None", None, OTHER_POLICY),
    "layer_replication": refused("list | None", None, "save the model with the repeated layers, and train that one"),
    "runtime_config": moot("LoraRuntimeConfig", None, "the adapter is in vLLM's buffers"),
    "lora_bias": refused("bool", False, "vLLM's LoRA layers have no bias"),
    "target_parameters": refused("list[str] | None", None, "only linear layers and the input embedding can be adapted"),
    "use_bdlora": refused("BdLoraConfig | None", None, OTHER_POLICY),
    "arrow_config": refused("ArrowConfig | None", None, OTHER_POLICY),
    "kasa_config": refused("KasaConfig | None", None, OTHER_POLICY),
    "ensure_weight_tying": refused("bool", False, "adapters on the head and on the embedding are separate"),
}
"""Every field of `peft.LoraConfig`."""
