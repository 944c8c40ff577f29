"""What a model and its tokenizer cannot sample, said before an engine is started.

    check_model_limits(config.rollout, "path/to/model", tokenizer)
    check_model_dtype("path/to/model", "float16")

An engine would say it in the names of its own arguments, minutes later, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from .config import RolloutConfig
from .engine_errors import LENGTHS, cache_too_small
from .generation_kwargs import GenerationKwargs
from .model_classes import check_class
from .texts import check_stop_strings

LENGTH_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
)
"""Names under which configurations have the longest sequence, as vLLM reads them."""

SCALED_ALREADY = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})
"""Kinds of RoPE scaling with which `max_position_embeddings` is the length after scaling."""


KEEPS_ALL_KEYS = frozenset({"llama", "qwen2", "qwen3", "mistral", "granite", "cohere"})
"""Kinds of models whose layers keep the keys and values of all tokens, if they have no window."""

UNSTABLE_IN_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
"""Kinds of models whose activations leave float16's range, as vLLM lists them."""


DELTA_NETS = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Kinds of models with gated delta nets, which vLLM's kernels on CPU compute in bfloat16 only."""

WIDER_WINDOWS = frozenset({"cohere2"})
"""Kinds of models whose windows vLLM 0.32 takes to be one token wider than transformers does."""

RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "mamba", "recurrent", "hybrid"})
"""Kinds of layers (`layer_types`) that hand a state from token to token."""

RECURRENT_MODELS = frozenset({"falcon_h1", "jamba", "bamba", "zamba2", "mamba", "mamba2", "falcon_mamba", "plamo2"})
"""Kinds of models with such layers whose configurations do not say it by `layer_types`."""


def has_recurrent_layers(model_path: str) -> bool:
    """Whether some layers of the model keep a state instead of the keys and values of all tokens."""
    config = AutoConfig.from_pretrained(model_path).get_text_config()
    types: list[str] = getattr(config, "layer_types", None) or []
    return config.model_type in RECURRENT_MODELS or not RECURRENT_LAYERS.isdisjoint(types)


def wider_windows(model_path: str, rollout: RolloutConfig) -> Iterator[str]:
    """A note if vLLM's layers see other tokens than transformers' in sequences as long as these may be."""
    config = AutoConfig.from_pretrained(model_path).get_text_config()
    if config.model_type not in WIDER_WINDOWS or rollout.engine != "vllm":
        return
    window: int | None = config.sliding_window
    if window is not None and rollout.max_model_length > window:
        yield (
            f"vLLM's sliding windows of {config.model_type} have one token more than transformers' {window}: in "
            "longer sequences log-probabilities of sampler and trainer differ; rollout.engine=torch, or shorter ones, avoid it"
        )


def check_model_dtype(model_path: str, dtype: str, *, vllm_on_cpu: bool = False) -> None:
    """Whether models of this kind work in `model.dtype`. `vllm_on_cpu`: and are sampled with vLLM on CPU.

    Raises:
        ValueError: they do not.
    """
    config = AutoConfig.from_pretrained(model_path)
    kind = config.model_type
    if vllm_on_cpu and dtype != "bfloat16" and config.get_text_config().model_type in DELTA_NETS:
        raise ValueError(
            f"model.dtype={dtype}: on CPU vLLM computes the gated delta nets of {kind} models in bfloat16 only: set it, or "
            "rollout.engine=torch"
        )
    if dtype == "float16" and kind in UNSTABLE_IN_FLOAT16:
        raise ValueError(
            f"model.dtype=float16: {kind} models are numerically unstable in it, and vLLM refuses them: set bfloat16 or float32"
        )


def check_model_limits(rollout: RolloutConfig, model_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether the model has room for the longest sequence, and tokenizer and vocabulary have what the options name.

    Raises:
        ValueError: they do not, with the options; or the model is none that can be trained.
    """
    config = AutoConfig.from_pretrained(model_path)
    check_class(config)
    longest = context_length(config)
    if longest is not None and rollout.max_model_length > longest:
        raise ValueError(
            f"{LENGTHS}: must be at most {longest}, the context of the model (got {rollout.max_prompt_length} + "
            f"{rollout.max_completion_length} = {rollout.max_model_length}): lower one of them"
        )
    check_stop_strings(rollout, tokenizer)
    vocabulary = config.get_text_config().vocab_size
    for name, ids in _token_ids(rollout.generation_kwargs):
        outside = [id for id in ids if id >= vocabulary]
        if outside:
            raise ValueError(
                f"rollout.generation_kwargs.{name}: must be token ids below {vocabulary}, the size of the vocabulary "
                f"(got {outside[0]})"
            )


def prompt_length(rollout: RolloutConfig, model_path: str) -> int:
    """`rollout.max_prompt_length`; unless it was set, at most what the longest completion leaves of the model's context."""
    longest = context_length(AutoConfig.from_pretrained(model_path))
    left = None if longest is None else longest - rollout.max_completion_length
    if left is None or left < 1 or "max_prompt_length" in rollout.model_fields_set:
        return rollout.max_prompt_length
    return min(rollout.max_prompt_length, left)


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model is made for, in tokens, as vLLM determines it. None: the configuration says nothing.

    A `model_max_length` in the configuration counts instead of its other lengths.
    """
    config = config.get_text_config()
    lengths = [length for key in LENGTH_KEYS if (length := getattr(config, key, None)) is not None]
    longest = getattr(config, "model_max_length", None) or min(lengths, default=None)
    if longest is None:
        return None
    if "gemma3" in config.model_type:  # its length is that after scaling too
        return int(longest)
    factor = 1.0
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type", "default") not in SCALED_ALREADY:
            factor = parameters.get("factor") or factor
    return int(longest * factor)


def check_cache_on_cpu(rollout: RolloutConfig, model_path: str, *, dtype: str, block: int) -> None:
    """Whether vLLM's KV cache on CPU has room for one sequence, for models of which that can be told without building them.

    Args:
        block: tokens of a block of the cache.

    Raises:
        ValueError: it has not. vLLM would say so after it has loaded the weights.
    """
    config = AutoConfig.from_pretrained(model_path)
    bytes_of_a_block = _cache_bytes_per_token(config, dtype) * block
    available = int(rollout.kv_cache_gib * 2**30)
    needed = -(-rollout.max_model_length // block) * bytes_of_a_block
    if needed > available:
        longest = available // bytes_of_a_block * block
        raise ValueError(
            cache_too_small(
                rollout.max_model_length,
                needed=needed,
                available=available,
                memory="rollout.kv_cache_gib",
                longest=longest,
            )
        )


def _cache_bytes_per_token(config: PretrainedConfig, dtype: str) -> int:
    """Keys and values of all layers; 0 for models whose layers may keep less than that."""
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if config.model_type not in KEEPS_ALL_KEYS or has_window:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * (4 if dtype == "float32" else 2)


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, float | str]]:
    """The settings of rotary embeddings; several if kinds of layers have their own."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return []
    nested = [each for each in found.values() if isinstance(each, dict)]
    return nested or [found]


def _token_ids(kwargs: GenerationKwargs) -> Iterator[tuple[str, list[int]]]:
    """The arguments that have token ids."""
    yield "stop_token_ids", kwargs.stop_token_ids
    yield "allowed_token_ids", kwargs.allowed_token_ids or []
    yield "logit_bias", [*kwargs.logit_bias]
