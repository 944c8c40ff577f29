"""The two sides of `vs_trl.py`, each in a separate process: rankup's GRPOTrainer, and TRL's as its users start it."""

from __future__ import annotations

import io
import logging
import os
import random
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rollout_sides import vllm_settings
from transformers import AutoTokenizer, TrainerCallback
from vs_trl import ALPHA, COMPLETIONS, LEARNING_RATE, PROMPTS, RANK, TOKENS, score_by_hash
from workers import PacedSide

from rankup import GRPOConfig, GRPOTrainer
from rankup.configs.quickstart import train as quickstart_rows
from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.display.terminal import PlainView
from rankup.grpo.update.resolve import engine_settings
from rankup.kernels.cpu_memory import keep_freed_memory
from rankup.rollout.engine import RolloutEngine
from rankup.rollout.vllm_compat import import_vllm

MODEL = "smollm2-135m-instruct"
SEED = 42
MAX_PROMPT_LENGTH = 64
MAX_STEPS = 10_000  # more than are ever taken: no run reaches its end
TRL_CHANGES = [
    "vLLM on CPU repacks linear layers and drops their weights, so TRL could not load new ones: the layers that LoRA "
    "changes keep their weights in the original layout (the LM head is still repacked)",
    "VLLM_CPU_KVCACHE_SPACE=1, as much as rankup uses: TRL has no argument for it, and vLLM would take a third of the memory",
]


def prompt_rows() -> list[dict[str, Any]]:
    """The training data of the quick start, in the order in which both sides read it."""
    rows = quickstart_rows()
    random.Random(SEED).shuffle(rows)
    return rows


class GRPOSide(PacedSide):
    """What both sides report of a step."""

    _tokens = 0.0

    def pause_after(self, metrics: Mapping[str, float], phases: Mapping[str, float]) -> None:
        """Report the metrics that are checked and shown (both trainers use the same names), and wait for the next step."""
        tokens = metrics["num_tokens"] - self._tokens  # the metric counts prompts and completions of the run so far
        self._tokens = metrics["num_tokens"]
        self.pause(
            {
                "phases": dict(phases),
                "tokens": tokens,
                "lengths": [metrics["completions/min_length"], metrics["completions/max_length"]],
                "groups_without_variance": metrics["frac_reward_zero_std"],
                "sampling_logp_difference": metrics["sampling/sampling_logp_difference/mean"],
            }
        )

    def describe(self) -> dict[str, Any]:
        """Peak memory, and settings for the result."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"peak_memory_gib": peak, "threads": torch.get_num_threads()}


class PausingView(PlainView):
    """Shows nothing and pauses the run after each step."""

    def __init__(self, side: GRPOSide) -> None:
        super().__init__(max_steps=MAX_STEPS, run_name="vs_trl", console=Console(file=io.StringIO()))
        self._side = side

    def step(self, step: int, metrics: Mapping[str, float], seconds_by_phase: Mapping[str, float]) -> None:
        assert not metrics["update_skipped"]
        self._side.pause_after(metrics, seconds_by_phase)


class RankupSide(GRPOSide):
    """rankup's trainer with its defaults, except that no completion ends early."""

    def __init__(self, *, folder: Path) -> None:
        keep_freed_memory()
        self._config = GRPOConfig(
            model=MODEL,
            lora={"rank": RANK, "alpha": ALPHA, "targets": "all-linear"},
            rollout={
                "num_generations": COMPLETIONS,
                "max_prompt_length": MAX_PROMPT_LENGTH,
                "max_completion_length": TOKENS,
                "temperature": 1.0,
                "generation_kwargs": {"ignore_eos": True},
            },
            algorithm={"loss_type": "dapo", "beta": 0.0, "num_iterations": 1, "scale_rewards": "group"},
            optim={"prompts_per_step": PROMPTS, "learning_rate": LEARNING_RATE, "max_steps": MAX_STEPS},
            data={"shuffle": False},
            logging={"output_dir": folder / "rankup", "completions_steps": 0},
            seed=SEED,
        )

    def _train(self) -> None:
        with quiet_stderr():
            engine = RolloutEngine(engine_settings(self._config, resolve_model(MODEL)))
        trainer = GRPOTrainer(
            reward_funcs=score_by_hash, args=self._config, train_dataset=prompt_rows(), view=PausingView(self)
        )
        trainer.train(engine=engine)

    def describe(self) -> dict[str, Any]:
        return super().describe() | self._config.model_dump(mode="json", include={"lora", "rollout", "algorithm", "optim"})


class PausingCallback(TrainerCallback):
    """Pauses TRL's run after each step."""

    def __init__(self, side: TrlSide) -> None:
        self._side = side

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._side.step_ended()


class TrlSide(GRPOSide):
    """TRL's trainer with its defaults where the comparison needs nothing else.

    Args:
        folder: where the trainer may write.
        tuned: no gradient checkpointing (TRL checkpoints by default), and freed memory kept, as in rankup.
        micro_batch: completions of a forward and backward pass.
    """

    def __init__(self, *, folder: Path, tuned: bool, micro_batch: int) -> None:
        if tuned:
            keep_freed_memory()
        logging.getLogger("trl").setLevel(logging.ERROR)
        self._folder = folder / "trl"
        self._fields: dict[str, Any] = {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": PROMPTS * COMPLETIONS // micro_batch,
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
            **({"gradient_checkpointing": False} if tuned else {}),
        }
        self._phases = {"rollout": 0.0, "reward": 0.0, "publish": 0.0}

    def _train(self) -> None:
        from datasets import Dataset
        from peft import LoraConfig

        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import_vllm()
        if not torch.cuda.is_available():
            _keep_original_weights()
        with quiet_stderr():
            from trl.trainer.grpo_config import GRPOConfig as TrlConfig
            from trl.trainer.grpo_trainer import GRPOTrainer

            path = resolve_model(MODEL)
            self._trainer = GRPOTrainer(
                model=path,
                reward_funcs=cast(Any, score_by_hash),  # TRL's type requires a list of rewards that may be None
                args=TrlConfig(output_dir=str(self._folder), **self._fields),
                train_dataset=Dataset.from_list(prompt_rows()),
                processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
                callbacks=[PausingCallback(self)],
                peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"),
            )
        self._time_phases()
        self._trainer.train()

    def step_ended(self) -> None:
        """Report the step. Its time outside of the timed phases is called `train`."""
        metrics = {name: values[-1] for name, values in self._trainer._metrics["train"].items()}
        train = self.elapsed - sum(self._phases.values())
        self.pause_after(metrics, self._phases | {"train": train})
        self._phases = dict.fromkeys(self._phases, 0.0)

    def _time_phases(self) -> None:
        """Time the calls of a step that are not training."""
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

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "changes": [] if torch.cuda.is_available() else TRL_CHANGES,
            "arguments": self._fields,
            "vllm": vllm_settings(self._trainer.vllm_generation.llm),
        }


def _keep_original_weights() -> None:
    """Let TRL load new weights into vLLM: on CPU vLLM packs weights for oneDNN and drops the originals, which TRL writes to.

    Embeddings and LM head keep their originals next to the packed copy, and LoRA never changes them.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if remove_weight:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch
