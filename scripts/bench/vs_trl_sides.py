"""The two sides of `vs_trl.py`, each made in a process of its own: rankup's GRPOTrainer, and TRL's as its users start it.

Making a side starts its trainer's `train()` and waits for the first step; every later step waits until it is asked for.
"""

from __future__ import annotations

import io
import logging
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import torch
from rich.console import Console
from rollout_sides import EqualLengthEngine
from transformers import AutoTokenizer, TrainerCallback
from vs_trl import ALPHA, COMPLETIONS, LEARNING_RATE, PROMPTS, RANK, TOKENS, score_by_hash

import rankup.grpo.trainer
from rankup.configs.quickstart import train as quickstart_rows
from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import GRPOConfig
from rankup.grpo.display.terminal import PlainView
from rankup.kernels.cpu_memory import keep_freed_memory
from rankup.rollout.vllm_compat import import_vllm

MODEL = "smollm2-135m-instruct"
SEED = 42
MAX_PROMPT_LENGTH = 64
MAX_STEPS = 10_000  # more than are ever asked for: no run reaches its end
TRL_CHANGES = [
    "vLLM on CPU repacks linear layers and drops their weights, so TRL could not load new ones: the layers that LoRA "
    "changes keep their weights as loaded (the LM head is still repacked)",
    "VLLM_CPU_KVCACHE_SPACE=1, as much as rankup takes: TRL has no argument for it, and vLLM would take a third of the memory",
]


class PacedRun:
    """A training run in a thread of its own that stands still between its steps.

    The thread makes the whole trainer, since vLLM binds to cores the threads that compute for the one that makes it.
    """

    def __init__(self, train: Callable[[PacedRun], object]) -> None:
        self._asked: SimpleQueue[None] = SimpleQueue()
        self._reports: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._started = time.perf_counter()
        self._tokens = 0.0
        threading.Thread(target=self._run, args=(train,), daemon=True).start()
        self._report()

    def step(self) -> dict[str, Any]:
        """Let the run take a step; its `seconds`, and what it reports."""
        self._asked.put(None)
        return self._report()

    def pause(self, report: Mapping[str, Any]) -> None:
        """For the run, after each step: report, and wait until the next step is asked for."""
        self._reports.put({"seconds": time.perf_counter() - self._started, **report})
        self._asked.get()
        self._started = time.perf_counter()

    def _run(self, train: Callable[[PacedRun], object]) -> None:
        try:
            train(self)
        finally:
            self._reports.put(None)

    def _report(self) -> dict[str, Any]:
        report = self._reports.get()
        if report is None:
            raise RuntimeError("training ended between two steps; what it said stands above")
        tokens = report.pop("num_tokens")  # of prompts and completions, of the run so far
        self._tokens, report["tokens"] = tokens, tokens - self._tokens
        return report


def prompt_rows() -> list[dict[str, Any]]:
    """The quick start's training data in the order that both sides walk through."""
    rows = quickstart_rows()
    random.Random(SEED).shuffle(rows)
    return rows


def _report(metrics: Mapping[str, float], phases: Mapping[str, float]) -> dict[str, Any]:
    """What is checked and shown of a step; both trainers use these names."""
    return {
        "phases": dict(phases),
        "num_tokens": metrics["num_tokens"],
        "lengths": [metrics["completions/min_length"], metrics["completions/max_length"]],
        "groups_without_variance": metrics["frac_reward_zero_std"],
        "sampling_logp_difference": metrics["sampling/sampling_logp_difference/mean"],
    }


def _peak_memory_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class PausingView(PlainView):
    """Shows nothing and halts the run after each step."""

    def __init__(self, run: PacedRun) -> None:
        super().__init__(max_steps=MAX_STEPS, run_name="vs_trl", console=Console(file=io.StringIO()))
        self._run = run

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None:
        assert not metrics["update_skipped"]
        self._run.pause(_report(metrics, seconds_by_phase))


class RankupSide:
    """rankup's trainer with its defaults, except that no completion ends early."""

    def __init__(self, *, folder: Path) -> None:
        self._config = GRPOConfig(
            model=MODEL,
            lora={"rank": RANK, "alpha": ALPHA, "targets": "all-linear"},
            rollout={
                "num_generations": COMPLETIONS,
                "max_prompt_length": MAX_PROMPT_LENGTH,
                "max_completion_length": TOKENS,
                "temperature": 1.0,
            },
            algorithm={"loss_type": "dapo", "beta": 0.0, "num_iterations": 1, "scale_rewards": "group"},
            optim={"prompts_per_step": PROMPTS, "learning_rate": LEARNING_RATE, "max_steps": MAX_STEPS},
            data={"shuffle": False},
            logging={"output_dir": folder / "rankup", "completions_steps": 0},
            seed=SEED,
        )
        self._run = PacedRun(self._train)

    def _train(self, run: PacedRun) -> None:
        rankup.grpo.trainer.RolloutEngine = EqualLengthEngine
        self._trainer = rankup.grpo.trainer.GRPOTrainer(
            reward_funcs=score_by_hash, args=self._config, train_dataset=prompt_rows(), view=PausingView(run)
        )
        self._trainer.train()

    def step(self) -> dict[str, Any]:
        """One step's seconds, phases and checks."""
        return self._run.step()

    def describe(self) -> dict[str, Any]:
        """What the report needs to know."""
        return {
            "peak_memory_gib": _peak_memory_gib(),
            "threads": torch.get_num_threads(),
            "tokens_per_pack": self._config.optim.tokens_per_pack,
        }


