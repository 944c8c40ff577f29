#!/usr/bin/env python3
"""The peak memory of a training update on CPU against the prediction of `rankup plan`, part by part.

Measured is how far resident memory rises (VmHWM, reset) from just before the policy is made to the peak of its updates. There
is no vLLM: the policy allocates its slots. A tiny model is trained before, so that libraries are loaded, as
in a run. An update takes two full packs: in the second one, gradients and activations meet.

`--return-freed` lets malloc return freed memory immediately, where a run keeps it: the difference is memory in gaps.
One setting a process.

examples:
  scripts/bench/plan_memory.py --rank 128 --tokens-per-pack 2048
  scripts/bench/plan_memory.py --gradient-checkpointing --return-freed
  scripts/bench/plan_memory.py --model path/to/model --json plan_memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from typing import TYPE_CHECKING

from cases import LAST_TOKEN, Case
from common import Result, command_line, run
from process_memory import reset_peak, resident_bytes, return_freed_memory

if TYPE_CHECKING:
    from rankup.grpo.config import GRPOConfig

GROUP = Case(64, 57, prompts=1, completions=8)  # 512 tokens of it go through the model, so packs are full
PACKS = 2
MODEL, ALPHA = "smollm2-135m-instruct", 32
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def main() -> None:
    """Measure, and print the comparison."""
    # The guards' first snapshot with optimizer state is in the second update, and coexists with activations from the third on.
    parser = command_line(__doc__, repeats=4, what="updates, of which the peak is taken")
    parser.add_argument("--model", default=MODEL, help=f"embedded name, folder or hub id (default {MODEL})")
    parser.add_argument("--rank", type=int, default=64, metavar="R", help="of the adapter, on all seven (default 64)")
    parser.add_argument("--tokens-per-pack", type=int, default=4096, metavar="T", help="a multiple of 512 (default 4096)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--return-freed", action="store_true", help="let malloc return freed memory immediately")
    options = parser.parse_args()
    if options.tokens_per_pack < 512 or options.tokens_per_pack % 512:
        parser.error("--tokens-per-pack must be a multiple of 512, so that packs are full")
    if not 1 <= options.rank <= 128:
        parser.error("--rank must be from 1 to 128")
    run(options, measure, report)


def measure(options: argparse.Namespace) -> Result:
    """The rise of memory, and the planner's training part for the same sizes."""
    from rankup.grpo.common.model_files import resolve_model
    from rankup.grpo.common.quiet import quiet_stderr
    from rankup.grpo.memory.parts import changed, training_parts
    from rankup.grpo.memory.shapes import read_shape
    from rankup.kernels.cpu_memory import keep_freed_memory

    if options.return_freed:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    else:
        keep_freed_memory()
    model_path, config = resolve_model(options.model), _config(options)
    shape = read_shape(model_path)
    with quiet_stderr():
        _train_tiny_model(config)
        measured = _peak_growth(model_path, config, vocabulary=shape.vocabulary, updates=options.repeats)
    sizes = {
        "rollout.num_generations": GROUP.completions,
        "rollout.max_prompt_length": GROUP.prompt_tokens,
        "rollout.max_completion_length": GROUP.completion_tokens,
        "model.share_base_weights": False,  # there is no other copy
    }
    parts = training_parts(shape, changed(config, sizes), "cpu")
    return {
        "model": options.model,
        "rank": config.lora.rank,
        "tokens_per_pack": config.optim.tokens_per_pack,
        "gradient_checkpointing": config.optim.gradient_checkpointing,
        "returned_freed_memory": options.return_freed,
        "measured_bytes": measured,
        "estimated_bytes": sum(parts.values()),
        "estimated_over_measured": sum(parts.values()) / measured,
        "parts": parts,
    }


def _config(options: argparse.Namespace) -> GRPOConfig:
    from rankup.grpo.config import GRPOConfig
    from rankup.grpo.config.guards import GuardsConfig

    # Random tokens are far from what a sampler draws: no alarm may trigger on that, and a snapshot is taken at every step.
    no_limits = dict.fromkeys(name for name in GuardsConfig.model_fields if name.endswith(("_watch", "_stop")))
    return GRPOConfig(
        lora={"rank": options.rank, "alpha": ALPHA},
        correction={"mode": "none"},
        guards={"snapshot_steps": 1, **no_limits},
        optim={"tokens_per_pack": options.tokens_per_pack, "gradient_checkpointing": options.gradient_checkpointing},
    )


def _train_tiny_model(config: GRPOConfig) -> None:
    """Whatever the libraries load and compile on first use."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tiny = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, head_dim=32
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(tiny, dtype=torch.bfloat16).save_pretrained(folder)
        _train(folder, config, GROUP, vocabulary=tiny.vocab_size, updates=1)


def _peak_growth(model_path: str, config: GRPOConfig, *, vocabulary: int, updates: int) -> int:
    """Bytes by which resident memory rises at most, from before the policy is made."""
    from rankup.grpo.memory.parts import tokens_per_pack

    prompts = PACKS * tokens_per_pack(config) // GROUP.tokens
    return_freed_memory()
    before = resident_bytes("VmRSS")
    reset_peak()
    case = Case(GROUP.prompt_tokens, GROUP.completion_tokens, prompts=prompts, completions=GROUP.completions)
    _train(model_path, config, case, vocabulary=vocabulary, updates=updates)
    return resident_bytes("VmHWM") - before


def _train(model_path: str, config: GRPOConfig, case: Case, *, vocabulary: int, updates: int) -> None:
    from rankup.grpo.model.policy import Policy
    from rankup.grpo.update.learner import Learner

    groups = case.groups(last_token=min(vocabulary, LAST_TOKEN))
    checkpointing = config.optim.gradient_checkpointing
    policy = Policy(model_path, lora=config.lora, dtype=config.model.dtype, gradient_checkpointing=checkpointing)
    learner = Learner(policy, config)
    for step in range(updates):
        metrics = learner.update(groups, step=step).metrics
        assert not metrics["update_skipped"], "without its optimizer's state an update takes less memory"


def report(result: Result) -> str:
    """MiB of each part, the sum, and what was measured."""
    sizes = result["parts"] | {name: result[f"{name}_bytes"] for name in ("estimated", "measured")}
    lines = [f"- {name}: {size / 2**20:,.0f} MiB" for name, size in sizes.items()]
    return "\n".join([*lines, f"- estimated over measured: {result['estimated_over_measured']:.3f}"])


if __name__ == "__main__":
    main()
