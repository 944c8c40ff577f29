"""The command `rankup plan`: from a model's `config.json` alone, a recommended adapter and the memory of a run.

    rankup plan Qwen/Qwen2.5-7B-Instruct --vram 80                  # whether it fits, vLLM's share, changes that help
    rankup plan smollm2-135m-instruct --task chat --rows 500 --json
    rankup plan Qwen/Qwen2.5-1.5B-Instruct --vram 24 --write run.yaml

The tables of practice are in `advice.py`, changes that need less memory in `savings.py`, the terminal's output in `view.py`.
Shapes, counts and memory are those with which a run divides its device (`grpo/memory/`).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.log import log_to
from ...config import GRPOConfig
from ...config.loading import dump_yaml
from ...config.lora import TARGET_PRESETS
from ...config.optim import USUAL_TOKENS_PER_PACK
from ...memory.budget import Budget
from ...memory.decide import decide_budget
from ...memory.parts import GIB, gib, tokens_per_pack
from ...memory.shapes import SIZES, ModelShape, read_shape
from .advice import ONE_POLICY, PRACTICE, PRESETS, Choice, advise, lower_ranks
from .savings import Saving, rank_that_fits, savings

MAX_RANK_REASON = "rank of vLLM's LoRA buffers, 64 or 128"
PACK_REASON = "sets memory, not the update"
EXAMPLES = """examples:
  rankup plan smollm2-135m-instruct                        the recommendation, its memory, devices that it fits on
  rankup plan Qwen/Qwen2.5-7B-Instruct --vram 80           what fits on a device of 80 GiB; only config.json is fetched
  rankup plan path/to/model --task math --rows 20000       another task, and how much data there is
  rankup plan path/to/model --vram 24 --write run.yaml     a run file with the reasons, for rankup train
  rankup plan path/to/model --vram 24 --json               the same as one JSON object
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The result of the command. `config` is of the run file; `sized` the same with packs that
    hold the longest sequence, as large as the device has room for if they are not given."""

    shape: ModelShape
    task: str
    advice: dict[str, Choice]
    config: GRPOConfig
    sized: GRPOConfig
    budget: Budget
    savings: list[Saving]
    notes: list[str]

    @property
    def adapter_parameters(self) -> int:
        """Of the complete adapter."""
        return self.config.lora.rank * self.shape.parameters_per_rank(self.config.lora.targets)


# ------------------------------------------------------------------------------------------------------- command line


def add_plan_command(commands: Any) -> None:
    """Add `plan` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "recommend an adapter and budget memory, from a model's config.json alone"
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan", help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rollout = GRPOConfig().rollout
    add = parser.add_argument
    add("model", metavar="MODEL", help="embedded name, folder with a config.json, or Hub id")
    tasks = "; ".join(f"{name}: {practice.task}" for name, practice in PRACTICE.items())
    add("--task", choices=list(PRACTICE), default="rl", help=f"purpose of the adapter (default rl). {tasks}")
    add("--rows", type=_positive, metavar="N", help="rows of training data")
    add("--vram", type=_size, metavar="GIB", help="memory of the device, in GiB")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="kind of device (default cuda)")
    add("--preset", choices=list(PRESETS), help="rank, alpha and targets by name")
    add("--load-in", choices=("bf16", "nf4"), default="bf16", help="nf4: base weights in 4 bits, for trainer and sampler")
    sharing = "whether the trainer uses vLLM's base weights (default auto: all of them on CUDA, some on CPU)"
    add("--share-base-weights", choices=("auto", "true", "false"), default="auto", help=sharing)
    add("--optimizer", choices=("adamw", "adamw_8bit", "paged_adamw_8bit"), default="adamw", help="default adamw")
    add("--rank", type=_positive, metavar="R", help="instead of the recommended one")
    add("--targets", type=_targets, metavar="T", help=f"{', '.join(TARGET_PRESETS)}, names with commas, or an expression")
    for flag, option, default, what in (
        ("--num-generations", "num_generations", rollout.num_generations, "completions of a prompt"),
        ("--prompt-length", "max_prompt_length", rollout.max_prompt_length, "longest prompt, in tokens"),
        ("--completion-length", "max_completion_length", rollout.max_completion_length, "longest completion, in tokens"),
    ):
        add(flag, dest=option, type=_positive, default=default, metavar="N", help=f"{what} (default {default})")
    pack_help = f"tokens of one forward and backward pass (default: what fits on --vram, else {USUAL_TOKENS_PER_PACK})"
    add("--tokens-per-pack", type=_positive, metavar="N", help=pack_help)
    release_help = "whether vLLM's KV cache makes room for training (default: on CUDA)"
    add("--release-kv-cache", choices=("true", "false"), help=release_help)
    add("--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--json", action="store_true", help="print one JSON object")
    add("--write", type=Path, metavar="FILE", help="write a run file (YAML)")
    add("--force", action="store_true", help="let --write replace a file")
    add("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(command=plan)


def plan(options: argparse.Namespace) -> int:
    """`rankup plan MODEL [...]`; 1 if a run file was asked for and the run does not fit on the device.

    Raises:
        ValueError: no such model, a config.json without the needed keys, conflicting options, a device that is too small for
            the base, or a file that would be overwritten.
    """
    file: Path | None = options.write
    if file is not None and os.path.exists(file) and not options.force:
        raise ValueError(f"{file} exists: write to another file, or replace it with --force")
    with log_to(lambda text: print(f"{text} ...", file=sys.stderr)):
        made = make_plan(options)
    if options.json:
        print(json.dumps(as_json(made), indent=2))
    else:
        from .view import show

        show(made)
    if file is None:
        return 0
    budget = made.budget
    if budget.fits is False:
        needed = f"the run needs {gib(budget.minimum)}, the device has {gib(budget.vram or 0)}"
        where = "in `savings`" if options.json else "under 'less memory'"
        print(f"{file} was not written: {needed}. Plan again with the changes {where}", file=sys.stderr)
        return 1
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run_file(made), encoding="utf-8")
    print(f"written to {file}", file=sys.stderr)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number of at least 1")
    return int(text)


