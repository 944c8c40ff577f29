"""How a vLLM engine is built: its settings, and vLLM's arguments from them. Starts nothing.

    settings = EngineSettings(model="path/to/model", rollout=config.rollout, target_modules=("q_proj", "v_proj"), max_rank=64)
    args = engine_args(settings, on_cpu=True)
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from transformers import AutoConfig

from .base_weights import loading
from .config import RolloutConfig
from .kv_cache import uses_pool
from .model_classes import has_tower
from .model_limits import check_cache_on_cpu, has_recurrent_layers
from .vllm_compat import cpu_norms, import_vllm

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

CPU_BLOCK = 32  # tokens of a block of the KV cache on CPU
USUAL_GPU_SHARE = 0.45  # of the device's memory, for an engine that no run has planned
CPU_BATCHED_TOKENS = 4096  # tokens of one engine step on CPU, where prompts are not split
CUDA_BATCHED_TOKENS = 8192  # on CUDA, where they are
MAX_CAPTURED = 512  # sequences of the largest captured graph


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine is built: the section `rollout` of a configuration, and what other sections determine.

    Attributes:
        model: path of the model.
        tokenizer: path or Hub id of the tokenizer; None: the model's own.
        max_rank: largest LoRA rank that the slots can hold.
        max_num_seqs: sequences that are sampled concurrently; used instead of `rollout.max_num_seqs`, which may be None.
        keep_base_weights: keep linear weights in their original layout so that the trainer can read them. Slower on CPU.
        nf4_weights: names of the weights to round to NF4 while loading.
        weight_files: names of the files that hold the weights, if the model's folder has others that vLLM might read.
        returns_experts: completions say which experts were chosen for each token; see `routed_experts.py`.
    """

    model: str
    rollout: RolloutConfig
    target_modules: tuple[str, ...]
    max_rank: int = 64
    dtype: str = "bfloat16"
    seed: int = 0
    max_num_seqs: int = 128
    keep_base_weights: bool = False
    nf4_weights: tuple[str, ...] = field(default=(), repr=False)
    weight_files: tuple[str, ...] = ()
    tokenizer: str | None = None
    returns_experts: bool = False

    def differences(self, needed: EngineSettings) -> list[str]:
        """Settings that keep this engine from serving a run with other ones, each as "NAME VALUE instead of NEEDED VALUE".

        The seed may differ because every request has one. So may the sampling options, which are arguments of `rollout()`, and
        the share of the GPU's memory unless the run asks for one.
        """
        of_engine = [f.name for f in fields(self) if f.name not in ("rollout", "seed")]
        values = {name: (getattr(self, name), getattr(needed, name)) for name in of_engine}
        of_rollout = (
            *("max_model_length", "gpu_memory_utilization", "kv_cache_gib", "enforce_eager", "lora_path", "release_kv_cache"),
            "model_runner",
        )
        values |= {name: (getattr(self.rollout, name), getattr(needed.rollout, name)) for name in of_rollout}
        if needed.rollout.gpu_memory_utilization is None:
            del values["gpu_memory_utilization"]
        if not needed.returns_experts:  # the run drops them
            del values["returns_experts"]
        return [f"{name} {_short(a)} instead of {_short(b)}" for name, (a, b) in values.items() if a != b]


def _short(value: object) -> str:
    return str(value) if len(str(value)) < 80 else f"{str(value)[:80]} ..."


def check_cache(settings: EngineSettings) -> None:
    """Whether the KV cache on CPU has room for one sequence: `check_cache_on_cpu`."""
    check_cache_on_cpu(settings.rollout, settings.model, dtype=settings.dtype, block=CPU_BLOCK)


def caches_prefixes(settings: EngineSettings, *, on_cpu: bool) -> bool:
    """Whether the completions of a prompt share its keys and values.

    Not on CPU if the model has recurrent layers: vLLM 0.32 shares their states at the ends of chunks only, and prompts are not
    split into chunks there (see `engine_args`).
    """
    return not (on_cpu and has_recurrent_layers(settings.model))


def needs_no_towers(settings: EngineSettings) -> bool:
    """Whether the checkpoint has towers, which vLLM is to leave out."""
    return has_tower(AutoConfig.from_pretrained(settings.model))


def engine_args(
    settings: EngineSettings, *, on_cpu: bool, prefix_caching: bool = True, without_towers: bool = False
) -> EngineArgs:
    """vLLM's arguments for an engine with these settings. Starts nothing.

    Raises:
        ValueError: the installed vLLM lacks something that rankup needs.
    """
    import_vllm()
    from vllm.engine.arg_utils import EngineArgs

    rollout = settings.rollout
    eager = on_cpu if rollout.enforce_eager is None else rollout.enforce_eager
    batched = max(CPU_BATCHED_TOKENS, rollout.max_model_length) if on_cpu else CUDA_BATCHED_TOKENS
    return EngineArgs(
        model=settings.model,
        tokenizer=settings.tokenizer,
        dtype=settings.dtype,  # type: ignore[arg-type]
        seed=settings.seed,
        max_model_len=rollout.max_model_length,
        max_num_seqs=settings.max_num_seqs,
        # Only full blocks of a prompt's keys are shared by its completions: smaller blocks share more.
        block_size=CPU_BLOCK if on_cpu else None,
        enable_prefix_caching=prefix_caching,
        # After a chunk of a prompt, vLLM 0.32 rewinds the request's random generator, which CPU generators do not support.
        enable_chunked_prefill=False if on_cpu else None,
        max_num_batched_tokens=max(batched, settings.max_num_seqs),
        kv_cache_memory_bytes=int(rollout.kv_cache_gib * 2**30) if on_cpu else None,
        gpu_memory_utilization=rollout.gpu_memory_utilization or USUAL_GPU_SHARE,
        enforce_eager=eager,
        compilation_config={} if eager else _captures(settings.max_num_seqs),  # type: ignore[arg-type]
        language_model_only=without_towers,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=settings.max_rank,  # type: ignore[arg-type]
        # Without names vLLM would wrap every layer; wrapped embeddings and LM heads took half of a decoding step on CPU.
        lora_target_modules=sorted(settings.target_modules),
        logprobs_mode="processed_logprobs",
        ir_op_priority=cpu_norms() if on_cpu else {},  # type: ignore[arg-type]
        enable_cumem_allocator=uses_pool(rollout, "cpu" if on_cpu else "cuda"),
        enable_return_routed_experts=settings.returns_experts,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **loading(settings.nf4_weights, settings.weight_files, keep_linear_weights=settings.keep_base_weights),
    )


def _captures(max_num_seqs: int) -> dict[str, object]:
    """Which CUDA graphs vLLM captures: about 20 instead of 100, each of which takes time at the start, and memory.

    Graphs are for steps in which every sequence gets one token. Steps with prompts have thousands of tokens, more than vLLM has
    graphs for. Every rollout has the adapter, so there are no graphs without it.
    """
    return {
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": capture_sizes(min(max_num_seqs, MAX_CAPTURED)),
        "cudagraph_specialize_lora": False,
    }


def capture_sizes(largest: int) -> list[int]:
    """Numbers of sequences with a graph. A step takes the next larger one: at most 7 more sequences, or a fourth more."""
    sizes = {1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, largest + 1, 32)}
    return [*sorted(size for size in sizes if size < largest), largest]
