"""The engines of benchmarks, each in a separate process: rankup's, and stock vLLM with and without LoRA.

All run inside their process on all cores (a separate engine process of vLLM would leave one core to the caller: half the speed
on two). In `rollout.py` they have the same sampling parameters; rankup and the base model keep freed memory
(`kernels/cpu_memory.py`), stock vLLM with the adapter has its defaults.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cases import randomise_adapter
from common import QUICKSTART
from process_memory import resident_bytes, return_freed_memory
from transformers import AutoTokenizer

from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import GRPOConfig, load_config
from rankup.grpo.data.groups import Group
from rankup.grpo.data.prompts import Prompt, prepare_prompts
from rankup.grpo.data.run_inputs import load_run_inputs
from rankup.grpo.data.sources import load_rows
from rankup.grpo.model.policy import Policy
from rankup.grpo.run.records import CONFIG_FILE
from rankup.grpo.update.learner import Learner
from rankup.grpo.update.resolve import engine_settings
from rankup.grpo.update.session import make_policy
from rankup.kernels.cpu_memory import keep_freed_memory
from rankup.rollout.config import SamplingConfig
from rankup.rollout.engine import RolloutEngine
from rankup.rollout.generation_kwargs import GenerationKwargs
from rankup.rollout.sampling_params import sampling_params
from rankup.rollout.types import PromptGroup
from rankup.rollout.vllm_compat import import_vllm

if TYPE_CHECKING:
    from vllm import LLM

GPU_SHARE = 0.25  # of a CUDA device's memory for each of the three engines
ADAPTER_STD = 0.3  # of B's entries: changes log-probabilities by far more than rounding does


def equal_lengths(completions: int, length: int) -> SamplingConfig:
    """No completion ends early: all sides sample the same number of tokens."""
    kwargs = GenerationKwargs(ignore_eos=True)
    return SamplingConfig(num_generations=completions, max_completion_length=length, generation_kwargs=kwargs)


class QuickstartSide:
    """Engine and policy of the quick start on one copy of an adapter, with some options changed."""

    def __init__(self, overrides: list[str]) -> None:
        keep_freed_memory()
        self.config: GRPOConfig = load_config(QUICKSTART, overrides)
        with quiet_stderr():
            self.model_path = resolve_model(self.config.model.name)
            self.engine = RolloutEngine(engine_settings(self.config, self.model_path))
            self.policy: Policy = make_policy(self.config, self.model_path, self.engine)

    def publish_adapter(self) -> None:
        """Publish the adapter, which also clears the prefix cache, as training does before every step."""
        self.engine.publish(self.policy.write_slots)

    def sample_groups(
        self, prompts: list[list[int]], completions: int, length: int, seeds: list[int] | None = None
    ) -> list[PromptGroup]:
        """Groups of `completions` of `length` tokens each."""
        return list(self.engine.rollout(prompts, equal_lengths(completions, length), seeds=seeds))


class RankupSide(QuickstartSide):
    """rankup with a random adapter, which is saved for the stock side."""

    def __init__(self, *, rank: int, adapter_folder: Path) -> None:
        super().__init__([f"lora.rank={rank}", f"rollout.gpu_memory_utilization={GPU_SHARE}"])
        randomise_adapter(self.policy, ADAPTER_STD)
        self.publish_adapter()
        self.policy.save_adapter(adapter_folder)

    def describe(self) -> dict[str, Any]:
        """What the other sides and the report need to know."""
        settings = self.engine.settings
        return {
            "model_path": self.model_path,
            "max_num_seqs": settings.max_num_seqs,
            "max_model_len": settings.rollout.max_model_length,
            "kv_cache_bytes": int(settings.rollout.kv_cache_gib * 2**30),
            "completion_length": self.config.rollout.max_completion_length,
            **self.config.model_dump(mode="json", include={"model", "lora"}),
        }

    def quickstart_prompts(self, count: int) -> list[list[int]]:
        """Token ids of the first prompts of the quick start's training data."""
        assert self.config.data.train is not None
        rows = load_rows(self.config.data.train, split="train")[:count]
        tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        prompts = prepare_prompts(rows, tokenizer, max_prompt_length=self.config.rollout.max_prompt_length)
        return [list(row.token_ids) for row in prompts.rows]

    def sample(
        self, prompts: list[list[int]], completions: int, length: int, seeds: list[int] | None
    ) -> tuple[int, float]:
        """Tokens sampled and seconds taken."""
        started = time.perf_counter()
        groups = self.sample_groups(prompts, completions, length, seeds)
        seconds = time.perf_counter() - started
        return sum(len(c.token_ids) for group in groups for c in group.completions), seconds

    def clear_prefix_cache(self) -> None:
        """By publishing, as training does before every step."""
        self.publish_adapter()

    def prompt_logprobs(self, sequence: list[int]) -> list[float]:
        """Log-probability of every token except the first."""
        return self.engine.prompt_logprobs([sequence])[0]

    def publish(self) -> float:
        """Milliseconds of a publish."""
        started = time.perf_counter()
        self.publish_adapter()
        return 1e3 * (time.perf_counter() - started)