def _size(text: str) -> int:
    """Bytes from GiB."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError("must be a number of GiB above 0")
    return round(float(text) * GIB)


def _targets(text: str) -> str | list[str]:
    is_expression = re.search(r"[.^$*+?{}\[\]\\|()]", text) is not None
    return text if text in TARGET_PRESETS or is_expression else [name.strip() for name in text.split(",") if name.strip()]


# -------------------------------------------------------------------------------------------------------------- making


def make_plan(options: argparse.Namespace) -> Plan:
    """Everything from the options of the command line. Raises ValueError as `plan` does."""
    advise_for = functools.partial(
        advise, options.task, rows=options.rows, preset=options.preset, rank=options.rank, targets=options.targets
    )
    advice = advise_for()
    config = _config(options, advice)  # raises on wrong values before torch is imported and anything is fetched
    shape, device, vram = read_shape(options.model), options.device, options.vram
    if vram is not None and options.rank is None and options.preset is None:
        advised = config.lora.rank
        rank = rank_that_fits(shape, config, lower_ranks(options.task, advised), device=device, vram=vram)
        if rank != advised:
            advice = advise_for(tight_rank=rank)
            config = _config(options, advice)
    decided, budget = decide_budget(shape, config, device=device, vram=vram)
    return Plan(
        shape=shape,
        task=options.task,
        advice=advice,
        config=config,
        sized=decided,
        budget=budget,
        savings=savings(shape, decided, device=device),
        notes=[
            *shape.target_notes(config.lora.targets),
            *shape.notes,
            *_notes(config, decided, budget, dropout=advice["dropout"].value),
        ],
    )


def _config(options: argparse.Namespace, advice: dict[str, Choice]) -> GRPOConfig:
    rollout = ("num_generations", "max_prompt_length", "max_completion_length")
    optim = ("tokens_per_pack", "gradient_checkpointing", "optimizer")
    return GRPOConfig(
        model={
            "name": options.model,
            "load_in": None if options.load_in == "bf16" else options.load_in,
            "share_base_weights": options.share_base_weights,
        },
        lora={name: advice[name].value for name in ("rank", "alpha", "use_rslora", "targets")},
        learning_rate=advice["learning_rate"].value,
        release_kv_cache=None if options.release_kv_cache is None else options.release_kv_cache == "true",
        **{name: getattr(options, name) for name in (*rollout, *optim)},
    )


def _notes(config: GRPOConfig, decided: GRPOConfig, budget: Budget, *, dropout: float) -> Iterator[str]:
    tokens = tokens_per_pack(decided)
    if config.optim.tokens_per_pack is not None and tokens > config.optim.tokens_per_pack:
        yield f"a prompt and a completion are longer than tokens_per_pack: the budget is for packs of {tokens:,} tokens"
    if config.model.load_in == "nf4" and "base_weights" not in budget.training:
        yield (
            "NF4 saves no memory here: vLLM holds the dequantized weights in bf16, and the trainer uses that copy. It is for "
            "training on the rounded weights that will be served"
        )
    if dropout > 0:
        yield f"a run file takes no dropout but 0; {dropout:g} is usual in supervised training"
    if budget.device == "cuda":
        yield "on CUDA the context, the allocator's gaps and vLLM's workspace are assumed, not measured"


# ---------------------------------------------------------------------------------------------------------- passing on


def as_json(made: Plan) -> dict[str, Any]:
    """All numbers and reasons; sizes in bytes."""
    shape, budget, lora = made.shape, made.budget, made.config.lora
    model, rollout, optim = made.sized.model, made.sized.rollout, made.sized.optim
    return {
        "model": model.name,
        "architecture": shape.architecture,
        "shape": {name: getattr(shape, name) for name in (*SIZES, "tied", "biases")},
        "parameters": {
            "base": shape.parameters,
            "adapter": made.adapter_parameters,
            "adapter_per_rank": shape.parameters_per_rank(lora.targets),
        },
        "task": made.task,
        "adapter": {name: choice._asdict() for name, choice in made.advice.items()},
        "max_lora_rank": lora.max_rank,
        "workload": {  # the options that memory depends on
            "rank": lora.rank,
            "max_rank": lora.max_rank,
            "targets": lora.targets,
            "num_generations": rollout.num_generations,
            "prompt_length": rollout.max_prompt_length,
            "completion_length": rollout.max_completion_length,
            "tokens_per_pack": optim.tokens_per_pack,
            "gradient_checkpointing": optim.gradient_checkpointing,
            "logits_mib": optim.logits_mib,
            "load_in": model.load_in or "bf16",
            "share_base_weights": model.share_base_weights,
            "optimizer": optim.optimizer,
            "release_kv_cache": budget.releases_kv,
            "device": budget.device,
        },
        "memory": {
            "training": budget.training,
            "engine": budget.engine,
            "sampling": budget.sampling,
            "training_peak": budget.training_peak,
            "minimum": budget.minimum,
            "recommended": budget.recommended,
            "vram": budget.vram,
            "fits": budget.fits,
            "common_sizes_gib": budget.common_sizes,
        },
        "kv_cache": {
            "bytes_per_token": budget.kv_per_token,
            "bytes": budget.kv_bytes,
            "tokens": budget.kv_tokens,
            "concurrent_sequences": budget.concurrent_sequences,
        },
        "gpu_memory_utilization": budget.gpu_memory_utilization,
        "savings": [
            {name: getattr(one, name) for name in ("change", "price", "alone", "minimum_with_all_before")}
            for one in made.savings
        ],
        "notes": made.notes,
    }


def run_file(made: Plan) -> str:
    """A run file with the reasons as comments; `load_config` reads it. Data and rewards are left to the user."""
    advice, config, budget = made.advice, made.config, made.budget
    rollout, optim = config.rollout, config.optim
    sections: dict[str, dict[str, tuple[Any, str]]] = {
        "lora": {
            **{name: advice[name] for name in ("rank", "alpha", "use_rslora", "targets")},
            "max_rank": (config.lora.max_rank, MAX_RANK_REASON),
            "dropout": (0.0, f"the only value: {ONE_POLICY}"),
        },
        "rollout": {
            "num_generations": (rollout.num_generations, ""),
            "max_prompt_length": (rollout.max_prompt_length, ""),
            "max_completion_length": (rollout.max_completion_length, ""),
            **({} if rollout.release_kv_cache is None else {"release_kv_cache": (rollout.release_kv_cache, "")}),
        },
        "optim": {
            "learning_rate": advice["learning_rate"],
            **({} if optim.tokens_per_pack is None else {"tokens_per_pack": (optim.tokens_per_pack, PACK_REASON)}),
            "gradient_checkpointing": (optim.gradient_checkpointing, ""),
            **({} if optim.optimizer == "adamw" else {"optimizer": (optim.optimizer, "")}),
        },
    }
    if budget.fits and budget.device == "cpu":
        wanted = min(budget.kv_bytes, budget.kv_wanted) / GIB
        sections["rollout"]["kv_cache_gib"] = max(0.1, int(10 * wanted) / 10), "of the memory that the trainer leaves"
    lines = [f"# {config.model.name}: {made.shape.parameters:,} parameters, adapter {made.adapter_parameters:,}"]
    if budget.vram is not None:
        lines.append(f"# planned for a device of {budget.vram / GIB:g} GiB")
    lines += [f"# note: {note}" for note in made.notes]
    model = config.model.model_dump(include={"name"}) | config.model.model_dump(exclude_defaults=True)
    lines += ["", dump_yaml({"model": model if len(model) > 1 else config.model.name}).strip()]
    for section, options in sections.items():
        lines += ["", f"{section}:"]
        for name, (value, reason) in options.items():
            lines += [f"  # {reason}"] if reason else []
            lines.append("  " + dump_yaml({name: value}).strip().replace("\n", "\n  "))
    lines += ["", "# data: {train: train.jsonl, eval: test.jsonl}", "# rewards: {functions: [reward.py:score]}"]
    return "\n".join(lines) + "\n"
