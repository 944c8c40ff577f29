#!/usr/bin/env python3
"""The peak memory of a training update on CPU against the prediction of `rankup plan`, part by part.

Measured is how far resident memory rises (VmHWM, reset) from just before the policy is made to the peak of its updates. There
is no vLLM: the policy allocates its slots. A tiny model is trained before, so that libraries are loaded, as
in a run. An update takes two full packs: in the second one, gradients and activations meet.

`--return-freed` lets malloc return freed memory immediately, where a run keeps it: the difference is memory in gaps.
One setting a process; the last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import command_line, machine, use_environment, versions, write_json

if TYPE_CHECKING:
    from rankup.grpo.config import GRPOConfig
    from rankup.grpo.data.groups import Group

EXAMPLE = """examples:
  scripts/bench/plan_memory.py --rank 128 --tokens-per-pack 2048
  scripts/bench/plan_memory.py --gradient-checkpointing --return-freed
  scripts/bench/plan_memory.py --model path/to/model --json plan_memory.json
"""
PROMPT, COMPLETION, GENERATIONS = 64, 57, 8  # 512 tokens a group go through the model, so packs are full
PACKS = 2
MODEL, ALPHA = "smollm2-135m-instruct", 32
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the comparison and one line of JSON."""
    options = _parse(arguments)
    from rankup.grpo.common.log import log_to
    from rankup.grpo.common.model_files import resolve_model
    from rankup.grpo.common.quiet import quiet_loggers, quiet_stderr
    from rankup.kernels.cpu_memory import keep_freed_memory

    quiet_loggers()
    if options.return_freed:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    else:
        keep_freed_memory()
    with log_to(print):
        model_path = resolve_model(options.model)
    config = _config(options)
    with quiet_stderr():
        _train_tiny_model(config)
        measured = _peak_growth(model_path, config, updates=options.repeats)
    parts = _estimated(model_path, config)
    result = {
        "what": " ".join((__doc__ or "").split()),
        "model": options.model,
        "rank": config.lora.rank,
        "tokens_per_pack": config.optim.tokens_per_pack,
        "gradient_checkpointing": config.optim.gradient_checkpointing,
        "returned_freed_memory": options.return_freed,
        "measured_bytes": measured,
        "estimated_bytes": sum(parts.values()),
        "estimated_over_measured": sum(parts.values()) / measured,
        "parts": parts,
        "machine": machine(),
        "versions": versions(),
    }
    _show(result)
    if options.json is not None:
        write_json(options.json, result)
    print(json.dumps(result))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    # The guards' first snapshot with optimizer state is in the second update, and coexists with activations from the third on.
    parser = command_line(__doc__, EXAMPLE, repeats=4, what="updates, of which the peak is taken")
    parser.add_argument("--model", default=MODEL, help=f"embedded name, folder or hub id (default {MODEL})")
    parser.add_argument("--rank", type=int, default=64, metavar="R", help="of the adapter, on all seven (default 64)")
    parser.add_argument("--tokens-per-pack", type=int, default=4096, metavar="T", help="a multiple of 512 (default 4096)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--return-freed", action="store_true", help="let malloc return freed memory immediately")
    options = parser.parse_args(arguments)
    if options.tokens_per_pack < 512 or options.tokens_per_pack % 512:
        parser.error("--tokens-per-pack must be a multiple of 512, so that packs are full")
    if not 1 <= options.rank <= 128:
        parser.error("--rank must be from 1 to 128")
    return options


def _config(options: argparse.Namespace) -> GRPOConfig:
    from rankup.grpo.config import GRPOConfig

    return GRPOConfig(
        lora={"rank": options.rank, "alpha": ALPHA},
        # Random tokens are far from what a sampler draws: no alarm may trigger on that, and a snapshot is taken at every step.
        correction={"mode": "none"},
        guards={"snapshot_steps": 1, **_no_limits()},
        optim={
            "tokens_per_pack": options.tokens_per_pack,
            "gradient_checkpointing": options.gradient_checkpointing,
        },
    )


def _no_limits() -> dict[str, None]:
    from rankup.grpo.config.guards import GuardsConfig

    return dict.fromkeys(name for name in GuardsConfig.model_fields if name.endswith(("_watch", "_stop")))


def _train_tiny_model(config: GRPOConfig) -> None:
    """Whatever the libraries load and compile on first use."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tiny = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, head_dim=32
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(tiny, dtype=torch.bfloat16).save_pretrained(folder)
        _train(folder, config, _groups(1, vocabulary=tiny.vocab_size), updates=1)


def _peak_growth(model_path: str, config: GRPOConfig, *, updates: int) -> int:
    """Bytes by which resident memory rises at most, from before the policy is made."""
    vocabulary = json.loads((Path(model_path) / "config.json").read_text())["vocab_size"]
    groups = _groups(PACKS * config.optim.tokens_per_pack // 512, vocabulary=vocabulary)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is reset
    _train(model_path, config, groups, updates=updates)
    return _resident_bytes("VmHWM") - before


def _train(model_path: str, config: GRPOConfig, groups: Sequence[Group], *, updates: int) -> None:
    from rankup.grpo.model.policy import Policy
    from rankup.grpo.update.learner import Learner

    checkpointing = config.optim.gradient_checkpointing
    policy = Policy(model_path, lora=config.lora, dtype=config.model.dtype, gradient_checkpointing=checkpointing)
    learner = Learner(policy, config)
    for step in range(updates):
        metrics = learner.update(groups, step=step).metrics
        assert not metrics["update_skipped"], "without its optimizer's state an update takes less memory"


def _groups(count: int, *, vocabulary: int) -> list[Group]:
    """Random tokens and advantages."""
    from rankup.grpo.data.groups import Group
    from rankup.grpo.data.prompts import Prompt
    from rankup.rollout.types import Completion

    draw = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(length))

    def completion() -> Completion:
        logprobs = (-1.0,) * COMPLETION
        return Completion(token_ids=tokens(COMPLETION), logprobs=logprobs, text="", finish_reason="length", policy_version=0)

    def group() -> Group:
        completions = tuple(completion() for _ in range(GENERATIONS))
        prompt = Prompt(content="", token_ids=tokens(PROMPT))
        return Group(prompt=prompt, completions=completions, advantages=tuple(draw.gauss(0, 1) for _ in completions))

    return [group() for _ in range(count)]


def _estimated(model_path: str, config: GRPOConfig) -> dict[str, int]:
    """The planner's training part, for the same sizes."""
    from rankup.grpo.cli.plan.memory import changed, training_parts
    from rankup.grpo.cli.plan.shapes import read_shape

    sizes = {
        "rollout.num_generations": GENERATIONS,
        "rollout.max_prompt_length": PROMPT,
        "rollout.max_completion_length": COMPLETION,
        "model.share_base_weights": False,  # there is no other copy
    }
    return training_parts(read_shape(model_path), changed(config, sizes), "cpu")


def _resident_bytes(field: str) -> int:
    """`VmRSS`, resident memory, or `VmHWM`, the most that it was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def _show(result: dict[str, Any]) -> None:
    for name, size in result["parts"].items():
        print(f"{name:<36}{size / 2**20:>8.0f} MiB")
    for name in ("estimated_bytes", "measured_bytes"):
        print(f"{name.removesuffix('_bytes'):<36}{result[name] / 2**20:>8.0f} MiB")
    print(f"estimated over measured: {result['estimated_over_measured']:.3f}")


if __name__ == "__main__":
    use_environment()
    main()