class TrainingSide(QuickstartSide):
    """For `base_weights.py`: samples, and trains on what it sampled."""

    def __init__(self, *, overrides: list[str]) -> None:
        super().__init__(["guards.enabled=false", *overrides])
        self.publish_adapter()
        self._learner = Learner(self.policy, self.config)
        self._groups: list[PromptGroup] = []
        self._steps = 0

    def sample(self, prompts: int, completions: int, length: int) -> float:
        """Seconds of a rollout."""
        ids = [[1, 504 + 7 * number, 3575, 282, 4649, 314] for number in range(prompts)]
        started = time.perf_counter()
        self._groups = self.sample_groups(ids, completions, length)
        return time.perf_counter() - started

    def train(self) -> float:
        """Seconds of an update on the latest rollout."""
        groups = [
            Group(
                prompt=Prompt(content="", token_ids=one.prompt_token_ids),
                completions=one.completions,
                advantages=(1.0, -1.0) * (len(one.completions) // 2),
            )
            for one in self._groups
        ]
        started = time.perf_counter()
        update = self._learner.update(groups, step=self._steps)
        self.publish_adapter()
        assert update.metrics["updates"] == 1
        self._steps += 1
        return time.perf_counter() - started

    def memory(self) -> dict[str, int]:
        """Resident bytes of the process, and bytes of base weights that the trainer owns and shares."""
        return_freed_memory()
        base = self.policy.base
        return {"resident": resident_bytes("VmRSS"), "own": base.unshared_bytes, "shared": base.shared_bytes}


class GreedySide:
    """For `export_agreement.py`: an fp32 engine with the base model and the adapter of a run, or with a merged model.

    Args:
        run: the run's folder.
        merged: the folder of the merged model, or None.
        rows: how many of the evaluation prompts, None: all.
    """

    def __init__(self, *, run: Path, merged: Path | None, rows: int | None) -> None:
        config = load_config(run / CONFIG_FILE, ["model.dtype=float32", f"data.eval_rows={rows or 'null'}"])
        inputs = load_run_inputs(config)
        assert inputs.eval_prompts is not None, "the run has no evaluation data"
        self._prompts = [list(row.token_ids) for row in inputs.eval_prompts.rows]
        self._sampling = config.rollout.greedy()
        self._use_adapter = merged is None
        settings = engine_settings(config, inputs.model_path)
        with quiet_stderr():
            self._engine = RolloutEngine(dataclasses.replace(settings, model=str(merged or inputs.model_path)))
            if merged is None:
                policy = Policy(inputs.model_path, lora=config.lora, dtype="float32", device=self._engine.device)
                policy.load_adapter(run / "adapter")
                policy.attach(self._engine.slots)
                self._engine.publish(policy.write_slots)

    def completions(self, *, of_base: bool = False) -> list[tuple[int, ...]]:
        """Token ids of the greedy completion of each prompt, in the order of the prompts. `of_base`: without the adapter."""
        groups = self._engine.rollout(self._prompts, self._sampling, use_adapter=self._use_adapter and not of_base)
        return [group.completions[0].token_ids for group in sorted(groups, key=lambda group: group.index)]


class StockSide:
    """Stock vLLM as its users start it, with the saved adapter (`adapter_folder`) or without LoRA (None).

    Besides LoRA only the size of the KV cache differs from vLLM's defaults: it is rankup's, since by default each engine would
    take most of the machine's memory.
    """

    def __init__(self, *, model_path: str, kv_cache_bytes: int, adapter_folder: Path | None, rank: int) -> None:
        if adapter_folder is None:  # so that the ratio to the base model shows the cost of the adapter only
            keep_freed_memory()
        import_vllm()
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        lora: dict[str, Any] = {}
        self._request = None
        if adapter_folder is not None:
            lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
            self._request = LoRARequest("adapter", 1, str(adapter_folder))
        with quiet_stderr():
            # On CUDA each engine has its share of the device, on CPU a cache of the same size.
            cache = None if torch.cuda.is_available() else kv_cache_bytes
            self._llm = LLM(model_path, kv_cache_memory_bytes=cache, gpu_memory_utilization=GPU_SHARE, **lora)

    def describe(self) -> dict[str, Any]:
        """The settings that vLLM chose."""
        return vllm_settings(self._llm)

    def sample(
        self, prompts: list[list[int]], completions: int, length: int, seeds: list[int] | None
    ) -> tuple[int, float]:
        """Tokens sampled and seconds taken."""
        sampling = equal_lengths(completions, length)
        params = [sampling_params(sampling, seed, stop_token_ids=()) for seed in seeds or [None] * len(prompts)]
        started = time.perf_counter()
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, lora_request=self._request, use_tqdm=False
        )
        seconds = time.perf_counter() - started
        return sum(len(c.token_ids) for output in outputs for c in output.outputs), seconds

    def clear_prefix_cache(self) -> None:
        """By vLLM's method."""
        assert self._llm.reset_prefix_cache()

    def prompt_logprobs(self, sequence: list[int]) -> list[float]:
        """Log-probability of every token except the first."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (output,) = self._llm.generate([{"prompt_token_ids": sequence}], params, lora_request=self._request, use_tqdm=False)
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_logprobs[1:], sequence[1:], strict=True)
        return [position[token].logprob for position, token in pairs if position is not None]


def vllm_settings(llm: LLM) -> dict[str, Any]:
    """Settings of a stock engine, for the result."""
    config = llm.llm_engine.vllm_config
    return {
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_model_len": config.model_config.max_model_len,
        "block_size": config.cache_config.block_size,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "compilation": config.compilation_config.mode.name,
    }
