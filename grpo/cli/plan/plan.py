"""The command `rankup plan`: from a model's `config.json` alone, a recommended adapter and the memory of a run.

    rankup plan Qwen/Qwen2.5-7B-Instruct --vram 80                  # what fits, what is left for vLLM, what to change
    rankup plan smollm2-135m-instruct --task chat --rows 500 --json
    rankup plan Qwen/Qwen2.5-1.5B-Instruct --vram 24 --write run.yaml

The tables of practice are in `plan_advice.py`, shapes and counts in `plan_shapes.py`, memory in `plan_memory.py` and
`plan_budget.py`, what is printed in `plan_view.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...config import GRPOConfig
from ...config.lora import TARGET_PRESETS
from .advice import PRACTICE, PRESETS, Advice, advise, lora_fields, lower_ranks

if TYPE_CHECKING:
    from .budget import Budget, Saving
    from .memory import Workload
    from .shapes import ModelShape

GIB = 2**30
SHARING: dict[str, bool | Literal["auto"]] = {"auto": "auto", "true": True, "false": False}
EXAMPLES = """examples:
  rankup plan smollm2-135m-instruct                        what is recommended, what it needs, on which devices it fits
  rankup plan Qwen/Qwen2.5-7B-Instruct --vram 80           what fits on a device of 80 GiB; only config.json is fetched
  rankup plan path/to/model --task math --rows 20000       another task, and how much data there is
  rankup plan path/to/model --vram 24 --write run.yaml     a run file with the reasons, for rankup train
  rankup plan path/to/model --vram 24 --json               the same as one JSON object
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that the command found out. `of_model`, `of_optimizer`: fields of the run file that are not as by default."""

    model: str
    shape: ModelShape
    advice: Advice
    config: GRPOConfig
    of_model: dict[str, Any]
    of_optimizer: dict[str, str]
    work: Workload
    budget: Budget
    savings: tuple[Saving, ...]
    notes: tuple[str, ...]

    @property
    def adapter_parameters(self) -> int:
        """Of the whole adapter."""
        return self.work.rank * self.shape.parameters_per_rank(self.work.targets)


# ------------------------------------------------------------------------------------------------------- command line


def add_plan_command(commands: Any) -> None:
    """Add `plan` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "recommend an adapter and budget memory, from a model's config.json alone"
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan", help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rollout, optim = GRPOConfig().rollout, GRPOConfig().optim
    add = parser.add_argument
    add("model", metavar="MODEL", help="embedded name, folder with a config.json, or hub id")
    tasks = "; ".join(f"{name}: {practice.task}" for name, practice in PRACTICE.items())
    add("--task", choices=list(PRACTICE), default="rl", help=f"what the adapter is for (default rl). {tasks}")
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
    """`rankup plan MODEL [...]`

    Raises:
        ValueError: no such model, a config.json without what is needed, options that do not go together, a device that is too
            small for the base, or a file that would be overwritten.
    """
    if options.write is not None and options.write.exists() and not options.force:
        raise ValueError(f"{options.write} exists: write to another file, or replace it with --force")
    made = make_plan(options)
    if options.write is not None:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(run_file(made), encoding="utf-8")
    if options.json:
        print(json.dumps(as_json(made), indent=2))
    else:
        from .view import show

        show(made)
    if options.write is not None:
        print(f"written to {options.write}", file=sys.stderr)
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
    asked = {"rows": options.rows, "preset": options.preset, "rank": options.rank, "targets": targets}
    advice = advise(options.task, **asked)
    _config(options, advice)  # wrong values are refused before anything is imported, fetched or built
    from .budget import plan_budget, savings
    from .shapes import read_shape

    shape = read_shape(options.model, say=lambda text: print(f"{text} ...", file=sys.stderr))
    rank = _rank_that_fits(options, advice, shape)
    if rank != advice.rank.value:
        advice = advise(options.task, **asked, tight_rank=rank)
    config = _config(options, advice)
    work = _workload(options, config)
    budget = plan_budget(shape, work, vram=options.vram)
    made = Plan(
        model=options.model,
        shape=shape,
        advice=advice,
        config=config,
        of_model=_of_model(options),
        of_optimizer=_of_optimizer(options),
        work=work,
        budget=budget,
        savings=tuple(savings(shape, work)),
        notes=_notes(options, shape, work, advice),
    )
    return dataclasses.replace(made, config=_config(options, advice, _of_device(budget)))


def _targets(text: str) -> str | list[str]:
    is_expression = re.search(r"[.^$*+?{}\[\]\\|()]", text) is not None
    return text if text in TARGET_PRESETS or is_expression else [name.strip() for name in text.split(",") if name.strip()]


def _config(options: argparse.Namespace, advice: Advice, of_device: dict[str, Any] | None = None) -> GRPOConfig:
    return GRPOConfig(
        model={"name": options.model, **_of_model(options)},
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
            **_of_optimizer(options),
        },
    )


def _of_model(options: argparse.Namespace) -> dict[str, Any]:
    """How the base is held, where that is not as by default."""
    asked = {"load_in": options.load_in, "share_base_weights": SHARING[options.share_base_weights]}
    return {name: value for name, value in asked.items() if value not in ("bf16", "auto")}


def _of_optimizer(options: argparse.Namespace) -> dict[str, str]:
    return {} if options.optimizer == "adamw" else {"optimizer": options.optimizer}


def _of_device(budget: Budget) -> dict[str, Any]:
    """The field of the run file that gives vLLM its memory; none where the device is not known or too small."""
    if not budget.fits:
        return {}
    if budget.device == "cpu":
        wanted = min(budget.kv_bytes, budget.comfortable - budget.fixed)
        return {"kv_cache_gib": max(0.1, int(10 * wanted / GIB) / 10)}
    return {"gpu_memory_utilization": budget.gpu_memory_utilization}


def _workload(options: argparse.Namespace, config: GRPOConfig) -> Workload:
    from .memory import Workload

    return Workload(
        rank=config.lora.rank,
        max_rank=config.lora.max_rank,
        targets=config.lora.targets,
        num_generations=options.num_generations,
        prompt_length=options.prompt_length,
        completion_length=options.completion_length,
        tokens_per_pack=max(options.tokens_per_pack, config.rollout.max_model_length - 1),
        gradient_checkpointing=options.gradient_checkpointing,
        load_in=options.load_in,
        share_base_weights=SHARING[options.share_base_weights],
        optimizer=options.optimizer,
        device=options.device,
    )


def _rank_that_fits(options: argparse.Namespace, advice: Advice, shape: ModelShape) -> int:
    """The advised rank, or a lower one where not even changes that harm nothing but time make room for it."""
    from .budget import plan_budget, thrifty

    rank: int = advice.rank.value
    if options.vram is None or options.rank is not None or options.preset is not None:
        return rank
    for candidate in (rank, *lower_ranks(options.task, rank)):
        of_candidate = dataclasses.replace(advice, rank=dataclasses.replace(advice.rank, value=candidate))
        work = thrifty(_workload(options, _config(options, of_candidate)))
        if plan_budget(shape, work, vram=options.vram).fits:
            return candidate
    return rank


def _notes(options: argparse.Namespace, shape: ModelShape, work: Workload, advice: Advice) -> tuple[str, ...]:
    from .memory import own_base_bytes

    notes = list(shape.unknown)
    if shape.plain_reason is not None:
        notes.append(f"its prompts cannot be shared in training ({shape.plain_reason}): attention is budgeted less exactly")
    if work.tokens_per_pack > options.tokens_per_pack:
        notes.append(
            f"a prompt and a completion are longer than tokens_per_pack: packs of {work.tokens_per_pack:,} tokens are budgeted"
        )
    if options.load_in == "nf4" and own_base_bytes(shape, work) == 0:
        notes.append("NF4 saves nothing here: vLLM holds the base in bf16, and the trainer uses that copy")
    if advice.dropout.value > 0:
        notes.append(f"a run file takes no dropout but 0; {advice.dropout.value:g} is practice's in supervised training")
    if options.device == "cuda":
        notes.append("on CUDA the context, the allocator's gaps and vLLM's own work are assumed, not measured")
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
            "adapter_per_rank": shape.parameters_per_rank(made.work.targets),
        },
        "task": made.advice.task,
        "adapter": {name: dataclasses.asdict(choice) for name, choice in made.advice.choices.items()},
        "max_lora_rank": made.work.max_rank,
        "workload": dataclasses.asdict(made.work),
        "memory": {
            "training": budget.training,
            "engine": budget.engine,
            "fixed": budget.fixed,
            "needed": budget.needed,
            "comfortable": budget.comfortable,
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


def run_file(made: Plan) -> str:
    """A run file with the reasons as comments; `load_config` reads it. Data and rewards are left to the user."""
    from ...config.loading import dump_yaml

    advice, config = made.advice, made.config
    counts = f"{made.shape.parameters:,} parameters, adapter {made.adapter_parameters:,}"
    lines = [f"# {made.model}: {counts}"]
    if made.budget.vram is not None:
        verdict = "planned for" if made.budget.fits else "too large as it is for"
        lines.append(f"# {verdict} a device of {made.budget.vram / GIB:g} GiB")
    lines += [f"# note: {note}" for note in made.notes]

    def add(section: str, fields: dict[str, tuple[Any, str]]) -> None:
        lines.extend(["", f"{section}:"])
        for name, (value, reason) in fields.items():
            lines.extend([f"  # {reason}"] if reason else [])
            lines.append("  " + dump_yaml({name: value}).strip().replace("\n", "\n  "))

    model = {"name": made.model, **made.of_model} if made.of_model else made.model
    lines += ["", dump_yaml({"model": model}).strip()]
    of_adapter = {name: (value, advice.choices[name].reason) for name, value in lora_fields(advice).items()}
    of_adapter["max_rank"] = (config.lora.max_rank, "vLLM's buffers: 64 or 128")
    of_adapter["dropout"] = (0.0, "the only value: with dropout, trainer and sampler would be two policies")
    add("lora", of_adapter)
    rollout: dict[str, tuple[Any, str]] = {
        name: (getattr(config.rollout, name), "")
        for name in ("num_generations", "max_prompt_length", "max_completion_length")
    }
    sequences = f"a KV cache for {made.budget.concurrent_sequences:,} sequences of full length"
    for name, value in _of_device(made.budget).items():
        rollout[name] = (value, sequences if made.work.device == "cuda" else "of what the trainer leaves")
    add("rollout", rollout)
    add(
        "optim",
        {
            "learning_rate": (config.optim.learning_rate, advice.learning_rate.reason),
            "tokens_per_pack": (config.optim.tokens_per_pack, "sets memory, not the update"),
            "gradient_checkpointing": (config.optim.gradient_checkpointing, ""),
            **{name: (value, "") for name, value in made.of_optimizer.items()},
        },
    )
    lines += ["", "# data: {train: train.jsonl, eval: test.jsonl}", "# rewards: {functions: [reward.py:score]}"]
    return "\n".join(lines) + "\n"
