"""The fields that TRL's `GRPOConfig` has from transformers' `TrainingArguments`, in its order, with TRL's defaults."""

from .field import TrlField, converted, mapped, moot, other_default, refused

RAY = "set cluster.workers: Ray starts the workers, and each holds the complete model"
EXPORT = "share the result after the run: docs/export.md"
OF_THE_HUB = "acts only with push_to_hub"
NO_DATALOADER = "prompts are tokenized before the run; there is no DataLoader"
NO_DDP = "only the adapter's gradients are summed, in one collective"
STEPS = "in TRL's steps, see [steps](#steps); below 1 a share of the run"

TRAINING_FIELDS: dict[str, TrlField] = {
    "output_dir": mapped("logging.output_dir", "str | Path | None", None),
    "per_device_train_batch_size": other_default(
        "optim.prompts_per_step", "int", 8, "completions of one worker in one forward pass, see [batch](#batch)"
    ),
    "num_train_epochs": other_default(
        "optim.num_train_epochs", "float", 3.0, "steps are counted once the data is loaded; max_steps takes precedence"
    ),
    "max_steps": converted("optim.max_steps", "int", -1, "optimizer steps, see [steps](#steps); -1: num_train_epochs"),
    "learning_rate": mapped("optim.learning_rate", "float", 1e-6),
    "lr_scheduler_type": mapped(
        "optim.lr_scheduler_type",
        "str",
        "linear",
        "constant has the warm-up too; no reduce_lr_on_plateau, greedy, cosine_warmup_with_min_lr",
    ),
    "lr_scheduler_kwargs": mapped("optim.lr_scheduler_kwargs", "dict | str | None", None),
    "warmup_steps": converted("optim.warmup_steps, optim.warmup_ratio", "float", 0, STEPS),
    "optim": converted("optim.optimizer", "str", "adamw_torch_fused", "AdamW by its names: torch, 8-bit, paged"),
    "optim_args": refused("str | None", None, "set optim.adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    "weight_decay": mapped("optim.weight_decay", "float", 0.0),
    "adam_beta1": mapped("optim.adam_beta1", "float", 0.9),
    "adam_beta2": mapped("optim.adam_beta2", "float", 0.999),
    "adam_epsilon": mapped("optim.adam_epsilon", "float", 1e-8),
    "optim_target_modules": refused("str | list[str] | None", None, "set lora.targets: AdamW updates the adapter alone"),
    "gradient_accumulation_steps": other_default(
        "optim.prompts_per_step", "int", 1, "forward passes for one optimizer step, see [batch](#batch)"
    ),
    "average_tokens_across_devices": moot("bool", True, "N workers make the update of one worker on the same batch"),
    "max_grad_norm": mapped("optim.max_grad_norm", "float", 1.0),
    "label_smoothing_factor": moot("float", 0.0, "GRPO has no labels"),
    "bf16": converted("model.dtype", "bool | None", None, "true: bfloat16, false: float32"),
    "fp16": refused("bool", False, "float16 has too small a range for a policy's gradients: set bf16=True"),
    "bf16_full_eval": moot("bool", False, "the evaluation samples with the same weights as training"),
    "fp16_full_eval": moot("bool", False, "the evaluation samples with the same weights as training"),
    "tf32": moot("bool | None", None, "weights and operands are bf16; call torch.set_float32_matmul_precision for float32"),
    "gradient_checkpointing": mapped("optim.gradient_checkpointing", "bool", True),
    "gradient_checkpointing_kwargs": moot("dict | str | None", None, "how checkpoints are made is decided here"),
    "torch_compile": moot("bool", False, "fused kernels take its place", is_reported=True),
    "torch_compile_backend": moot("str | None", None, "fused kernels take the place of torch.compile"),
    "torch_compile_mode": moot("str | None", None, "fused kernels take the place of torch.compile"),
    "use_liger_kernel": moot("bool", False, "logits are never materialised; kernels/README.md lists the fused kernels"),
    "liger_kernel_config": moot("dict[str, bool] | None", None, "see use_liger_kernel"),
    "use_cache": moot("bool", False, "training needs no KV cache"),
    "neftune_noise_alpha": refused("float | None", None, "noise makes the trained policy another than the one that samples"),
    "torch_empty_cache_steps": moot("int | None", None, "a step allocates the same sizes again, so the cache is kept"),
    "auto_find_batch_size": refused("bool", False, "lower optim.tokens_per_pack: it affects memory, not the update"),
    "logging_strategy": moot("str", "steps", "metrics.jsonl has every step"),
    "logging_steps": converted(
        "logging.completions_steps", "float", 10, "with log_completions; metrics.jsonl has every step in any case"
    ),
    "logging_first_step": moot("bool", False, "metrics.jsonl has every step"),
    "log_on_each_node": moot("bool", True, "the main process logs"),
    "logging_nan_inf_filter": moot("bool", True, "an update with a non-finite gradient is skipped, and shown"),
    "include_num_input_tokens_seen": moot("str | bool", "no", "num_tokens is always a metric"),
    "log_level": moot("str", "passive", "the terminal view shows progress and notes"),
    "log_level_replica": moot("str", "warning", "the main process logs"),
    "disable_tqdm": moot("bool | None", None, "there is no tqdm; without a terminal progress is plain lines"),
    "report_to": mapped("logging.report_to", "str | list[str] | None", "none", "tensorboard, wandb and trackio"),
    "run_name": mapped("logging.run_name", "str | None", None),
    "project": mapped("logging.project", "str", "huggingface"),
    "trackio_space_id": refused("str | None", None, "set the environment variable TRACKIO_SPACE_ID"),
    "trackio_bucket_id": refused("str | None", None, "set the environment variable TRACKIO_BUCKET_ID"),
    "trackio_static_space_id": refused("str | Literal[False] | None", None, "run trackio sync after the run"),
    "eval_strategy": converted(
        "logging.eval_steps, logging.eval_epochs, logging.eval_before",
        "str",
        "no",
        "no: only after training; steps; epoch",
    ),
    "eval_steps": converted(
        "logging.eval_steps, logging.eval_epochs", "float | None", None, f"{STEPS}; evaluates without eval_strategy too"
    ),
    "eval_delay": refused("float", 0, "leave it out: an evaluation is one greedy completion of each prompt"),
    "per_device_eval_batch_size": moot("int", 8, "vLLM batches by itself: rollout.max_num_seqs"),
    "prediction_loss_only": moot("bool", False, "an evaluation has rewards, no loss"),
    "eval_on_start": converted("logging.eval_before", "bool", False, "the evaluation before the first step"),
    "eval_do_concat_batches": moot("bool", True, "an evaluation has rewards, no logits"),
    "eval_use_gather_object": moot("bool", False, "rewards are gathered in any case"),
    "eval_accumulation_steps": moot("int | None", None, "an evaluation has rewards, no logits"),
    "include_for_metrics": moot("list[str]", [], "there is no compute_metrics: rewards are the metrics"),
    "batch_eval_metrics": moot("bool", False, "there is no compute_metrics: rewards are the metrics"),
    "save_only_model": moot("bool", False, "a checkpoint always has what a resumed run needs", is_reported=True),
    "save_strategy": converted(
        "checkpoint.save_steps, checkpoint.save_epochs", "str", "steps", "no: only when a signal ends the run; steps; epoch"
    ),
    "save_steps": converted("checkpoint.save_steps, checkpoint.save_epochs", "float", 500, STEPS),
    "save_on_each_node": moot("bool", False, "the main process saves, to checkpoint.storage if workers share no disk"),
    "save_total_limit": mapped("checkpoint.keep_last", "int | None", None, "None: the default here"),
    "enable_jit_checkpoint": moot("bool", False, "SIGTERM always saves a checkpoint"),
    "push_to_hub": refused("bool", False, EXPORT),
    "hub_token": moot("str | None", None, OF_THE_HUB),
    "hub_private_repo": moot("bool | None", None, OF_THE_HUB),
    "hub_model_id": moot("str | None", None, OF_THE_HUB),
    "hub_strategy": moot("str", "every_save", OF_THE_HUB),
    "hub_always_push": moot("bool", False, OF_THE_HUB),
    "hub_revision": moot("str | None", None, OF_THE_HUB),
    "load_best_model_at_end": mapped("guards.load_best_model_at_end", "bool", False, "best by the evaluation's mean reward"),
    "metric_for_best_model": converted(
        "guards.load_best_model_at_end", "str | None", None, "only the mean reward: reward, eval_reward"
    ),
    "greater_is_better": converted("guards.load_best_model_at_end", "bool | None", None, "only true: higher is better"),
    "ignore_data_skip": moot("bool", False, "the prompts of a step depend on seed and step only; nothing is skipped"),
    "restore_callback_states_from_checkpoint": refused("bool", False, "callbacks keep no state when a run is resumed"),
    "full_determinism": moot("bool", False, "runs are bit-exact on the CPU; CUDA kernels are not", is_reported=True),
    "seed": mapped("seed", "int", 42),
    "data_seed": mapped("data.shuffle_seed", "int | None", None),
    "use_cpu": moot("bool", False, "set CUDA_VISIBLE_DEVICES= to hide the GPUs", is_reported=True),
    "accelerator_config": refused("dict | str | None", None, RAY),
    "parallelism_config": refused("object", None, RAY),
    "dataloader_drop_last": moot("bool", False, NO_DATALOADER),
    "dataloader_num_workers": moot("int", 0, NO_DATALOADER),
    "dataloader_pin_memory": moot("bool", True, NO_DATALOADER),
    "dataloader_persistent_workers": moot("bool", False, NO_DATALOADER),
    "dataloader_prefetch_factor": moot("int | None", None, NO_DATALOADER),
    "dataloader_multiprocessing_context": moot("str | None", None, NO_DATALOADER),
    "dataloader_in_order": moot("bool", True, NO_DATALOADER),
    "remove_unused_columns": moot("bool | None", False, "reward functions always get the columns they name"),
    "label_names": moot("list[str] | None", None, "GRPO has no labels"),
    "train_sampling_strategy": moot("str", "random", "as in TRL, shuffle_dataset decides"),
    "length_column_name": moot("str", "length", "prompts are not grouped by length"),
    "ddp_find_unused_parameters": moot("bool | None", None, NO_DDP),
    "ddp_bucket_cap_mb": moot("int | None", None, NO_DDP),
    "ddp_broadcast_buffers": moot("bool | None", None, NO_DDP),
    "ddp_static_graph": moot("bool | None", None, NO_DDP),
    "ddp_backend": moot("str | None", None, "NCCL on CUDA, gloo on the CPU"),
    "ddp_timeout": mapped("cluster.step_timeout", "int", 1800),
    "fsdp": refused("str | None", None, RAY),
    "fsdp_config": refused("dict | str | None", None, RAY),
    "deepspeed": refused("dict | str | None", None, RAY),
    "debug": moot("str | list[str]", "", "`rankup doctor` and `rankup check` find problems"),
    "skip_memory_metrics": moot("bool", True, "memory is always a metric"),
    "do_train": moot("bool", False, "call trainer.train()"),
    "do_eval": moot("bool", False, "eval_strategy decides; trainer.evaluate() evaluates once"),
    "do_predict": moot("bool", False, "trainer.evaluate() evaluates once"),
    "resume_from_checkpoint": moot("str | None", None, "as in TRL, pass it to trainer.train()"),
    "local_rank": moot("int", -1, "Ray numbers the workers"),
}
