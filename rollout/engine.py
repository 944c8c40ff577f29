"""vLLM in this process: it samples groups of completions with the adapter that is being trained.

    settings = EngineSettings(model="path/to/model", rollout=config.rollout, target_modules=("q_proj", "v_proj"), max_rank=64)
    engine = RolloutEngine(settings)
    engine.publish(policy.write_slots)  # from now on the engine samples with the policy's adapter
    for group in engine.rollout(prompts, config.rollout, seeds=seeds):  # yields a group when its last completion ends
        print(group.completions[0].text)
    engine.close()

`engine.slots` are views of vLLM's LoRA buffers (`slots.py`). The trainer multiplies with the same tensors.
"""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base_weights import find_base_weights, loading
from .config import RolloutConfig, SamplingConfig
from .dense_lora import wrapper_name
from .engine_errors import in_our_names
from .limits import check_engine_limits
from .model_limits import check_cache_on_cpu
from .sampling_params import check_sampling_params, sampling_params, text_of
from .slots import EMBEDDING, HEAD, AdapterSlot, find_slots
from .texts import Texts
from .types import Completion, PromptGroup
from .vllm_compat import (
    collections_skipped,
    cpu_norms,
    existing_objects_frozen,
    import_vllm,
    lora_wrapper_replaced,
    replace_cpu_layers,
    replace_cpu_sampler,
    require,
)
from .vllm_requests import VllmRequests, VllmTurns

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

ADAPTER_ID = 1
CPU_BLOCK = 32  # tokens of a block of the KV cache on CPU
USUAL_GPU_SHARE = 0.45  # of the device's memory, for an engine that no run has planned
CPU_BATCHED_TOKENS = 4096  # tokens of one engine step on CPU, where prompts are not split
# vLLM packs these projections into one layer, whose name has to be the LoRA target. Without names vLLM would wrap
# every layer; wrapped embeddings and LM heads took half of a decoding step on CPU.
PACKED_NAMES = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


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

    def differences(self, needed: EngineSettings) -> list[str]:
        """Settings that keep this engine from serving a run with other ones, each as "NAME VALUE instead of NEEDED VALUE".

        The seed may differ because every request has one. So may the sampling options, which are arguments of `rollout()`, and
        the share of the GPU's memory unless the run asks for one.
        """
        of_engine = [f.name for f in fields(self) if f.name not in ("rollout", "seed")]
        values = {name: (getattr(self, name), getattr(needed, name)) for name in of_engine}
        of_rollout = ("max_model_length", "gpu_memory_utilization", "kv_cache_gib", "enforce_eager", "lora_path")
        values |= {name: (getattr(self.rollout, name), getattr(needed.rollout, name)) for name in of_rollout}
        if needed.rollout.gpu_memory_utilization is None:
            del values["gpu_memory_utilization"]
        return [f"{name} {_short(a)} instead of {_short(b)}" for name, (a, b) in values.items() if a != b]


def _short(value: object) -> str:
    return str(value) if len(str(value)) < 80 else f"{str(value)[:80]} ..."


def request_seed(run_seed: int, step: int, prompt_index: int) -> int:
    """The seed of one request. It is determined by its arguments; seeds of different arguments are unrelated."""
    text = f"{run_seed}/{step}/{prompt_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


