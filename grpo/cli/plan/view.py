"""What `rankup plan` prints: tables in a terminal, the same as plain text where output is piped.

    show(plan)                                  # on standard output
    show(plan, Console(file=buffer, width=100))
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...memory.budget import Budget
from ...memory.parts import gib, tokens_per_pack
from .plan import MAX_RANK_REASON, Plan

PIPED_WIDTH = 120
Row = tuple[str | Text, ...]

LABELS = {
    "base_weights": "base weights",
    "adapter_slots": "adapter, bf16 (vLLM's slots)",
    "adapter_masters": "adapter, fp32 master weights",
    "adapter_gradients": "adapter, fp32 gradients",
    "optimizer": "optimizer's state",
    "guards_snapshot": "guards' snapshot of both",
    "activations": "activations of a pack",
    "logits_chunk": "logits of one chunk",
    "hidden_states": "hidden states, gradients",
    "layer_backward": "backward of one layer",
    "layer_again": "activations of a layer, again",
    "gaps": "gaps in freed memory",
    "runtime": "libraries",
}


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the plan."""
    if console is None:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    _section(console, "model", _model(plan), ("dim", ""))
    _section(console, "\nadapter", _adapter(plan), ("dim", "bold", ""))
    _section(console, "\nmemory", _memory(plan.budget), ("dim", "", "dim"), numbers=True)
    _section(console, "\nsampling and training", _division(plan), ("dim", ""), numbers=True)
    _section(console, "\nless memory", _savings(plan), ("", "bold", "dim"), numbers=True)
    _section(console, "\nnotes", ((note,) for note in plan.notes), ("yellow",))


def _section(console: Console, title: str, rows: Iterator[Row], styles: tuple[str, ...], *, numbers: bool = False) -> None:
    """A table under its title, nothing without rows. `numbers`: the second column is one of numbers."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=2)
    for index, style in enumerate(styles):
        table.add_column(style=style, justify="right" if numbers and index == 1 else "left", overflow="fold")
    for row in rows:
        table.add_row("", *(Text(cell) if isinstance(cell, str) else cell for cell in row))
    if table.row_count:
        console.print(title, style="bold")
        console.print(table)


def _model(plan: Plan) -> Iterator[Row]:
    shape = plan.shape
    keys = "" if shape.kv_heads == shape.heads else f", {shape.kv_heads} for keys and values"
    widths = f"hidden {shape.hidden:,}, MLP {shape.intermediate:,}"
    yield "name", f"{plan.config.model.name} ({shape.architecture})"
    yield "parameters", f"{shape.parameters:,}"
    yield "layers", f"{shape.layers}, {widths}, {shape.heads} heads of {shape.head_dim}{keys}"
    yield "vocabulary", f"{shape.vocabulary:,}" + (", tied to the head" if shape.tied else "")


def _adapter(plan: Plan) -> Iterator[Row]:
    lora = plan.config.lora
    for name, (value, reason) in plan.advice.items():
        text = ", ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
        yield name, text, reason
    per_rank = plan.shape.parameters_per_rank(lora.targets)
    reason = f"{lora.rank} x {per_rank:,}: the sum of d_in + d_out over all adapted layers"
    yield "parameters", f"{plan.adapter_parameters:,}", reason
    yield "max_lora_rank", str(lora.max_rank), MAX_RANK_REASON


def _memory(budget: Budget) -> Iterator[Row]:
    for name, size in budget.training.items():
        yield LABELS[name], gib(size)
    for name, size in budget.engine.items():
        yield f"vLLM: {name.replace('_', ' ')}", gib(size)
    of_group = f"{budget.group_size} sequences of {budget.sequence_length:,} tokens"
    if budget.releases_kv:
        yield Text("while sampling, but the KV cache", "not dim"), Text(gib(budget.sampling), "bold")
        yield Text("while training, the cache released", "not dim"), Text(gib(budget.training_peak), "bold")
    else:
        yield Text("all but the KV cache", "not dim"), Text(gib(budget.sampling), "bold")
    yield Text("with the KV cache of one group", "not dim"), Text(gib(budget.minimum), "bold"), of_group
    yield Text(f"of {budget.num_sequences} sequences", "not dim"), Text(gib(budget.recommended), "bold")
    if budget.vram is None:
        sizes = ", ".join(map(str, budget.common_sizes))
        yield "device", "", f"fits on {sizes} GiB" if sizes else "fits on none of the common sizes, which go up to 141 GiB"
    elif budget.fits:
        yield "device", gib(budget.vram), Text("it fits", "not dim green")
    else:
        missing = gib(max(budget.minimum - budget.vram, 2**20))
        yield "device", gib(budget.vram), Text(f"too small, {missing} more are needed", "not dim red")


def _division(plan: Plan) -> Iterator[Row]:
    budget = plan.budget
    yield "tokens of a pack", f"{tokens_per_pack(plan.sized):,}"
    if not budget.fits:
        yield "KV cache, a token", f"{budget.kv_per_token:,} bytes"
        return
    yield "KV cache", gib(budget.kv_bytes)
    yield "tokens in it", f"{budget.kv_tokens:,}"
    yield "concurrent sequences", f"{budget.concurrent_sequences:,}"
    if budget.gpu_memory_utilization is not None:
        yield "gpu_memory_utilization", Text(f"{budget.gpu_memory_utilization:.3g}", "bold")


def _savings(plan: Plan) -> Iterator[Row]:
    """Changes that need less memory; if the run fits or no device is given, only those that save a tenth or more."""
    budget = plan.budget
    is_short = budget.fits is False
    for saving in plan.savings:
        price = saving.price
        if is_short and budget.vram is not None:
            needed = saving.minimum_with_all_before
            is_short = needed > budget.vram
            price += f"; with all above {gib(needed)}" + ("" if is_short else ", which fits")
        if budget.fits is False or saving.alone >= budget.minimum / 10:
            yield saving.change, f"saves {gib(saving.alone)}", price
