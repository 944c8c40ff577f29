"""vLLM in this process: sampling groups of completions with the one adapter that is being trained.

    settings = EngineSettings(model="path/to/model", rollout=config.rollout, target_modules=("q_proj", "v_proj"), max_rank=64)
    engine = RolloutEngine(settings)
    engine.publish(policy.write_slots)  # from now on the engine samples with the policy's adapter
    for group in engine.rollout(prompts, config.rollout, seeds=seeds):  # yields a group when its last completion ends
        print(group.completions[0].text)
    engine.close()

`engine.slots` are views of vLLM's own LoRA buffers (see `slots.py`): whoever trains multiplies with the same tensors.
"""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base_weights import find_base_weights, loading
from .config import RolloutConfig, SamplingConfig
from .dense_lora import wrapper_name
from .slots import EMBEDDING, HEAD, AdapterSlot, find_slots
from .types import Completion, EngineError, PromptGroup
from .vllm_compat import (
    cpu_norms,
    import_vllm,
    lora_wrapper_replaced,
    replace_cpu_layers,
    replace_cpu_sampler,
    require,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

ADAPTER_ID = 1
CPU_BATCHED_TOKENS = 4096  # tokens of one engine step on CPU, prompts whole
# vLLM wraps the packed layers. Naming targets keeps LoRA off what has none: embeddings and LM head took half of a step on CPU.
PACKED_NAMES = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is built with: the options of `rollout`, and what a run derives from its other options.

    `max_num_seqs`: sequences that are sampled at once (it may be None in `rollout`). `keep_base_weights`: linear layers keep
    their weights as they are loaded, for others to read; on CPU this costs speed. `nf4_weights`: names of weights that are
    rounded to NF4 as they are loaded.
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

    def differences(self, needed: EngineSettings) -> list[str]:
        """Why an engine with these settings cannot serve a run that needs others: `name value instead of needed value` each.

        The seed may differ, since every request has its own, and so may everything that is chosen for each rollout.
        """
        of_engine = [f.name for f in fields(self) if f.name not in ("rollout", "seed")]
        values = {name: (getattr(self, name), getattr(needed, name)) for name in of_engine}
        of_rollout = ("max_model_length", "gpu_memory_utilization", "kv_cache_gib", "enforce_eager", "lora_path")
        values |= {name: (getattr(self.rollout, name), getattr(needed.rollout, name)) for name in of_rollout}
        return [f"{name} {_short(a)} instead of {_short(b)}" for name, (a, b) in values.items() if a != b]


def _short(value: object) -> str:
    return str(value) if len(str(value)) < 80 else f"{str(value)[:80]} ..."


def request_seed(run_seed: int, step: int, prompt_index: int) -> int:
    """The seed of one request: the same for the same (run seed, step, place in the batch), unrelated for any other."""
    text = f"{run_seed}/{step}/{prompt_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


class RolloutEngine:
    """One vLLM engine with one adapter, in this process.

    Attributes:
        slots: vLLM's LoRA buffers by PEFT module name.
        device: `cpu` or `cuda`.
        policy_version: how often a policy was published; 0 is the base model (all slots zero).

    Raises:
        ValueError: this vLLM lacks a piece that is relied on, or cannot adapt what `target_modules` names.
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
        args = engine_args(settings, on_cpu=on_cpu)
        wrapper = wrapper_name(current_platform.device_type, dense=dense, head=HEAD in settings.target_modules)
        with lora_wrapper_replaced(wrapper):
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
        self._requests = 0
        with tempfile.TemporaryDirectory(prefix="rankup-adapter-") as folder:
            _write_empty_adapter(Path(folder), self.slots, settings)
            self._lora_request = LoRARequest("policy", ADAPTER_ID, folder)
            self._engine.add_lora(self._lora_request)
            self._engine.pin_lora(ADAPTER_ID)

    # ------------------------------------------------------------------------------------------------ policy

    def publish(self, write_slots: Callable[[], None]) -> int:
        """Make the policy that `write_slots` writes into the slots the one to sample with; returns its version.

        Keys and values of the older policy are dropped with the prefix cache. Nothing is read from or written to disk.
        """
        assert not self._engine.has_unfinished_requests(), "publish between rollouts, not within one"
        self._write_slots = write_slots
        self._ensure_active()
        write_slots()
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM could not drop its prefix cache: it would answer with keys of the old policy")
        self.policy_version += 1
        return self.policy_version

    def _ensure_active(self) -> None:
        """Take the buffers back if something evicted the adapter: vLLM would sample with the empty one it knows."""

        def activate(model: nn.Module) -> bool:
            manager = require(model, "lora_manager", purpose="see whether the adapter is active")
            if ADAPTER_ID not in manager.list_adapters():
                raise RuntimeError("the adapter was removed from vLLM: only rankup may add or remove adapters")
            return manager.activate_adapter(ADAPTER_ID)

        if self._apply_model(activate) and self._write_slots is not None:
            self._write_slots()
            self._engine.reset_prefix_cache()

    def base_weights(self) -> dict[str, torch.Tensor]:
        """Every base weight that vLLM keeps as it was loaded, by its name in transformers: views of vLLM's own memory."""
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
        """Sample `sampling.num_generations` completions of each prompt (token ids); yield groups as they finish.

        `seeds`, one a prompt, make sampling repeatable. `use_adapter=False` asks the base model. Closing the iterator
        early aborts what is still running.

        Raises:
            EngineError: vLLM failed.
        """
        assert seeds is None or len(seeds) == len(prompts)
        self._ensure_active()
        running: dict[str, int] = {}
        has_text = bool(sampling.stop)
        try:
            for index, prompt in enumerate(prompts):
                params = self._sampling_params(sampling, None if seeds is None else seeds[index])
                running[self._submit(prompt, params, use_adapter=use_adapter)] = index
            while running:
                for output in self._step():
                    if output.finished:
                        index = running.pop(output.request_id)
                        yield self._group(output, index=index, has_text=has_text)
        finally:
            if running:
                self._engine.abort_request(list(running))

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]], *, use_adapter: bool = True) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence under the engine's policy, at temperature 1."""
        from vllm import SamplingParams

        self._ensure_active()
        # The prompt's log-probabilities are asked for, so vLLM computes them afresh, prefix cache or not.
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        running = {self._submit(ids, params, use_adapter=use_adapter): i for i, ids in enumerate(sequences)}
        results: list[list[float]] = [[] for _ in sequences]
        while running:
            for output in self._step():
                if output.finished:
                    index = running.pop(output.request_id)
                    pairs = zip(output.prompt_logprobs[1:], sequences[index][1:], strict=True)
                    results[index] = [at_position[token].logprob for at_position, token in pairs]
        return results

    def close(self) -> None:
        """Give the engine's memory back, but for what others hold views of. The slots must not be used afterwards."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        self.slots = {}
        del self._engine
        cleanup_dist_env_and_memory()
        gc.collect()

    # ---------------------------------------------------------------------------------------------- internals

    def _apply_model(self, function: Callable[[nn.Module], Any]) -> Any:
        results = require(self._engine, "apply_model", purpose="reach the model in this process")(function)
        assert len(results) == 1, "one worker expected"
        return results[0]

    def _step(self) -> list[Any]:
        try:
            return self._engine.step()
        except Exception as error:  # vLLM may raise anything; it goes on as the cause
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(f"vLLM failed while sampling: {reason}") from error

    def _submit(self, prompt: Sequence[int], params: SamplingParams, *, use_adapter: bool) -> str:
        self._requests += 1
        name = str(self._requests)
        lora_request = self._lora_request if use_adapter else None
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params, lora_request=lora_request)
        return name

    @staticmethod
    def _sampling_params(sampling: SamplingConfig, seed: int | None) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.num_generations,
            max_tokens=sampling.max_completion_length,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            stop=sampling.stop or None,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # Only to look for stop strings: token by token it takes a twentieth of a rollout.
            detokenize=bool(sampling.stop),
        )

    def _group(self, output: Any, *, index: int, has_text: bool) -> PromptGroup:
        completions = tuple(self._completion(c, has_text=has_text) for c in sorted(output.outputs, key=lambda c: c.index))
        return PromptGroup(index=index, prompt_token_ids=tuple(output.prompt_token_ids), completions=completions)

    def _completion(self, output: Any, *, has_text: bool) -> Completion:
        flat = output.logprobs
        assert tuple(flat.token_ids) == tuple(output.token_ids), "one log-probability a sampled token"
        # The token that ended it is no part of the text, whether the tokenizer calls it special or not.
        of_text = output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
        return Completion(
            token_ids=tuple(output.token_ids),
            logprobs=tuple(flat.logprobs),
            text=output.text if has_text else self._tokenizer.decode(of_text, skip_special_tokens=True),
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
        manager = self._apply_model(lambda model: require(model, "lora_manager", purpose="see what it can adapt"))
        loadable = require(manager, "supported_lora_modules", purpose="see what adapters it can load")
        if found == {HEAD} and HEAD not in loadable:  # Qwen2: vLLM adapts the head, but refuses files that name it
            raise ValueError(f"vLLM loads no adapter on {HEAD} alone for this model: add another layer to lora.targets")
        if EMBEDDING in found and EMBEDDING not in loadable:  # Qwen2, Mistral: no stock vLLM could serve what is trained
            raise ValueError(f"vLLM loads no adapter on {EMBEDDING} for this model: take it out of lora.targets")


def engine_args(settings: EngineSettings, *, on_cpu: bool) -> EngineArgs:
    """What vLLM is asked for; nothing is started.

    Raises:
        ValueError: this vLLM lacks a piece that is relied on.
    """
    import_vllm()
    from vllm.engine.arg_utils import EngineArgs

    rollout = settings.rollout
    return EngineArgs(
        model=settings.model,
        dtype=settings.dtype,  # type: ignore[arg-type]
        seed=settings.seed,
        max_model_len=rollout.max_model_length,
        max_num_seqs=settings.max_num_seqs,
        # A prompt's last, partial block of keys is computed once per completion: small blocks share more of it.
        block_size=32 if on_cpu else None,
        enable_prefix_caching=True,
        # vLLM 0.32 rewinds a request's generator after a part of its prompt, which a CPU generator cannot: no parts.
        enable_chunked_prefill=False if on_cpu else None,
        max_num_batched_tokens=max(CPU_BATCHED_TOKENS, rollout.max_model_length) if on_cpu else None,
        kv_cache_memory_bytes=int(rollout.kv_cache_gib * 2**30) if on_cpu else None,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=on_cpu if rollout.enforce_eager is None else rollout.enforce_eager,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=settings.max_rank,  # type: ignore[arg-type]
        lora_target_modules=_lora_target_modules(settings.target_modules),
        logprobs_mode="processed_logprobs",
        ir_op_priority=cpu_norms() if on_cpu else {},  # type: ignore[arg-type]
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **loading(nf4_weights=settings.nf4_weights, keep_linear_weights=settings.keep_base_weights),
    )


def _lora_target_modules(target_modules: Sequence[str]) -> list[str]:
    packed = [PACKED_NAMES[name] for name in target_modules if name in PACKED_NAMES]
    return sorted({*target_modules, *packed})


def _write_empty_adapter(folder: Path, slots: dict[str, AdapterSlot], settings: EngineSettings) -> None:
    """The adapter that vLLM registers: one layer, all zero. Its buffers belong to the policy from then on."""
    import torch
    from safetensors.torch import save_file

    own_names = {name: name.rpartition(".")[2] for name in slots if name.rpartition(".")[2] in settings.target_modules}
    # A small one if there is one; the head last: of some models vLLM adapts the head but refuses files that name it.
    name = min(own_names, key=lambda name: (own_names[name] == HEAD, own_names[name] == EMBEDDING))
    key = "lora_embedding_{}" if own_names[name] == EMBEDDING else "lora_{}.weight"
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