class RolloutEngine:
    """One vLLM engine with one adapter, in this process.

    Attributes:
        slots: vLLM's LoRA buffers by PEFT module name.
        device: `cpu` or `cuda`.
        policy_version: number of publishes; 0 is the base model (all slots zero).

    Raises:
        ValueError: the installed vLLM lacks something that rankup needs, cannot adapt some of `target_modules`, cannot sample
            as `settings.rollout` says, or has too little memory for it.
    """

    slots: dict[str, AdapterSlot]
    policy_version: int

    def __init__(self, settings: EngineSettings) -> None:
        import_vllm()
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        self.settings = settings
        on_cpu = current_platform.device_type == "cpu"
        lora_path = settings.rollout.lora_path
        dense = lora_path == "dense" or (lora_path == "auto" and on_cpu)
        check_engine_limits(settings.rollout, "vllm")
        if on_cpu:
            check_cache_on_cpu(settings.rollout, settings.model, dtype=settings.dtype, block=CPU_BLOCK)
        args = engine_args(settings, on_cpu=on_cpu)
        wrapper = wrapper_name(current_platform.device_type, dense=dense, head=HEAD in settings.target_modules)
        with in_our_names(settings.rollout, on_cpu=on_cpu), existing_objects_frozen(), lora_wrapper_replaced(wrapper):
            check_sampling_params(args, settings.rollout)
            self._engine: Any = LLMEngine.from_engine_args(args)
        if on_cpu:
            replace_cpu_sampler(self._engine)
            if dense:
                self._apply_model(replace_cpu_layers)
        self._tokenizer = self._engine.get_tokenizer()
        self.slots = self._apply_model(find_slots)
        self._check_targets()
        self.device: str = current_platform.device_type
        self.policy_version = 0
        self._write_slots: Callable[[], None] | None = None
        with tempfile.TemporaryDirectory(prefix="rankup-adapter-") as folder:
            _write_empty_adapter(Path(folder), self.slots, settings)
            self._lora_request = LoRARequest("policy", ADAPTER_ID, folder)
            self._engine.add_lora(self._lora_request)
            self._engine.pin_lora(ADAPTER_ID)

    # ------------------------------------------------------------------------------------------------ policy

    def publish(self, write_slots: Callable[[], None]) -> int:
        """Sample from now on with the adapter that `write_slots` writes into the slots; returns the new policy version.

        Resets the prefix cache, which holds keys and values of the previous policy. Nothing is read from or written to disk.
        """
        assert not self._engine.has_unfinished_requests(), "publish between rollouts, not during one"
        self._write_slots = write_slots
        self._ensure_active()
        write_slots()
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache, which holds keys and values of the previous policy")
        self.policy_version += 1
        return self.policy_version

    def _ensure_active(self) -> None:
        """Activate and rewrite the adapter if it was evicted. vLLM itself would reload the zero adapter of the request."""

        def activate(model: nn.Module) -> bool:
            manager = require(model, "lora_manager", purpose="check whether the adapter is active")
            if ADAPTER_ID not in manager.list_adapters():
                raise RuntimeError("the adapter was removed from vLLM: only rankup may add or remove adapters")
            return manager.activate_adapter(ADAPTER_ID)

        if self._apply_model(activate) and self._write_slots is not None:
            self._write_slots()
            self._engine.reset_prefix_cache()

    def base_weights(self) -> dict[str, torch.Tensor]:
        """Views of the base weights that vLLM holds in their original layout, by their names in transformers."""
        return self._apply_model(find_base_weights)

    # ---------------------------------------------------------------------------------------------- sampling

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int] | None = None,
        use_adapter: bool = True,
    ) -> Iterator[PromptGroup]:
        """Sample `sampling.num_generations` completions of each prompt (token ids); yield each group when it is finished.

        Closing the iterator aborts the remaining requests.

        Args:
            seeds: one for each prompt; with them sampling is reproducible.
            use_adapter: False samples from the base model.

        Raises:
            EngineError: vLLM failed.
            ValueError: vLLM cannot sample like this.
        """
        check_engine_limits(sampling, "vllm")
        assert seeds is None or len(seeds) == len(prompts)
        texts = Texts(self._tokenizer, sampling)
        ends, no_seeds = texts.stop_token_ids, [None] * len(prompts)
        all_params = [sampling_params(sampling, seed, stop_token_ids=ends) for seed in seeds or no_seeds]
        requests = zip(prompts, all_params, strict=True)
        with closing(self._run(requests, use_adapter=use_adapter)) as outputs:
            for index, output in outputs:
                yield self._group(output, texts, index=index)

    def requests(
        self, sampling: SamplingConfig, *, use_adapter: bool = True, stop_token_ids: Collection[int] = ()
    ) -> VllmTurns:
        """Requests of episodes. Keys and values of what an episode holds stay in the prefix cache, in full blocks.

        Raises:
            ValueError: vLLM cannot sample like this.
        """
        check_engine_limits(sampling, "vllm")
        self._ensure_active()
        texts, lora_request = Texts(self._tokenizer, sampling), self._lora_request if use_adapter else None
        return VllmTurns(
            self._engine,
            lora_request,
            sampling,
            texts,
            stop_token_ids=[*{*texts.stop_token_ids, *stop_token_ids}],
            policy_version=self.policy_version,
        )

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]], *, use_adapter: bool = True) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, under the engine's policy at temperature 1."""
        from vllm import SamplingParams

        # With `prompt_logprobs` vLLM computes the complete prompt, even if a prefix is cached.
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        results: list[list[float]] = [[] for _ in sequences]
        for index, output in self._run(((ids, params) for ids in sequences), use_adapter=use_adapter):
            assert output.prompt_logprobs is not None
            candidates = [of_token for of_token in output.prompt_logprobs if of_token is not None]  # None for the first token
            pairs = zip(candidates, sequences[index][1:], strict=True)
            results[index] = [of_token[token].logprob for of_token, token in pairs]
        return results

    def close(self) -> None:
        """Shut vLLM down and free its memory, except for base weights that the trainer shares. Slots become invalid."""
        from vllm.distributed import cleanup_dist_env_and_memory

        with collections_skipped() if self.device == "cpu" else nullcontext():
            self._engine.engine_core.shutdown()
        self.slots = {}
        self._write_slots = None  # the policy's
        del self._engine
        cleanup_dist_env_and_memory()  # collects garbage; what this revives (the embedding) is collected now
        gc.collect()

    # ---------------------------------------------------------------------------------------------- internals

    def _apply_model(self, function: Callable[[nn.Module], Any]) -> Any:
        (result,) = require(self._engine, "apply_model", purpose="reach the model in this process")(function)  # one worker
        return result

    def _run(
        self, requests: Iterable[tuple[Sequence[int], SamplingParams]], *, use_adapter: bool
    ) -> Generator[tuple[int, RequestOutput]]:
        """Submit all requests and yield each one's index and output when it is finished. Aborts the others if closed early."""
        self._ensure_active()
        with VllmRequests(self._engine, self._lora_request if use_adapter else None) as running:
            for index, (prompt, params) in enumerate(requests):
                running.add(index, prompt, params)
            while running.has_unfinished:
                yield from running.step()

    def _group(self, output: Any, texts: Texts, *, index: int) -> PromptGroup:
        completions = tuple(self._completion(c, texts) for c in sorted(output.outputs, key=lambda c: c.index))
        return PromptGroup(index=index, prompt_token_ids=tuple(output.prompt_token_ids), completions=completions)

    def _completion(self, output: Any, texts: Texts) -> Completion:
        flat = output.logprobs
        assert tuple(flat.token_ids) == tuple(output.token_ids), "one log-probability for each sampled token"
        return Completion(
            token_ids=tuple(output.token_ids),
            logprobs=tuple(flat.logprobs),
            text=text_of(output, texts),
            finish_reason=output.finish_reason,
            policy_version=self.policy_version,
        )

    def _check_targets(self) -> None:
        found = {name.rpartition(".")[2] for name in self.slots}
        missing = [name for name in self.settings.target_modules if name not in found]
        if missing:
            raise ValueError(
                f"vLLM has no LoRA layer for {missing} in this model (it has {sorted(found)}): change lora.targets"
            )
        manager = self._apply_model(lambda model: require(model, "lora_manager", purpose="check which layers it can adapt"))
        loadable = require(manager, "supported_lora_modules", purpose="check which adapters it can load")
        if found == {HEAD} and HEAD not in loadable:  # Qwen2: vLLM has a LoRA layer for the head but rejects files that name it
            raise ValueError(f"vLLM cannot load an adapter on {HEAD} alone for this model: add another layer to lora.targets")
        if EMBEDDING in found and EMBEDDING not in loadable:  # Qwen2, Mistral: stock vLLM could not serve the trained adapter
            raise ValueError(f"vLLM cannot load an adapter on {EMBEDDING} for this model: remove it from lora.targets")


