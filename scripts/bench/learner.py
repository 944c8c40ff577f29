#!/usr/bin/env python3
"""The learner on random weights of a real model's shape: tokens per second, peak memory beside the plan's, equal updates.

No weights are read and nothing is sampled: the base is made on the device, the groups are random tokens that fill packs of 8192
tokens exactly, the adapter has rank 64 on all seven projections. A step is `Learner.update`: forward, backward, clipping,
AdamW. Peak memory is what torch allocated (and reserved) in a step with optimizer state; the plan's figure is that of
`rankup plan` without context and gaps (and with gaps). Two updates from the same state are compared bit for bit, then two under
`torch.use_deterministic_algorithms`.

Needs torch, transformers, peft, accelerate and pydantic; --nf4 needs bitsandbytes.

examples:
  scripts/bench/learner.py --shape 1.5b --json learner-1.5b.json
  scripts/bench/learner.py --shape 8b --nf4 --repeats 3
  scripts/bench/learner.py --shape tiny                     a few seconds, on CPU too
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cases import Case
from common import Result, command_line, run
from operations import step_operations

NEEDED = ("transformers", "peft", "accelerate", "pydantic")
RANK, ALPHA = 64, 32
OF_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "hidden_act": "silu"}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {  # Qwen2.5-1.5B
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        **OF_QWEN,
    },
    "8b": {  # Qwen3-8B
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
        **OF_QWEN,
    },
    "tiny": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
        **OF_QWEN,
    },
}
PACKS = 2
CASES = {"tiny": Case(16, 9, prompts=PACKS, completions=8)}
FULL = Case(512, 961, prompts=PACKS, completions=8)  # a group is 8192 tokens


def main() -> None:
    """Measure, print the figures and write the JSON file."""
    parser = command_line(__doc__, repeats=5, what="timed steps")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b", help="1.5b (default): Qwen2.5-1.5B; 8b: Qwen3-8B")
    parser.add_argument("--nf4", action="store_true", help="linear layers of the base in 4 bits")
    result = run(parser.parse_args(), measure, report)
    sys.exit(0 if result.get("is_finite", True) else 1)


def measure(options: argparse.Namespace) -> Result:
    """Seconds, bytes and comparisons; "left_out" instead if a package is missing."""
    named = {"shape": options.shape, "nf4": options.nf4}
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return {**named, "left_out": f"not installed: {', '.join(missing)}", "is_finite": False}
    if options.nf4 and find_spec("bitsandbytes") is None:
        return {**named, "left_out": "bitsandbytes is not installed"}
    from learner_side import LearnerSide

    from rankup.grpo.memory.shapes import read_shape

    case = CASES.get(options.shape, FULL)
    with tempfile.TemporaryDirectory(prefix="rankup-shape-") as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[options.shape]))
        side = LearnerSide(folder, case, rank=RANK, alpha=ALPHA, load_in="nf4" if options.nf4 else None)
        shape = read_shape(folder)
        timed = side.time(options.repeats)
        operations = step_operations(shape, case, rank=RANK)
        return {
            **named,
            **timed,
            "tokens": case.tokens,
            "operations": operations | {"total": sum(operations.values())},
            "memory": side.memory(shape),
            "equal_updates": {"default": side.compare(), "deterministic": side.compare(deterministic=True)},
            "fusion": side.fusion,
        }


def report(result: Result) -> str:
    """A list: speed, memory beside the plan, and what differs between two equal updates."""
    name = f"{result['shape']}{', NF4' if result['nf4'] else ''}"
    if "left_out" in result:
        return f"- {name}: not measured: {result['left_out']}"
    seconds, tokens = result["seconds"]["median"], result["tokens"]
    rate = 2 * result["operations"]["total"] / seconds / 1e12
    lines = [
        f"- {name}: {tokens} tokens a step in {seconds:.3f} s (first step {result['first_seconds']:.1f} s): "
        f"**{tokens / seconds:,.0f} tokens/s**, {rate:.1f} TFLOP/s in products",
        f"- loss {result['loss']:.4g}, gradient norm {result['grad_norm']:.4g}"
        + ("" if result["is_finite"] else ": **not finite**"),
        *_memory_lines(result["memory"]),
        *(f"- two equal updates, {mode}: {_compared(one)}" for mode, one in result["equal_updates"].items()),
        f"- {result['fusion']}",
    ]
    return "\n".join(lines)


def _memory_lines(memory: Result) -> list[str]:
    plan = memory["plan"]
    lines = [f"- plan: {_gib(plan['allocated'])} allocated, {_gib(plan['reserved'])} with gaps; {_parts(plan['parts'])}"]
    if "peak_allocated" not in memory:
        return [*lines, "- peak memory: measured on CUDA only"]
    ratio = memory["peak_allocated"] / plan["allocated"]
    peaks = f"{_gib(memory['peak_allocated'])} allocated, {_gib(memory['peak_reserved'])} reserved"
    return [*lines, f"- peak: **{peaks}**: {ratio:.3f} times the plan's"]


def _parts(parts: Result) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in parts.items())


def _compared(one: Result) -> str:
    if one["identical"]:
        return "bit-identical" + _warned(one)
    found = []
    for what in ("logprobs", "gradients", "weights"):
        if different := one[what]["different"]:
            names = ", ".join(list(different)[:4]) + (", ..." if len(different) > 4 else "")
            worst = max(different.values())
            found.append(f"{len(different)} of {one[what]['tensors']} {what} differ, by {worst:.1e} at most ({names})")
    return "**" + "; ".join(found) + "**" + _warned(one)


def _warned(one: Result) -> str:
    return f"; torch warns of {len(one['warnings'])} operations: {one['warnings'][0]}" if one["warnings"] else ""


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
