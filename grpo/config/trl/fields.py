"""What every name of TRL means here: the one table from which the names, the errors, the types and docs/trl.md are made.

    FIELDS["per_device_train_batch_size"].kind          # "other default"
    RENAMED["shuffle_dataset"]                          # "data.shuffle"

A test holds the table complete against the installed TRL.
"""

from .field import TrlField, mapped, moot
from .grpo_fields import GRPO_FIELDS
from .training_fields import TRAINING_FIELDS

TRL_VERSION = "1.16"
"""The version of TRL whose fields `FIELDS` has."""

FIELDS: dict[str, TrlField] = {**TRAINING_FIELDS, **GRPO_FIELDS}
"""Every field of TRL's `GRPOConfig`."""

OTHER_NAMES: dict[str, TrlField] = {
    "dataset_name": mapped("data.train", "str", None),
    "dataset_config": mapped("data.subset", "str | None", None),
    "dataset_train_split": mapped("data.train_split", "str", "train"),
    "dataset_test_split": mapped("data.eval_split", "str", "test"),
    "model_name_or_path": mapped("model.name", "str", None),
    "model_revision": mapped("model.revision", "str | None", "main"),
    "lora_r": mapped("lora.rank", "int", 16),
    "lora_alpha": mapped("lora.alpha", "float", 32),
    "lora_dropout": mapped("lora.dropout", "float", 0.05),
    "lora_target_modules": mapped("lora.targets", "str | list[str]", None),
    "embedding_lr": mapped("optim.embedding_learning_rate", "float | None", None),
    "loraplus_lr_ratio": mapped("optim.lora_plus_ratio", "float", None),
}
"""Names of TRL's other classes (`ModelConfig`, `ScriptArguments`) and of PEFT, in run files and flat."""

OLDER_NAMES: dict[str, TrlField] = {
    "warmup_ratio": mapped("optim.warmup_ratio", "float", 0.0),
    "max_prompt_length": mapped("rollout.max_prompt_length", "int", 512),
    "logging_dir": moot("str | None", None, "trackers write into the run folder"),
    "overwrite_output_dir": moot("bool", False, "an older run of the same name is kept as runs/mine.1"),
    "save_safetensors": moot("bool", True, "weights are always saved as safetensors"),
    "group_by_length": moot("bool", False, "packs have no padding"),
    "use_liger_loss": moot("bool", False, "logits are never materialised"),
    "wandb_log_unique_prompts": moot("bool", False, "completions/ has all of them"),
    "vllm_device": moot("str", "auto", "vLLM runs on the trainer's device"),
    "vllm_dtype": moot("str", "auto", "model.dtype decides"),
    "vllm_enable_prefix_caching": moot("bool", True, "the prefix cache is always on"),
}
"""Names that earlier versions had and scripts still use."""

ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "vllm_max_model_len": "vllm_max_model_length",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
}
"""Names that were changed: the old one and the new one."""

ALL_NAMES: dict[str, TrlField] = {**FIELDS, **OTHER_NAMES, **OLDER_NAMES, **{old: FIELDS[new] for old, new in ALIASES.items()}}
"""Every name of TRL, PEFT and transformers that is known."""

RENAMED = {name: field.to[0] for name, field in ALL_NAMES.items() if field.kind == "mapped" and not field.converts}
"""Names whose value is that of an option of ours."""

BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")
"""The fields of the batch: a script that names any of them gets TRL's amounts, see `batch.py`."""

NONE_IS_UNSET = frozenset(
    {"min_p", "chat_template_kwargs", "lr_scheduler_kwargs", "num_completions_to_print", "shuffle_dataset", "save_total_limit"}
    | {"generation_kwargs"}
    | {"eval_steps", "max_steps", "report_to", "vllm_importance_sampling_cap"}
)
"""Options for which TRL accepts None, and the option here has no such value: they keep the default."""

TEXT_FOR_SECTIONS = {"model": "name", "optim": "optimizer"}
"""Sections that may be a text, and the option that it sets: `model="name"` and TRL's `optim="adamw_torch"`."""

HINTS = {
    "r": "did you mean lora.rank?",
    "lr": "did you mean optim.learning_rate?",
    "adapter": "did you mean lora.start_from?",
    "num_generations_eval": "it was renamed to data.eval_samples",
}
"""Hints for common names from other libraries that are not similar to ours in spelling."""
