#!/usr/bin/env python3
"""What each prompt once saves in models whose layers are more than causal attention, and how exact it is.

A training pass (forward, backward) over 8 completions of 128 tokens behind a prompt of 512, through eight random layers of each
kind, of hidden width 512: once as a pack with the prompt once, once as rows of prompt and completion. Passes of the two take
turns. Memory is what tensors take at the peak above the loaded model, counted at torch's operators. The error is that of the
adapter's gradients between the two, in fp32.

examples:
  scripts/bench/shared_prompts.py --json shared_prompts.json      about ten minutes on two idle cores
  scripts/bench/shared_prompts.py --kinds llama qwen3.5 --repeats 3
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import Result, command_line, interleave, markdown, run, summarise

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
WIDTHS = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1408, **HEADS}
LAYERS = 8
HYBRID = ["linear_attention"] * 3 + ["full_attention"]
DELTA = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_d_conv": 4}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaConfig", {}, [*ATTENTION, *MLP]),
    "gemma3, window 128": (
        "Gemma3TextConfig",
        {"head_dim": 64, "sliding_window": 128, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2},
        [*ATTENTION, *MLP],
    ),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        {**DELTA, "head_dim": 64, "layer_types": HYBRID * 2},
        [*ATTENTION, *MLP, "in_proj_qkv", "in_proj_z", "out_proj"],
    ),
    "granite hybrid": (
        "GraniteMoeHybridConfig",
        {**MAMBA, "layer_types": HYBRID * 2, "num_local_experts": 0, "shared_intermediate_size": 1408},
        [*ATTENTION, "in_proj", "out_proj"],
    ),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": (["conv"] * 3 + ["full_attention"]) * 2, "block_auto_adjust_ff_dim": False},
        ["q_proj", "k_proj", "v_proj", "in_proj", "w1", "w2", "w3"],
    ),
}
LAYOUTS = ("shared", "rows")
PROMPT, COMPLETIONS, LENGTH = 512, 8, 128


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=5, what="measured passes of each layout")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    run(parser.parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Seconds, peak bytes and tokens of both layouts for each kind, and the error between their gradients."""
    found: Result = {}
    for kind in options.kinds:
        print(kind, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = _measure_kind(kind, Path(folder), options.repeats)
    return found


def _measure_kind(kind: str, folder: Path, repeats: int) -> Result:
    import torch

    from rankup.grpo.memory.step_memory import PeakMemory
    from rankup.grpo.model.packing import pack, pad

    policy = _policy(kind, folder)
    assert policy.shares_prompts, policy.plain_reason
    groups = _groups()
    packs = {"shared": pack(groups, tokens_per_pack=10**6), "rows": pad(groups, tokens_per_pack=10**6, pad_token_id=0)}
    gradients: dict[str, torch.Tensor] = {}
    peaks: dict[str, int] = {}

    def one_pass(layout: str) -> float:
        policy.shares_prompts = layout == "shared"
        for master in policy.masters:
            master.grad = None
        started = time.perf_counter()
        for one in packs[layout]:
            policy.backward(one, _minus_logprob)
        seconds = time.perf_counter() - started
        gradients[layout] = torch.cat([master.grad.flatten() for master in policy.masters if master.grad is not None])
        return seconds

    for layout in LAYOUTS:
        with PeakMemory() as memory:
            memory.begin()
            loaded = memory.now
            one_pass(layout)
        peaks[layout] = memory.peak - loaded
    times = interleave(LAYOUTS, repeats, one_pass)
    error = (gradients["shared"] - gradients["rows"]).norm() / gradients["rows"].norm()
    return {
        "seconds": {layout: summarise(times[layout]) for layout in LAYOUTS},
        "peak_bytes": peaks,
        "tokens": {layout: sum(one.num_input_tokens for one in packs[layout]) for layout in LAYOUTS},
        "gradient_error": error.item(),
    }


def _policy(kind: str, folder: Path) -> Any:
    """The policy on a random model of this kind, in fp32, with an adapter that does something."""
    import torch
    import transformers

    from rankup.grpo.common.quiet import quiet_stderr
    from rankup.grpo.config import LoraConfig
    from rankup.grpo.model.policy import Policy

    name, options, targets = KINDS[kind]
    config = getattr(transformers, name)(**WIDTHS, num_hidden_layers=LAYERS, **options)
    torch.manual_seed(0)
    with quiet_stderr():
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        policy = Policy(str(folder), lora=LoraConfig(rank=64, alpha=32, targets=targets), dtype="float32")
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.master_b.normal_(std=0.02)
    policy.write_slots()
    return policy


def _groups() -> list[Any]:
    import random

    from rankup.grpo.data.groups import Group
    from rankup.grpo.data.prompts import Prompt
    from rankup.rollout.types import Completion

    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, WIDTHS["vocab_size"]) for _ in range(count))

    completions = tuple(
        Completion(token_ids=tokens(LENGTH), logprobs=(-1.0,) * LENGTH, text="", finish_reason="length", policy_version=0)
        for _ in range(COMPLETIONS)
    )
    advantages = tuple(draw.uniform(-1.0, 1.0) for _ in range(COMPLETIONS))
    return [Group(prompt=Prompt(content="", token_ids=tokens(PROMPT)), completions=completions, advantages=advantages)]


def _minus_logprob(logprobs_n: Any, _entropy_n: Any, _chunk: slice) -> Any:
    return -logprobs_n


def report(result: Mapping[str, Result]) -> str:
    """Markdown."""
    head = ["layers", "once", "rows", "ratio", "memory once", "memory rows", "ratio", "error of the gradients"]
    return markdown(head, [_row(kind, one) for kind, one in result.items() if "gradient_error" in one], left=1)


def _row(kind: str, one: Result) -> list[str]:
    once, rows = (one["seconds"][layout]["median"] for layout in LAYOUTS)
    small, large = (one["peak_bytes"][layout] / 2**20 for layout in LAYOUTS)
    times = [f"{once:.2f} s", f"{rows:.2f} s", f"{once / rows:.2f}"]
    return [kind, *times, f"{small:.0f} MiB", f"{large:.0f} MiB", f"{small / large:.2f}", f"{one['gradient_error']:.1e}"]


if __name__ == "__main__":
    main()
