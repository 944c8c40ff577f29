"""The fields that TRL's `GRPOConfig` adds to `TrainingArguments`, in its order."""

from .field import TrlField, converted, mapped, moot, other_default, refused

SERVER = "of vllm_mode='server'; vLLM runs in this process"
ADAPTIVE = "acts only with use_adaptive_entropy"
REF_MODEL = "acts only with sync_ref_model"
VESPO = "of loss_type='vespo'"
OTHER_SAMPLERS = "vLLM samples, or with use_vllm=False the torch engine"

GRPO_FIELDS: dict[str, TrlField] = {
    "model_init_kwargs": converted(
        "model.dtype, model.revision",
        "dict[str, Any] | str | None",
        None,
        "dtype and revision; how weights are placed and attention is computed is decided here",
    ),
    "trust_remote_code": refused("bool", False, "models with code of their own do not run here"),
    "router_aux_loss_coef": refused("float | None", None, "leave it out: routers have no adapter"),
    "disable_dropout": moot("bool", False, "there is no dropout in training"),
    "cast_lm_head_to_fp32": refused("bool", False, "leave it out: log-probabilities are computed in fp32 from the logits"),
    "num_generations": other_default("rollout.num_generations", "int", 8, "the same option, see [batch](#batch)"),
    "num_generations_eval": mapped(
        "data.eval_samples", "int | None", None, "None: one greedy completion of each prompt, not num_generations"
    ),
    "max_completion_length": other_default("rollout.max_completion_length", "int", 512, "the same option"),
    "ds3_gather_for_generation": moot("bool", True, "of DeepSpeed"),
    "shuffle_dataset": mapped("data.shuffle", "bool | None", True),
    "pad_to_multiple_of": moot("int | str | None", "auto", "packs have no padding"),
    "generation_batch_size": other_default(
        "optim.prompts_per_step", "int | None", None, "completions that are sampled at once, see [batch](#batch)"
    ),
    "steps_per_generation": other_default(
        "optim.prompts_per_step", "int | None", None, "forward passes over the completions of a generation, see [batch](#batch)"
    ),
    "temperature": mapped("rollout.temperature", "float", 1.0),
    "top_p": mapped("rollout.top_p", "float", 1.0),
    "top_k": mapped("rollout.top_k", "int", 0),
    "min_p": mapped("rollout.min_p", "float | None", None),
    "generation_kwargs": converted(
        "rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, rollout.repetition_penalty, rollout.stop, "
        "rollout.max_completion_length, rollout.skip_special_tokens, rollout.include_stop_str_in_output, "
        "rollout.generation_kwargs",
        "dict[str, Any] | str | None",
        None,
        "keys that are options here become these, which must not have other values; the others are rollout.generation_kwargs",
    ),
    "chat_template_kwargs": mapped("data.chat_template_kwargs", "dict[str, Any] | str | None", None),
    "repetition_penalty": mapped("rollout.repetition_penalty", "float", 1.0),
    "cache_implementation": moot("str | None", None, "vLLM has its own KV cache"),
    "use_vllm": converted("rollout.engine", "bool", False, "false: torch, true: vllm"),
    "vllm_mode": refused("str", "colocate", "leave it out: vLLM runs in this process, so there is no server to start"),
    "vllm_model_impl": refused("str", "vllm", "leave it out: vLLM's own layers hold the adapter"),
    "vllm_enable_sleep_mode": mapped(
        "rollout.release_kv_cache", "bool", False, "the weights stay in place: they are the trainer's too"
    ),
    "vllm_structured_outputs_regex": converted(
        "rollout.generation_kwargs", "str | None", None, "structured_outputs.regex of generation_kwargs"
    ),
    "vllm_server_base_url": moot("str | None", None, SERVER),
    "vllm_server_host": moot("str", "0.0.0.0", SERVER),
    "vllm_server_port": moot("int", 8000, SERVER),
    "vllm_server_timeout": moot("float", 240.0, SERVER),
    "vllm_group_port": moot("int", 51216, SERVER),
    "vllm_gpu_memory_utilization": mapped("rollout.gpu_memory_utilization", "float", 0.3),
    "vllm_max_model_length": converted(
        "rollout.max_prompt_length", "int | None", None, "less max_completion_length it is the longest prompt"
    ),
    "vllm_tensor_parallel_size": refused("int", 1, "a model must fit on one device; set cluster.workers to use more"),
    "beta": mapped("algorithm.beta", "float", 0.0),
    "num_iterations": converted(
        "algorithm.num_iterations", "int", 1, "passes over the completions of a generation, see [batch](#batch)"
    ),
    "epsilon": mapped("algorithm.epsilon", "float", 0.2, "epsilon_high does not follow it, set both"),
    "delta": mapped("algorithm.delta", "float | None", None),
    "epsilon_high": mapped("algorithm.epsilon_high", "float | None", None),
    "sapo_temperature_neg": mapped("algorithm.sapo_temperature_neg", "float", 1.05),
    "sapo_temperature_pos": mapped("algorithm.sapo_temperature_pos", "float", 1.0),
    "vespo_k_pos": moot("float", 2.0, VESPO),
    "vespo_lambda_pos": moot("float", 3.0, VESPO),
    "vespo_k_neg": moot("float", 3.0, VESPO),
    "vespo_lambda_neg": moot("float", 2.0, VESPO),
    "importance_sampling_level": mapped("algorithm.importance_sampling_level", "str", "token"),
    "reward_weights": mapped("rewards.weights", "list[float] | None", None),
    "multi_objective_aggregation": mapped("rewards.multi_objective_aggregation", "str", "sum_then_normalize"),
    "scale_rewards": mapped("algorithm.scale_rewards", "str | bool", "group"),
    "loss_type": mapped("algorithm.loss_type", "str", "dapo", "all but luspo and vespo"),
    "mask_truncated_completions": mapped("algorithm.mask_truncated_completions", "bool", False),
    "sync_ref_model": refused("bool", False, "leave it out: the reference of the KL penalty is fixed, see algorithm.reference"),
    "ref_model_mixup_alpha": moot("float", 0.6, REF_MODEL),
    "ref_model_sync_steps": moot("int", 512, REF_MODEL),
    "top_entropy_quantile": mapped("algorithm.top_entropy_quantile", "float", 1.0),
    "entropy_coef": mapped("algorithm.entropy_coef", "float", 0.0),
    "use_adaptive_entropy": refused("bool", False, "set algorithm.entropy_coef to a constant"),
    "entropy_coef_min": moot("float", 0.0, ADAPTIVE),
    "entropy_coef_max": moot("float", 1.0, ADAPTIVE),
    "entropy_coef_delta": moot("float", 0.005, ADAPTIVE),
    "entropy_target": moot("float", 0.2, ADAPTIVE),
    "max_tool_calling_iterations": mapped("rollout.max_tool_calling_iterations", "int | None", None),
    "vllm_importance_sampling_correction": mapped(
        "correction.vllm_importance_sampling_correction", "bool", True, "a switch in addition to the mode"
    ),
    "vllm_importance_sampling_mode": mapped("correction.mode", "str", "sequence_mask"),
    "vllm_importance_sampling_clip_max": mapped("correction.cap", "float | None", 3.0, "None: the default of the mode"),
    "vllm_importance_sampling_clip_min": converted(
        "correction.mode, correction.floor", "float | None", None, "with token_mask: icepop masks weights outside [floor, cap]"
    ),
    "off_policy_mask_threshold": mapped("algorithm.off_policy_mask_threshold", "float | None", None),
    "use_bias_correction_kl": mapped("algorithm.use_bias_correction_kl", "bool", True),
    "log_completions": converted("logging.completions_steps", "bool", False, "every logging_steps steps, or never"),
    "log_multimodal": moot("bool", True, "completions are text"),
    "num_completions_to_print": mapped("logging.num_completions_to_print", "int | None", None),
    "log_unique_prompts": moot("bool", False, "completions/ has all of them"),
    "log_completions_hub_repo": refused("str | None", None, "completions/ in the run folder has them as parquet: upload it"),
    "use_transformers_continuous_batching": moot("bool", False, OTHER_SAMPLERS),
    "transformers_continuous_batching_config": moot("dict | str | None", None, OTHER_SAMPLERS),
    "use_transformers_paged": moot("bool", False, OTHER_SAMPLERS),
    "vllm_importance_sampling_cap": mapped("correction.cap", "float | None", None, "TRL's older name of clip_max"),
}