def engine_args(settings: EngineSettings, *, on_cpu: bool) -> EngineArgs:
    """vLLM's arguments for an engine with these settings. Starts nothing.

    Raises:
        ValueError: the installed vLLM lacks something that rankup needs.
    """
    import_vllm()
    from vllm.engine.arg_utils import EngineArgs

    rollout = settings.rollout
    return EngineArgs(
        model=settings.model,
        tokenizer=settings.tokenizer,
        dtype=settings.dtype,  # type: ignore[arg-type]
        seed=settings.seed,
        max_model_len=rollout.max_model_length,
        max_num_seqs=settings.max_num_seqs,
        # Only full blocks of a prompt's keys are shared by its completions: smaller blocks share more.
        block_size=CPU_BLOCK if on_cpu else None,
        enable_prefix_caching=True,
        # After a chunk of a prompt, vLLM 0.32 rewinds the request's random generator, which CPU generators do not support.
        enable_chunked_prefill=False if on_cpu else None,
        max_num_batched_tokens=max(CPU_BATCHED_TOKENS, rollout.max_model_length, settings.max_num_seqs) if on_cpu else None,
        kv_cache_memory_bytes=int(rollout.kv_cache_gib * 2**30) if on_cpu else None,
        gpu_memory_utilization=rollout.gpu_memory_utilization or USUAL_GPU_SHARE,
        enforce_eager=on_cpu if rollout.enforce_eager is None else rollout.enforce_eager,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=settings.max_rank,  # type: ignore[arg-type]
        lora_target_modules=_lora_target_modules(settings.target_modules),
        logprobs_mode="processed_logprobs",
        ir_op_priority=cpu_norms() if on_cpu else {},  # type: ignore[arg-type]
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **loading(settings.nf4_weights, settings.weight_files, keep_linear_weights=settings.keep_base_weights),
    )


def _lora_target_modules(target_modules: Sequence[str]) -> list[str]:
    packed = [PACKED_NAMES[name] for name in target_modules if name in PACKED_NAMES]
    return sorted({*target_modules, *packed})


def _write_empty_adapter(folder: Path, slots: dict[str, AdapterSlot], settings: EngineSettings) -> None:
    """Write the adapter that is registered with vLLM: zeros for one layer. The policy then writes to its buffers directly."""
    import torch
    from safetensors.torch import save_file

    kinds = {name: name.rpartition(".")[2] for name in slots if name.rpartition(".")[2] in settings.target_modules}
    # Prefer a small layer. The head comes last because vLLM rejects files that name it for some models.
    name = min(kinds, key=lambda name: (kinds[name] == HEAD, kinds[name] == EMBEDDING))
    key = "lora_embedding_{}" if kinds[name] == EMBEDDING else "lora_{}.weight"
    tensors = {
        f"base_model.model.{name}.{key.format('A')}": torch.zeros(settings.max_rank, slots[name].a.shape[1]),
        f"base_model.model.{name}.{key.format('B')}": torch.zeros(slots[name].b.shape[0], settings.max_rank),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": settings.max_rank,
        "lora_alpha": settings.max_rank,
        "target_modules": list(settings.target_modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
