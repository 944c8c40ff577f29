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
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base_weights import find_base_weights
from .config import SamplingConfig
from .dense_lora import is_dense, wrapper_name
from .engine_errors import in_our_names
from .engine_settings import EngineSettings, caches_prefixes, check_cache, engine_args, needs_no_towers
from .kv_cache import activity_of, beside_earlier_pools
from .limits import check_engine_limits
from .lora_files import check_loadable, write_empty_adapter
from .sampling_params import check_sampling_params, sampling_params, text_of
from .slots import HEAD, AdapterSlot, find_slots
from .texts import Texts
from .types import Completion, PromptGroup
from .vllm_compat import (
    check_model_runner,
    choose_model_runner,
    collections_skipped,
    existing_objects_frozen,
    forget_lora_pointers,
    import_vllm,
    record_experts,
    replace_cpu_layers,
    replace_sampler,
    replaced_in_new_engines,
    require,
)
from .vllm_requests import VllmQueue, VllmRequests, VllmTurns

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm import RequestOutput, SamplingParams

ADAPTER_ID = 1


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
        dense = is_dense(settings.rollout.lora_path, on_cpu=on_cpu, dtype=settings.dtype)
        check_engine_limits(settings.rollout, "vllm")
        if on_cpu:
            check_cache(settings)
        choose_model_runner(settings.rollout.model_runner, on_cpu=on_cpu)
        args = engine_args(
            settings,
            on_cpu=on_cpu,
            prefix_caching=caches_prefixes(settings, on_cpu=on_cpu),
            without_towers=needs_no_towers(settings),
        )
        wrapper = wrapper_name(current_platform.device_type, dense=dense, head=HEAD in settings.target_modules)
        pools = beside_earlier_pools() if args.enable_cumem_allocator else nullcontext()
        with in_our_names(settings.rollout, on_cpu=on_cpu), existing_objects_frozen(), pools:
            check_sampling_params(args, settings.rollout)
            with replaced_in_new_engines(wrapper, settings.model, on_cpu=on_cpu):
                self._engine: Any = LLMEngine.from_engine_args(args)
        check_model_runner(self._engine, settings.rollout.model_runner)
        if settings.rollout.model_runner == "v1":  # the sampler of V2 has counter-based noise of its own
            replace_sampler(self._engine, on_cpu=on_cpu)
        # V2, on CUDA, records by itself.
        self._recorder = record_experts(self._engine) if on_cpu and settings.returns_experts else None
        if on_cpu and dense:
            self._apply_model(replace_cpu_layers)
        self._tokenizer = self._engine.get_tokenizer()
        self.slots = self._apply_model(lambda model: find_slots(model, settings.model))
        manager = self._apply_model(lambda model: require(model, "lora_manager", purpose="check which layers it can adapt"))
        check_loadable(manager, self.slots, settings.target_modules)
        self.device: str = current_platform.device_type
        self._activity = activity_of(self._engine, settings.rollout, self.device)
        self._queue = VllmQueue(self._engine, self._opened)
        self.policy_version = 0
        self._write_slots: Callable[[], None] | None = None
        with tempfile.TemporaryDirectory(prefix="rankup-adapter-") as folder:
            write_empty_adapter(Path(folder), self.slots, settings)
            self._lora_request = LoRARequest("policy", ADAPTER_ID, folder)
            self._engine.add_lora(self._lora_request)
            self._engine.pin_lora(ADAPTER_ID)

    # ------------------------------------------------------------------------------------------------ policy

    def publish(self, write_slots: Callable[[], None]) -> int:
        """Sample from now on with the adapter that `write_slots` writes into the slots; returns the new policy version.

        Resets the prefix cache, which holds keys and values of the previous policy. Nothing is read from or written to disk. A
        suspended engine stays suspended.

        Raises:
            RuntimeError: a rollout is in progress.
        """
        self._activity.require_idle("publish another policy")
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
        return self._apply_model(lambda model: find_base_weights(model, self.settings.model))

    # --------------------------------------------------------------------------------------------- suspending

    @property
    def is_suspended(self) -> bool:
        """Whether the engine is between `suspend` and `resume`."""
        return self._activity.is_suspended

    def suspend(self) -> None:
        """Release the memory of the KV cache, and keep it released until `resume`, or until something samples.

        The memory stays with `rollout.release_kv_cache: false`. Does nothing if the engine is suspended.

        Raises:
            RuntimeError: a rollout is in progress: its iterator is neither exhausted nor closed.
        """
        self._activity.suspend()

    def resume(self) -> None:
        """Take the memory of the KV cache again. Does nothing if the engine is not suspended.

        Raises:
            RuntimeError: there is too little memory. The engine is still suspended.
        """
        self._activity.resume()

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """A block of requests."""
        with self._activity.sampling():
            self._ensure_active()
            yield

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

    def requests(self, sampling: SamplingConfig, *, stop_token_ids: Collection[int] = ()) -> VllmTurns:
        """Requests of episodes. Keys and values of what an episode holds stay in the prefix cache, in full blocks.

        Raises:
            ValueError: vLLM cannot sample like this.
        """
        check_engine_limits(sampling, "vllm")
        texts = Texts(self._tokenizer, sampling)
        return VllmTurns(
            self._queue,
            self._lora_request,
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
        """Shut vLLM down and free its memory, except for base weights that the trainer shares. Slots become invalid.

        A rollout that is still in progress raises EngineError when it goes on.
        """
        from vllm.distributed import cleanup_dist_env_and_memory

        self._queue.close()
        self._activity.close()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        with collections_skipped() if self.device == "cpu" else nullcontext():
            self._engine.engine_core.shutdown()
        self.slots = {}
        self._write_slots = None  # the policy's
        del self._engine
        forget_lora_pointers()
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
        with VllmRequests(self._queue, self._lora_request) as running:
            for index, (prompt, params) in enumerate(requests):
                running.add(index, prompt, params, use_adapter=use_adapter)
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
            routed_experts=output.routed_experts,
        )