class PausingCallback(TrainerCallback):
    """Halts TRL's run after each step."""

    def __init__(self, run: PacedRun, phases: dict[str, float]) -> None:
        self._run = run
        self._phases = phases
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step. What remains of it after the phases that were timed is called `train`."""
        metrics = {name: values[-1] for name, values in self.trainer._metrics["train"].items()}
        self._run.pause(_report(metrics, self._phases))
        for name in self._phases:
            self._phases[name] = 0.0


class TrlSide:
    """TRL's trainer with its defaults where the comparison does not say otherwise.

    Args:
        folder: where the trainer may write.
        tuned: no gradient checkpointing (TRL's default is to checkpoint), and freed memory kept, as rankup does.
        micro_batch: completions of a forward and backward.
        options: further fields of TRL's GRPOConfig, to try what is fastest.
    """

    def __init__(self, *, folder: Path, tuned: bool, micro_batch: int, options: Mapping[str, Any] | None = None) -> None:
        if tuned:
            keep_freed_memory()
        logging.getLogger("trl").setLevel(logging.ERROR)
        self._folder = folder / "trl"
        self._options = {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": PROMPTS * COMPLETIONS // micro_batch,
            **({"gradient_checkpointing": False} if tuned else {}),
            **(options or {}),
        }
        self._phases = {"rollout": 0.0, "reward": 0.0, "publish": 0.0}
        self._run = PacedRun(self._train)

    def _train(self, run: PacedRun) -> None:
        from datasets import Dataset
        from peft import LoraConfig

        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import_vllm()
        if not torch.cuda.is_available():
            _keep_weights_as_loaded()
        with quiet_stderr():
            from trl.trainer.grpo_trainer import GRPOTrainer

            path = resolve_model(MODEL)
            callback = PausingCallback(run, self._phases)
            self._trainer = GRPOTrainer(
                model=path,
                reward_funcs=cast(Any, score_by_hash),  # TRL's type says that a reward may be None, in a list
                args=self._arguments(),
                train_dataset=Dataset.from_list(prompt_rows()),
                processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
                callbacks=[callback],
                peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"),
            )
        callback.trainer = self._trainer
        self._time_phases()
        self._trainer.train()

    def _arguments(self) -> Any:
        from trl.trainer.grpo_config import GRPOConfig as TrlConfig

        fields: dict[str, Any] = {
            "output_dir": str(self._folder),
            "model_init_kwargs": {"dtype": "bfloat16"},
            "use_cpu": not torch.cuda.is_available(),
            "bf16": True,
            "num_generations": COMPLETIONS,
            "max_completion_length": TOKENS,
            "generation_kwargs": {"ignore_eos": True},
            "temperature": 1.0,
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": MAX_PROMPT_LENGTH + TOKENS,
            "loss_type": "dapo",
            "beta": 0.0,
            "num_iterations": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_steps": MAX_STEPS,
            "shuffle_dataset": False,
            "seed": SEED,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        self._fields = fields | self._options
        return TrlConfig(**self._fields)

    def _time_phases(self) -> None:
        """Time the calls that make up a step. The rest of a step is training."""
        generation = self._trainer.vllm_generation
        for owner, method, phase in (
            (generation, "generate", "rollout"),
            (generation, "sync_weights", "publish"),
            (self._trainer, "_calculate_rewards", "reward"),
        ):
            setattr(owner, method, self._timed(phase, getattr(owner, method)))

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self._phases[phase] += time.perf_counter() - started
            return result

        return timed

    def step(self) -> dict[str, Any]:
        """One step's seconds, phases and checks."""
        report = self._run.step()
        report["phases"]["train"] = report["seconds"] - sum(report["phases"].values())
        return report

    def describe(self) -> dict[str, Any]:
        """What the report needs to know."""
        vllm = self._trainer.vllm_generation.llm.llm_engine.vllm_config
        return {
            "peak_memory_gib": _peak_memory_gib(),
            "changes": [] if torch.cuda.is_available() else TRL_CHANGES,
            "threads": torch.get_num_threads(),
            "arguments": {name: value for name, value in self._fields.items() if name != "output_dir"},
            "vllm": {
                "block_size": vllm.cache_config.block_size,
                "prefix_caching": vllm.cache_config.enable_prefix_caching,
                "compilation": vllm.compilation_config.mode.name,
            },
        }


def _keep_weights_as_loaded() -> None:
    """Let TRL load new weights into vLLM: on CPU vLLM packs them for oneDNN and drops the originals that are loaded into.

    Embeddings and LM head keep their originals beside the packed copy, and LoRA never changes them.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if remove_weight:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch
