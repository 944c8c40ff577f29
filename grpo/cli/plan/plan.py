"""The command `rankup plan`: from a model's `config.json` alone, a recommended adapter and the memory of a run.

    rankup plan Qwen/Qwen2.5-7B-Instruct --vram 80                  # whether it fits, vLLM's share, changes that help
    rankup plan smollm2-135m-instruct --task chat --rows 500 --json
    rankup plan Qwen/Qwen2.5-1.5B-Instruct --vram 24 --write run.yaml

The tables of practice are in `advice.py`, shapes and counts in `shapes.py`, memory in `memory.py` and `step_memory.py`, the
terminal's output in `view.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...common.log import log_to
from ...config import GRPOConfig
from ...config.lora import TARGET_PRESETS
from .advice import PRACTICE, PRESETS, Advice, advise, lora_fields, lower_ranks

if TYPE_CHECKING:
    from .memory import Budget, Device, Saving
    from .shapes import ModelShape

GIB = 2**30
SHARING: dict[str, bool | Literal["auto"]] = {"auto": "auto", "true": True, "false": False}
EXAMPLES = """examples:
  rankup plan smollm2-135m-instruct                        the recommendation, its memory, devices that it fits on
  rankup plan Qwen/Qwen2.5-7B-Instruct --vram 80           what fits on a device of 80 GiB; only config.json is fetched
  rankup plan path/to/model --task math --rows 20000       another task, and how much data there is
  rankup plan path/to/model --vram 24 --write run.yaml     a run file with the reasons, for rankup train
  rankup plan path/to/model --vram 24 --json               the same as one JSON object
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The result of the command. `config` is of the run file; `sized` the same with packs that hold the longest sequence."""

    model: str
    shape: ModelShape
    advice: Advice
    config: GRPOConfig
    sized: GRPOConfig
    budget: Budget
    savings: tuple[Saving, ...]
    notes: tuple[str, ...]

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
    rollout, optim = GRPOConfig().rollout, GRPOConfig().optim
    add = parser.add_argument
    add("model", metavar="MODEL", help="embedded name, folder with a config.json, or Hub id")
    tasks = "; ".join(f"{name}: {practice.task}" for name, practice in PRACTICE.items())
    add("--task", choices=list(PRACTICE), default="rl", help=f"purpose of the adapter (default rl). {tasks}")
    add("--rows", type=_positive, metavar="N", help="rows of training data")
    add("--vram", type=_size, metavar="GIB", help="memory of the device, in GiB")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="kind of device (default cuda)")
    add("--preset", choices=list(PRESETS), help="rank, alpha and targets by name")
    add("--load-in", choices=("bf16", "nf4"), default="bf16", help="type of the trainer's base weights (default bf16)")
    sharing = "whether the trainer uses vLLM's base weights (default auto: all of them on CUDA, some on CPU)"
    add("--share-base-weights", choices=list(SHARING), default="auto", help=sharing)
    add("--optimizer", choices=("adamw", "adamw_8bit", "paged_adamw_8bit"), default="adamw", help="default adamw")
    add("--rank", type=_positive, metavar="R", help="instead of the recommended one")
    add("--targets", metavar="T", help=f"{', '.join(TARGET_PRESETS)}, names with commas, or an expression")
    for flag, default, what in (
        ("--num-generations", rollout.num_generations, "completions of a prompt"),
        ("--prompt-length", rollout.max_prompt_length, "longest prompt, in tokens"),
        ("--completion-length", rollout.max_completion_length, "longest completion, in tokens"),
        ("--tokens-per-pack", optim.tokens_per_pack, "tokens of one forward and backward pass"),
    ):
        add(flag, type=_positive, default=default, metavar="N", help=f"{what} (default {default})")
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
    if options.write is not None and options.write.exists() and not options.force:
        raise ValueError(f"{options.write} exists: write to another file, or replace it with --force")
    with log_to(lambda text: print(f"{text} ...", file=sys.stderr)):
        made = make_plan(options)
    if options.json:
        print(json.dumps(as_json(made), indent=2))
    else:
        from .view import show

        show(made)
    return 0 if options.write is None else _write(made, options.write)


def _write(made: Plan, file: Path) -> int:
    from .memory import gib

    budget = made.budget
    if budget.fits is False:
        needed = f"the run needs {gib(budget.minimum)}, the device has {gib(budget.vram or 0)}"
        print(f"{file} was not written: {needed}. Plan again with the changes under 'less memory'", file=sys.stderr)
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


# -------------------------------------------------------------------------------------------------------------- making


def make_plan(options: argparse.Namespace) -> Plan:
    """Everything from the options of the command line. Raises ValueError as `plan` does."""
    targets = None if options.targets is None else _targets(options.targets)
    advise_for = functools.partial(
        advise, options.task, rows=options.rows, preset=options.preset, rank=options.rank, targets=targets
    )
    advice = advise_for()
    _config(options, advice)  # raises on wrong values before anything is imported, fetched or built
    from .memory import plan_budget, savings
    from .shapes import read_shape

    device: Device = options.device
    shape = read_shape(options.model)
    rank = _rank_that_fits(options, advice, shape)
    if rank != advice.rank.value:
        advice = advise_for(tight_rank=rank)
    config = _config(options, advice)
    sized = _with_full_sequences(config)
    budget = plan_budget(shape, sized, device=device, vram=options.vram)
    return Plan(
        model=options.model,
        shape=shape,
        advice=advice,
        config=_config(options, advice, _of_device(budget)),
        sized=sized,
        budget=budget,
        savings=tuple(savings(shape, sized, device=device)),
        notes=_notes(shape, config, sized, advice, device),
    )


def _targets(text: str) -> str | list[str]:
    is_expression = re.search(r"[.^$*+?{}\[\]\\|()]", text) is not None
    return text if text in TARGET_PRESETS or is_expression else [name.strip() for name in text.split(",") if name.strip()]


def _config(options: argparse.Namespace, advice: Advice, of_device: dict[str, float] | None = None) -> GRPOConfig:
    return GRPOConfig(
        model={
            "name": options.model,
            "load_in": None if options.load_in == "bf16" else options.load_in,
            "share_base_weights": SHARING[options.share_base_weights],
        },
        lora=lora_fields(advice),
        rollout={
            "num_generations": options.num_generations,
            "max_prompt_length": options.prompt_length,
            "max_completion_length": options.completion_length,
            **(of_device or {}),
        },
        optim={
            "learning_rate": advice.learning_rate.value,
            "tokens_per_pack": options.tokens_per_pack,
            "gradient_checkpointing": options.gradient_checkpointing,
            "optimizer": options.optimizer,
        },
    )


def _with_full_sequences(config: GRPOConfig) -> GRPOConfig:
    """With packs of at least one sequence: a single completion and its prompt are not split."""
    from .memory import changed

    tokens = max(config.optim.tokens_per_pack, config.rollout.max_model_length - 1)
    return changed(config, {"optim.tokens_per_pack": tokens})


def _of_device(budget: Budget) -> dict[str, float]:
    """The option that gives vLLM its memory; none if the device is unknown or too small."""
    if not budget.fits:
        return {}
    if budget.device == "cpu":
        wanted = min(budget.kv_bytes, budget.recommended - budget.fixed)
        return {"kv_cache_gib": max(0.1, int(10 * wanted / GIB) / 10)}
    return {"gpu_memory_utilization": budget.gpu_memory_utilization or 0.0}


def _rank_that_fits(options: argparse.Namespace, advice: Advice, shape: ModelShape) -> int:
    """The advised rank, or a lower one if it does not fit even with every change that costs nothing but time."""
    from .memory import low_memory, plan_budget

    rank: int = advice.rank.value
    if options.vram is None or options.rank is not None or options.preset is not None:
        return rank
    for candidate in (rank, *lower_ranks(options.task, rank)):
        of_candidate = dataclasses.replace(advice, rank=dataclasses.replace(advice.rank, value=candidate))
        config = _with_full_sequences(_config(options, of_candidate))
        for one in (config, low_memory(config, options.device)):
            if plan_budget(shape, one, device=options.device, vram=options.vram).fits:
                return candidate
    return rank


def _notes(shape: ModelShape, config: GRPOConfig, sized: GRPOConfig, advice: Advice, device: Device) -> tuple[str, ...]:
    from .memory import unshared_base_bytes

    notes = list(shape.unknown)
    if shape.plain_reason is not None:
        notes.append(f"each prompt is computed once per completion ({shape.plain_reason})")
    tokens = sized.optim.tokens_per_pack
    if tokens > config.optim.tokens_per_pack:
        notes.append(f"a prompt and a completion are longer than tokens_per_pack: the budget is for packs of {tokens:,} tokens")
    if config.model.load_in == "nf4" and unshared_base_bytes(shape, config, device) == 0:
        notes.append(
            "NF4 saves no memory here: vLLM holds the dequantized weights in bf16, and the trainer uses that copy. It is for "
            "training on the rounded weights that will be served"
        )
    if advice.dropout.value > 0:
        notes.append(f"a run file takes no dropout but 0; {advice.dropout.value:g} is usual in supervised training")
    if device == "cuda":
        notes.append("on CUDA the context, the allocator's gaps and vLLM's workspace are assumed, not measured")
    return tuple(notes)


# ---------------------------------------------------------------------------------------------------------- passing on


def as_json(made: Plan) -> dict[str, Any]:
    """All numbers and reasons; sizes in bytes."""
    shape, budget = made.shape, made.budget
    sizes = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary", "tied", "biases")
    return {
        "model": made.model,
        "architecture": shape.architecture,
        "shape": {name: getattr(shape, name) for name in sizes},
        "parameters": {
            "base": shape.parameters,
            "adapter": made.adapter_parameters,
            "adapter_per_rank": shape.parameters_per_rank(made.config.lora.targets),
        },
        "task": made.advice.task,
        "adapter": {name: dataclasses.asdict(choice) for name, choice in made.advice.choices.items()},
        "max_lora_rank": made.config.lora.max_rank,
        "workload": _workload(made),
        "memory": {
            "training": budget.training,
            "engine": budget.engine,
            "fixed": budget.fixed,
            "needed": budget.minimum,
            "comfortable": budget.recommended,
            "vram": budget.vram,
            "fits": budget.fits,
            "common_sizes_gib": list(budget.common_sizes),
        },
        "kv_cache": {
            "bytes_per_token": budget.kv_per_token,
            "bytes": budget.kv_bytes,
            "tokens": budget.kv_tokens,
            "concurrent_sequences": budget.concurrent_sequences,
        },
        "gpu_memory_utilization": budget.gpu_memory_utilization,
        "savings": [dataclasses.asdict(saving) for saving in made.savings],
        "notes": list(made.notes),
    }


def _workload(made: Plan) -> dict[str, Any]:
    """The options that memory depends on."""
    model, lora, rollout, optim = made.sized.model, made.sized.lora, made.sized.rollout, made.sized.optim
    return {
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
        "device": made.budget.device,
    }


def run_file(made: Plan) -> str:
    """A run file with the reasons as comments; `load_config` reads it. Data and rewards are left to the user."""
    from ...config.loading import dump_yaml

    advice, config = made.advice, made.config
    lines = [f"# {made.model}: {made.shape.parameters:,} parameters, adapter {made.adapter_parameters:,}"]
    if made.budget.vram is not None:
        lines.append(f"# planned for a device of {made.budget.vram / GIB:g} GiB")
    lines += [f"# note: {note}" for note in made.notes]

    def add(section: str, fields: dict[str, tuple[Any, str]]) -> None:
        lines.extend(["", f"{section}:"])
        for name, (value, reason) in fields.items():
            lines.extend([f"  # {reason}"] if reason else [])
            lines.append("  " + dump_yaml({name: value}).strip().replace("\n", "\n  "))

    other = config.model.model_dump(exclude_defaults=True, exclude={"name"})
    lines += ["", dump_yaml({"model": {"name": made.model, **other} if other else made.model}).strip()]
    of_adapter = {name: (value, advice.choices[name].reason) for name, value in lora_fields(advice).items()}
    of_adapter["max_rank"] = (config.lora.max_rank, "vLLM's buffers: 64 or 128")
    of_adapter["dropout"] = (0.0, "the only value: with dropout, trainer and sampler would no longer be the same policy")
    add("lora", of_adapter)
    rollout: dict[str, tuple[Any, str]] = {
        name: (getattr(config.rollout, name), "")
        for name in ("num_generations", "max_prompt_length", "max_completion_length")
    }
    sequences = f"a KV cache for {made.budget.concurrent_sequences:,} sequences of full length"
    for name, value in _of_device(made.budget).items():
        rollout[name] = (value, sequences if made.budget.device == "cuda" else "of the memory that the trainer leaves")
    add("rollout", rollout)
    add(
        "optim",
        {
            "learning_rate": (config.optim.learning_rate, advice.learning_rate.reason),
            "tokens_per_pack": (config.optim.tokens_per_pack, "sets memory, not the update"),
            "gradient_checkpointing": (config.optim.gradient_checkpointing, ""),
            **({} if config.optim.optimizer == "adamw" else {"optimizer": (config.optim.optimizer, "")}),
        },
    )
    lines += ["", "# data: {train: train.jsonl, eval: test.jsonl}", "# rewards: {functions: [reward.py:score]}"]
    return "\n".join(lines) + "\n"
