"""What `rankup plan` prints: tables in a terminal, the same as plain text where output is piped.

    show(plan)                                  # on standard output
    show(plan, Console(file=buffer, width=100))
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .memory import Budget, gib

if TYPE_CHECKING:
    from .plan import Plan

PIPED_WIDTH = 120

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
    "graphs": "graphs",
}


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the plan."""
    if console is None:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    sections = [
        ("model", _model(plan)),
        ("adapter", _adapter(plan)),
        ("memory", _memory(plan)),
        ("sampling", _sampling(plan)),
        ("less memory", _savings(plan)),
        ("notes", _notes(plan)),
    ]
    for index, (title, table) in enumerate(sections):
        if table.row_count:
            console.print(("\n" if index else "") + title, style="bold")
            console.print(table)


def _grid(*justify: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=2)
    for side in justify:
        table.add_column(justify=side, overflow="fold")  # type: ignore[arg-type]
    return table


def _model(plan: Plan) -> Table:
    shape = plan.shape
    table = _grid("left", "left")
    heads = f"{shape.heads} heads of {shape.head_dim}"
    keys = "" if shape.kv_heads == shape.heads else f", {shape.kv_heads} for keys and values"
    tied = ", tied to the head" if shape.tied else ""
    table.add_row("", Text("name", "dim"), Text(f"{plan.model} ({shape.architecture})"))
    table.add_row("", Text("parameters", "dim"), f"{shape.parameters:,}")
    widths = f"hidden {shape.hidden:,}, MLP {shape.intermediate:,}"
    table.add_row("", Text("layers", "dim"), f"{shape.layers}, {widths}, {heads}{keys}")
    table.add_row("", Text("vocabulary", "dim"), f"{shape.vocabulary:,}{tied}")
    return table


def _adapter(plan: Plan) -> Table:
    table = _grid("left", "left", "left")
    for name, choice in plan.advice.choices.items():
        value = choice.value
        text = ", ".join(value) if isinstance(value, list | tuple) else f"{value:g}" if isinstance(value, float) else str(value)
        table.add_row("", Text(name, "dim"), Text(text, "bold"), Text(choice.reason))
    per_rank = plan.shape.parameters_per_rank(plan.config.lora.targets)
    reason = f"{plan.config.lora.rank} x {per_rank:,}: the sum of d_in + d_out over all adapted layers"
    table.add_row("", Text("parameters", "dim"), Text(f"{plan.adapter_parameters:,}", "bold"), reason)
    table.add_row("", Text("max_lora_rank", "dim"), Text(str(plan.config.lora.max_rank), "bold"), "vLLM's buffers: 64 or 128")
    return table


def _memory(plan: Plan) -> Table:
    budget = plan.budget
    table = _grid("left", "right", "left")
    for name, size in budget.training.items():
        table.add_row("", Text(LABELS[name], "dim"), gib(size))
    for name, size in budget.engine.items():
        table.add_row("", Text(f"vLLM: {LABELS.get(name, name)}".replace(" of a pack", ""), "dim"), gib(size))
    table.add_row("", "all but the KV cache", Text(gib(budget.fixed), "bold"))
    of_group = f"{budget.group_size} sequences of {budget.sequence_length:,} tokens"
    table.add_row("", "with the KV cache of one group", Text(gib(budget.minimum), "bold"), Text(of_group, "dim"))
    table.add_row("", "of a step of 8 prompts", Text(gib(budget.recommended), "bold"))
    table.add_row("", Text("device", "dim"), *_device(budget))
    return table


def _device(budget: Budget) -> tuple[str | Text, ...]:
    if budget.vram is not None:
        missing = budget.minimum - budget.vram
        verdict = "it fits" if budget.fits else f"too small, {gib(max(missing, 2**20))} more are needed"
        return gib(budget.vram), Text(verdict, "green" if budget.fits else "red")
    sizes = [f"{size}" for size in budget.common_sizes]
    return "", f"fits on {', '.join(sizes)} GiB" if sizes else "fits on none of the common sizes, which go up to 141 GiB"


def _sampling(plan: Plan) -> Table:
    budget = plan.budget
    table = _grid("left", "right")
    if budget.vram is None or not budget.fits:
        table.add_row("", Text("KV cache, a token", "dim"), f"{budget.kv_per_token:,} bytes")
        return table
    table.add_row("", Text("left for the KV cache", "dim"), gib(budget.kv_bytes))
    table.add_row("", Text("tokens in it", "dim"), f"{budget.kv_tokens:,}")
    table.add_row("", Text("concurrent sequences", "dim"), f"{budget.concurrent_sequences:,}")
    if budget.device == "cuda":
        table.add_row("", Text("gpu_memory_utilization", "dim"), Text(f"{budget.gpu_memory_utilization:.2f}", "bold"))
    return table


def _savings(plan: Plan) -> Table:
    """Changes that need less memory; if the run fits or no device is given, only those that save a tenth or more."""
    budget = plan.budget
    table = _grid("left", "right", "left")
    fits = budget.fits is not False
    for saving in plan.savings:
        if budget.fits is not False and saving.alone < budget.minimum / 10:
            continue
        text = saving.price
        if not fits and budget.vram is not None:  # until it does
            fits = saving.needed_with_all_before <= budget.vram
            text += f"; with all above {gib(saving.needed_with_all_before)}" + (", which fits" if fits else "")
        table.add_row("", saving.change, Text(f"saves {gib(saving.alone)}", "bold"), Text(text, "dim"))
    return table


def _notes(plan: Plan) -> Table:
    table = _grid("left")
    for note in plan.notes:
        table.add_row("", Text(note, "yellow"))
    return table
