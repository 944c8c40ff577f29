"""The keyword arguments of `GRPOConfig`, for editors and type checkers: sections, flat names, names of TRL.

Generated: `python -m rankup.grpo.config.trl.generate`. Do not edit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict

from ....rewards.config import RewardFunction, RewardsConfig
from ....rollout.config import RolloutConfig
from ....rollout.generation_kwargs import GenerationKwargs
from ..algorithm import AlgorithmConfig, CorrectionConfig
from ..checkpoint import CheckpointConfig
from ..cluster import ClusterConfig
from ..data import DataConfig, EvalSet
from ..guards import GuardsConfig
from ..logging import LoggingConfig
from ..lora import LoraConfig
from ..model import ModelConfig
from ..optim import OptimConfig


class Arguments(TypedDict, total=False):
    """Names of TRL stand at the end, without those that are the same here. A value of None is that of no value."""

    model: ModelConfig | dict[str, Any] | str
    lora: LoraConfig | dict[str, Any]
    rollout: RolloutConfig | dict[str, Any]
    algorithm: AlgorithmConfig | dict[str, Any]
    correction: CorrectionConfig | dict[str, Any]
    guards: GuardsConfig | dict[str, Any]
    optim: OptimConfig | dict[str, Any] | str
    rewards: RewardsConfig | dict[str, Any]
    data: DataConfig | dict[str, Any]
    logging: LoggingConfig | dict[str, Any]
    checkpoint: CheckpointConfig | dict[str, Any]
    cluster: ClusterConfig | dict[str, Any]
    seed: int
    deterministic: bool
    name: str
    revision: str | None
    tokenizer: str | None
    dtype: Literal["bfloat16", "float16", "float32"]
    load_in: Literal["nf4"] | None
    share_base_weights: Literal["auto"] | bool
    start_from: str | None
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    max_rank: Literal[64, 128] | None
    use_rslora: bool
    targets: str | list[str]
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] | bool
    dropout: float
    use_dora: bool
    num_generations: int
    max_prompt_length: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float | None
    repetition_penalty: float
    stop: list[str] | str
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    generation_kwargs: GenerationKwargs | dict[str, Any] | str | None
    engine: Literal["vllm", "torch"]
    max_num_seqs: int | None
    gpu_memory_utilization: float | None
    kv_cache_gib: float
    release_kv_cache: bool | None
    enforce_eager: bool | None
    model_runner: Literal["v1", "v2"]
    routed_experts: Literal["auto", "ignore", "compare", "replay"]
    tools: list[str]
    environment: str | dict[str, str] | None
    max_tool_calling_iterations: int | None
    max_turn_length: int | None
    tool_timeout: float
    tool_workers: int
    tool_parser: str | None
    on_malformed_call: Literal["answer", "end"]
    lora_path: Literal["auto", "dense", "punica"]
    loss_type: str | Callable[..., Any]
    advantage_estimator: str | Callable[..., Any] | None
    scale_rewards: Literal["group", "batch", "none"] | bool | None
    loss_aggregation: Literal["token_mean", "local_token_mean", "sequence_mean", "constant"] | None
    importance_sampling_level: Literal["token", "sequence"] | None
    epsilon: float | None
    epsilon_high: float | None
    delta: float | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    beta: float
    reference: Literal["start", "base"]
    use_bias_correction_kl: bool
    entropy_coef: float
    top_entropy_quantile: float
    mask_truncated_completions: bool
    off_policy_mask_threshold: float | None
    soft_overlong_tokens: int
    filter_zero_variance: bool
    max_resampling_rounds: int
    group_filter: str | Callable[..., Any] | None
    num_iterations: int
    mode: Literal["none", "token_truncate", "token_mask", "icepop", "sequence_truncate", "sequence_mask"] | bool
    cap: float | None
    floor: float
    veto: float | None
    enabled: bool
    skip: bool
    halve: bool
    restore: bool
    load_best_model_at_end: bool
    sampler_kl_watch: float | None
    sampler_kl_stop: float | None
    sampler_ratio_watch: float | None
    sampler_ratio_stop: float | None
    effective_sample_size_watch: float | None
    effective_sample_size_stop: float | None
    grad_norm_watch: float | None
    grad_norm_stop: float | None
    entropy_watch: float | None
    entropy_stop: float | None
    advantage_scale_watch: float | None
    advantage_scale_stop: float | None
    length_watch: float | None
    length_stop: float | None
    reward_watch: float | None
    reward_stop: float | None
    evaluation_watch: float | None
    evaluation_stop: float | None
    zero_variance_watch: float | None
    baseline_steps: int
    window_steps: int
    snapshot_steps: int
    max_consecutive_skips: int
    max_restores: int
    min_learning_rate_factor: float
    learning_rate: float
    rescale_learning_rate: bool
    lora_plus_ratio: float
    embedding_learning_rate: float | None
    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ]
    lr_scheduler_kwargs: dict[str, float | str] | str | None
    max_steps: int | None
    num_train_epochs: float | None
    warmup_steps: int | float
    warmup_ratio: float
    prompts_per_step: int
    max_grad_norm: float
    initial_loss_scale: float
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    tokens_per_pack: int | None
    logits_mib: int | None
    lora_kernel: Literal["auto", "triton", "cublas"]
    gradient_checkpointing: bool
    functions: list[str | RewardFunction | dict[str, Any]] | str | dict[str, Any]
    eval_functions: dict[str, list[str | RewardFunction | dict[str, Any]]] | dict[str, str | dict[str, Any]]
    weights: list[float] | None
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"]
    isolation: Literal["inline", "process", "ray"]
    num_workers: int | None
    timeout: float | None
    retries: int
    memory_gib: float | None
    on_error: Literal["stop", "none"] | float | str
    rows_per_call: int | None
    max_steps_without_reward: int | None
    train: str | list[str] | None
    eval: str | list[str] | dict[str, str | list[str] | EvalSet | dict[str, Any]] | None
    subset: str | None
    train_split: str
    eval_split: str
    column_types: dict[str, Literal["str", "int", "float", "bool", "json"]]
    encoding: str
    prompt_column: str
    system_prompt: str | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | str | None
    on_bad_row: Literal["stop", "drop"]
    shuffle: bool
    shuffle_seed: int | None
    sampler: str | Callable[..., Any] | None
    eval_rows: int | None
    eval_samples: int | None
    eval_temperature: float | None
    eval_top_p: float | None
    eval_pass_reward: float
    options: dict[str, Any]
    run_name: str | None
    output_dir: str | Path | None
    working_dir: str | Path | None
    eval_steps: int | float | None
    eval_epochs: float | None
    eval_before: bool
    completions_steps: int
    num_completions_to_print: int | None
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] | str | None
    project: str
    profile_steps: list[int] | int
    save_steps: int | float
    save_epochs: float | None
    keep_last: int
    keep_best: int
    storage: str | None
    push_to_hub: bool
    hub_model_id: str | None
    hub_private_repo: bool | None
    workers: int
    cpus_per_worker: float
    gpus_per_worker: float | None
    max_failures: int
    step_timeout: float
    per_device_train_batch_size: int
    optim_args: str | None
    optim_target_modules: str | list[str] | None
    gradient_accumulation_steps: int
    average_tokens_across_devices: bool
    label_smoothing_factor: float
    bf16: bool | None
    fp16: bool
    bf16_full_eval: bool
    fp16_full_eval: bool
    tf32: bool | None
    gradient_checkpointing_kwargs: dict | str | None
    torch_compile: bool
    torch_compile_backend: str | None
    torch_compile_mode: str | None
    use_liger_kernel: bool
    liger_kernel_config: dict[str, bool] | None
    use_cache: bool
    neftune_noise_alpha: float | None
    torch_empty_cache_steps: int | None
    auto_find_batch_size: bool
    logging_strategy: str
    logging_steps: float
    logging_first_step: bool
    log_on_each_node: bool
    logging_nan_inf_filter: bool
    include_num_input_tokens_seen: str | bool
    log_level: str
    log_level_replica: str
    disable_tqdm: bool | None
    trackio_space_id: str | None
    trackio_bucket_id: str | None
    trackio_static_space_id: str | Literal[False] | None
    eval_strategy: str
    eval_delay: float
    per_device_eval_batch_size: int
    prediction_loss_only: bool
    eval_on_start: bool
    eval_do_concat_batches: bool
    eval_use_gather_object: bool
    eval_accumulation_steps: int | None
    include_for_metrics: list[str]
    batch_eval_metrics: bool
    save_only_model: bool
    save_strategy: str
    save_on_each_node: bool
    save_total_limit: int | None
    enable_jit_checkpoint: bool
    hub_token: str | None
    hub_strategy: str
    hub_always_push: bool
    hub_revision: str | None
    metric_for_best_model: str | None
    greater_is_better: bool | None
    ignore_data_skip: bool
    restore_callback_states_from_checkpoint: bool
    full_determinism: bool
    data_seed: int | None
    use_cpu: bool
    accelerator_config: dict | str | None
    parallelism_config: object
    dataloader_drop_last: bool
    dataloader_num_workers: int
    dataloader_pin_memory: bool
    dataloader_persistent_workers: bool
    dataloader_prefetch_factor: int | None
    dataloader_multiprocessing_context: str | None
    dataloader_in_order: bool
    remove_unused_columns: bool | None
    label_names: list[str] | None
    train_sampling_strategy: str
    length_column_name: str
    ddp_find_unused_parameters: bool | None
    ddp_bucket_cap_mb: int | None
    ddp_broadcast_buffers: bool | None
    ddp_static_graph: bool | None
    ddp_backend: str | None
    ddp_timeout: float
    fsdp: str | None
    fsdp_config: dict | str | None
    deepspeed: dict | str | None
    debug: str | list[str]
    skip_memory_metrics: bool
    do_train: bool
    do_eval: bool
    do_predict: bool
    resume_from_checkpoint: str | None
    local_rank: int
    model_init_kwargs: dict[str, Any] | str | None
    trust_remote_code: bool
    router_aux_loss_coef: float | None
    disable_dropout: bool
    cast_lm_head_to_fp32: bool
    num_generations_eval: int | None
    ds3_gather_for_generation: bool
    shuffle_dataset: bool | None
    pad_to_multiple_of: int | str | None
    generation_batch_size: int | None
    steps_per_generation: int | None
    cache_implementation: str | None
    use_vllm: bool
    vllm_mode: str
    vllm_model_impl: str
    vllm_enable_sleep_mode: bool | None
    vllm_structured_outputs_regex: str | None
    vllm_server_base_url: str | None
    vllm_server_host: str
    vllm_server_port: int
    vllm_server_timeout: float
    vllm_group_port: int
    vllm_gpu_memory_utilization: float | None
    vllm_max_model_length: int | None
    vllm_tensor_parallel_size: int
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    reward_weights: list[float] | None
    sync_ref_model: bool
    ref_model_mixup_alpha: float
    ref_model_sync_steps: int
    use_adaptive_entropy: bool
    entropy_coef_min: float
    entropy_coef_max: float
    entropy_coef_delta: float
    entropy_target: float
    vllm_importance_sampling_correction: bool
    vllm_importance_sampling_mode: Literal[
        "none",
        "token_truncate",
        "token_mask",
        "icepop",
        "sequence_truncate",
        "sequence_mask",
    ]
    vllm_importance_sampling_clip_max: float | None
    vllm_importance_sampling_clip_min: float | None
    log_completions: bool
    log_multimodal: bool
    log_unique_prompts: bool
    log_completions_hub_repo: str | None
    use_transformers_continuous_batching: bool
    transformers_continuous_batching_config: dict | str | None
    use_transformers_paged: bool
    vllm_importance_sampling_cap: float | None
    dataset_name: str | list[str] | None
    dataset_config: str | None
    dataset_train_split: str
    dataset_test_split: str
    model_name_or_path: str
    model_revision: str | None
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: str | list[str]
    embedding_lr: float | None
    loraplus_lr_ratio: float
    logging_dir: str | None
    overwrite_output_dir: bool
    save_safetensors: bool
    group_by_length: bool
    use_liger_loss: bool
    wandb_log_unique_prompts: bool
    vllm_device: str
    vllm_dtype: str
    vllm_enable_prefix_caching: bool
    evaluation_strategy: str
    no_cuda: bool
    vllm_max_model_len: int | None
    vllm_guided_decoding_regex: str | None
