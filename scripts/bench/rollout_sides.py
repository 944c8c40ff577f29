"""The three engines of `rollout.py`, each made in a process of its own: rankup's, and stock vLLM with and without LoRA.

All of them run in their process, on all cores (vLLM's other choice, an engine process beside the caller, keeps one core
for the caller: half the speed on two) and get the very same sampling parameters. rankup and the base model keep freed
memory (`kernels/cpu_memory.py`); stock vLLM with the adapter is left as its users have it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import ROOT
from transformers import AutoTokenizer

from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import load_config
from rankup.grpo.data.prompts import prepare_prompts
from rankup.grpo.data.sources import load_rows
from rankup.grpo.experience.collect import engine_settings
from rankup.grpo.model.policy import Policy
from rankup.kernels.cpu_memory import keep_freed_memory
from rankup.rollout.config import SamplingConfig
from rankup.rollout.engine import RolloutEngine
from rankup.rollout.vllm_compat import import_vllm

if TYPE_CHECKING:
    from vllm import SamplingParams

RUN_FILE = ROOT / "configs" / "quickstart.yaml"
GPU_SHARE = 0.25  # of a CUDA device's memory for each of the three engines
ADAPTER_STD = 0.3  # of B's entries: moves log-probabilities by far more than rounding does


class EqualLengthEngine(RolloutEngine):
    """rankup's engine, except that no completion ends early: all sides sample the same number of tokens."""

    @staticmethod
    def _sampling_params(sampling: SamplingConfig, seed: int | None) -> SamplingParams:
        params = RolloutEngine._sampling_params(sampling, seed)
        params.ignore_eos = True
        return params


class OpenedFiles:
    """Names of the files that Python opens while `watching`. An audit hook stays for the life of its process."""

    def __init__(self) -> None:
        self.watching = False
        self.names: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event == "open":
            self.names.append(str(arguments[0]))


class RankupSide:
    """The quick start's policy and engine on one copy of a random adapter, which is saved for the others."""

    def __init__(self, *, rank: int, adapter_folder: Path) -> None:
        keep_freed_memory()
        self._opened = OpenedFiles()
        share = f"rollout.gpu_memory_utilization={GPU_SHARE}"
        config = load_config(RUN_FILE, [f"lora.rank={rank}", share])
        with quiet_stderr():
            self.model_path = resolve_model(config.model.name)
            self._settings = engine_settings(config, self.model_path)
            self._engine = EqualLengthEngine(self._settings)
            self._policy = Policy(
                self.model_path, lora=config.lora, dtype=config.model.dtype, seed=config.seed, device=self._engine.device
            )
        self._randomise()
        self._policy.attach(self._engine.slots)
        self._engine.publish(self._policy.write_slots)
        self._policy.save_adapter(adapter_folder)
        self._config = config

    @torch.no_grad()
    def _randomise(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for b in self._policy.masters[1::2]:
            b.copy_(torch.randn(b.shape, generator=generator) * ADAPTER_STD)

    def describe(self) -> dict[str, Any]:
        """What the others and the report need to know."""
        config = self._config
        return {
            "model": config.model.name,
            "model_path": self.model_path,
            "dtype": config.model.dtype,
            "targets": list(config.lora.target_modules),
            "adapter_parameters": sum(p.numel() for p in self._policy.masters),
            "max_num_seqs": self._settings.max_num_seqs,
            "max_model_len": self._settings.rollout.max_model_length,
            "kv_cache_bytes": int(self._settings.rollout.kv_cache_gib * 2**30),
            "completion_length": config.rollout.max_completion_length,
        }

    def quickstart_prompts(self, count: int) -> list[list[int]]:
        """Token ids of the first prompts of the quick start's training data."""
        assert self._config.data.train is not None
        rows = load_rows(self._config.data.train, split="train")[:count]
        tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        prompts = prepare_prompts(rows, tokenizer, max_prompt_length=self._config.rollout.max_prompt_length)
        return [list(row.token_ids) for row in prompts.rows]

    def sample(self, prompts: list[list[int]], sampling: SamplingConfig, seeds: list[int] | None) -> tuple[int, float]:
        """Tokens sampled and seconds taken."""
        started = time.perf_counter()
        groups = list(self._engine.rollout(prompts, sampling, seeds=seeds))
        seconds = time.perf_counter() - started
        return sum(len(c.token_ids) for group in groups for c in group.completions), seconds

    def forget_prompts(self) -> None:
        """Empty the prefix cache, as training does before every step: by publishing."""
        self._engine.publish(self._policy.write_slots)

    def prompt_logprobs(self, sequence: list[int]) -> list[float]:
        """Log-probability of every token but the first."""
        return self._engine.prompt_logprobs([sequence])[0]

    def publish(self, times: int) -> tuple[list[float], list[str]]:
        """Milliseconds of each of so many publishes, and the files that were opened meanwhile."""
        milliseconds = []
        self._opened.watching = True
        for _ in range(times):
            started = time.perf_counter()
            self._engine.publish(self._policy.write_slots)
            milliseconds.append((time.perf_counter() - started) * 1e3)
        self._opened.watching = False
        return milliseconds, self._opened.names


class StockSide:
    """Stock vLLM as its users start it, with the saved adapter (`adapter_folder`) or without LoRA (None).

    Only what was asked for differs from vLLM's defaults, and the size of the KV cache, which is rankup's: by default
    each engine would take most of the machine's memory.
    """

    def __init__(self, *, model_path: str, kv_cache_bytes: int, adapter_folder: Path | None, rank: int) -> None:
        if adapter_folder is None:  # so that the ratio to the base model is what the adapter costs, and nothing else
            keep_freed_memory()
        import_vllm()
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        lora: dict[str, Any] = {}
        if adapter_folder is not None:
            lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        with quiet_stderr():
            # On CUDA each engine has its share, on CPU a cache of the same size.
            cache = None if torch.cuda.is_available() else kv_cache_bytes
            self._llm = LLM(model_path, kv_cache_memory_bytes=cache, gpu_memory_utilization=GPU_SHARE, **lora)
        self._request = None if adapter_folder is None else LoRARequest("adapter", 1, str(adapter_folder))

    def describe(self) -> dict[str, Any]:
        """The settings that vLLM chose."""
        config = self._llm.llm_engine.vllm_config
        return {
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_model_len": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "compilation": config.compilation_config.mode.name,
        }

    def sample(self, prompts: list[list[int]], sampling: SamplingConfig, seeds: list[int] | None) -> tuple[int, float]:
        """Tokens sampled and seconds taken."""
        params = [EqualLengthEngine._sampling_params(sampling, seed) for seed in seeds or [None] * len(prompts)]
        started = time.perf_counter()
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, lora_request=self._request, use_tqdm=False
        )
        seconds = time.perf_counter() - started
        return sum(len(c.token_ids) for output in outputs for c in output.outputs), seconds

    def forget_prompts(self) -> None:
        """Empty the prefix cache."""
        assert self._llm.reset_prefix_cache()

    def prompt_logprobs(self, sequence: list[int]) -> list[float]:
        """Log-probability of every token but the first."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (output,) = self._llm.generate([{"prompt_token_ids": sequence}], params, lora_request=self._request, use_tqdm=False)
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_logprobs[1:], sequence[1:], strict=True)
        return [position[token].logprob for position, token in pairs if position is not None]
