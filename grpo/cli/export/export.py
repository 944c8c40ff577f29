"""The command `rankup export`: the adapter of a run, or its base model with the adapter merged into it, as a folder to share
or to serve.

    rankup export runs/quickstart                               # runs/quickstart/export/adapter: PEFT's format
    rankup export runs/quickstart --merge                       # runs/quickstart/export/merged: a transformers model
    rankup export runs/quickstart/checkpoints/step_000010 --merge --dtype float32 --output mine

Both come with the tokenizer and a model card (`model_card.py`). Merging computes in fp32 and casts once. The output appears
only when it is complete; the base model's files are only read.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ...common.files import atomic_folder
from ...common.log import log_to
from ...common.model_files import hub_id, resolve_model
from ...common.quiet import quiet_stderr
from .model_card import TrainedAdapter, model_card, read_run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"
LARGE_ROUNDING = 0.5  # of the update: 0.9 has cost a part of what was learned, 0.49 has not (docs/export.md)
EXPORT_MARK = "\n- rankup\n"  # among the tags of our cards, and of no other folder's
EXAMPLES = """examples:
  rankup export runs/quickstart                          the adapter in PEFT's format, with tokenizer and model card
  rankup export runs/quickstart --merge                  a plain transformers model, in the base model's dtype
  rankup export runs/quickstart --merge --dtype float32 --output merged
"""

Say = Callable[[str], None]


# ------------------------------------------------------------------------------------------------------- command line


def add_export_command(commands: Any) -> None:
    """Add `export` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "write a run's adapter, or the model with it merged in, to share or to serve"
    parser: argparse.ArgumentParser = commands.add_parser(
        "export", help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or a folder checkpoints/step_<N> of one")
    add("--merge", action="store_true", help="merge the adapter into the base model")
    add("--output", type=Path, metavar="FOLDER", help="default RUN/export/adapter, with --merge RUN/export/merged")
    add("--dtype", choices=DTYPES, default="auto", help="type of merged weights (default auto: the base model's own)")
    add("--overwrite", action="store_true", help="replace an export that is there already")
    add("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(command=export)


def export(options: argparse.Namespace) -> int:
    """`rankup export RUN [--merge] [--output FOLDER] [--dtype DTYPE] [--overwrite]`"""
    if options.dtype != "auto" and not options.merge:
        raise ValueError("--dtype goes with --merge: an adapter is exported as it was trained, in float32")
    trained = read_run(options.run)
    output: Path = options.output or default_output(trained, options.run, merged=options.merge)
    if options.merge:
        rounding = export_merged(trained, output, dtype=options.dtype, overwrite=options.overwrite, say=_print)
        if rounding > LARGE_ROUNDING:
            print(
                f"note: rounding has changed the adapted weights by {rounding:.2f} of what training had changed them: compare "
                "its evaluation with the adapter's, or keep more digits with --dtype float16 or float32"
            )
    else:
        export_adapter(trained, output, overwrite=options.overwrite, say=_print)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output} ({size / 2**20:,.1f} MiB)")
    if trained.config.model.load_in == "nf4" and not options.merge:
        print(
            "note: the adapter was trained on a base in NF4; on the base as it is it makes another policy, and vLLM serves the "
            "base only so: `rankup export RUN --merge` writes the model that was trained"
        )
        return 0
    print(f"serve it: {shlex.join(_serve_command(trained, output, merged=options.merge))}")
    return 0


def default_output(trained: TrainedAdapter, run: Path, *, merged: bool) -> Path:
    """`RUN/export/<kind>`; `RUN/export/step_<N>-<kind>` for a checkpoint, which the run may delete with all that is in it."""
    kind, place = "merged" if merged else "adapter", run.resolve()
    return run / "export" / kind if trained.step is None else place.parents[1] / "export" / f"{place.name}-{kind}"


def _print(text: str) -> None:
    print(f"{text} ...", flush=True)


def _serve_command(trained: TrainedAdapter, output: Path, *, merged: bool) -> list[str]:
    if merged:
        return ["vllm", "serve", str(output)]
    model = trained.config.model
    base = hub_id(model.name)
    where = [resolve_model(model.name)] if base is None else [base, *(["--revision", model.revision] if model.revision else [])]
    rank = str(trained.config.lora.max_rank)
    return ["vllm", "serve", *where, "--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"policy={output}"]


# ------------------------------------------------------------------------------------------------------------ exports


def export_adapter(
    trained: TrainedAdapter, output: Path, *, overwrite: bool = False, say: Say = lambda text: None
) -> None:
    """Write the adapter in PEFT's format (fp32), its tokenizer and a model card to the folder `output`.

    The configuration names the base model by its hub id, or by its bare name where it is not from the hub.

    Raises:
        ValueError: no such base model, or `output` is there already (see `overwrite`: it replaces an earlier export only).
    """
    _check_output(output, trained, overwrite=overwrite)
    model_path = _base_folder(trained, say)
    with atomic_folder(output.resolve()) as partial:
        config = json.loads((trained.folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = trained.base_name
        config["revision"] = trained.config.model.revision
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(trained.folder / "adapter_model.safetensors", partial / "adapter_model.safetensors")
        _save_tokenizer(model_path, partial)
        (partial / CARD_FILE).write_text(model_card(trained), encoding="utf-8")


def export_merged(
    trained: TrainedAdapter,
    output: Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    say: Say = lambda text: None,
) -> float:
    """Write the base model with the adapter merged into it, its tokenizer and a model card to the folder `output`.

    Returns how far rounding to the dtype moved the adapted weights, as a share of how far training had (Frobenius norms over
    all of them).

    dtype: `float32`, `bfloat16`, `float16`, or `auto`: what the base model's config.json says, else float32.

    Raises:
        ValueError: no such base model, one that the adapter does not fit, weights that are not finite (in that dtype), or
            `output` is there already.
    """
    _check_output(output, trained, overwrite=overwrite)
    model_path = _base_folder(trained, say)
    say(f"loading {trained.base_name} and merging the adapter, in float32")
    model_config = trained.config.model
    merged = merge(model_path, trained.folder, load_in=model_config.load_in, dtype=model_config.dtype)
    stored_as = _own_dtype(model_path) if dtype == "auto" else dtype
    rounding = _cast(merged, stored_as)
    with atomic_folder(output.resolve()) as partial:
        say(f"writing the weights in {stored_as}")
        _save_model(merged.model, Path(model_path), partial)
        _save_tokenizer(model_path, partial)
        (partial / CARD_FILE).write_text(model_card(trained, merged_dtype=stored_as), encoding="utf-8")
    return rounding


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model, its weights that had an adapter, and the norm of what was added to them."""

    model: PreTrainedModel
    adapted: list[torch.Tensor]
    update_norm: float


def merge(
    model_path: str, adapter: Path, *, load_in: Literal["nf4"] | None = None, dtype: str = "bfloat16"
) -> Merged:
    """The model in that folder with `W + scale * B @ A` for the weight W of every adapted layer, all in fp32.

    `load_in`: W is what the run trained beside, rounded to 4 bits from `dtype`. An adapter on the head or on the embedding
    changes that one alone: where the two share their weights, they do no longer.

    Raises:
        ValueError: the adapter does not fit the model, or a merged weight is not finite.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    from ...model.adapters import load_weights
    from ...model.base_model import nf4_names, round_to_nf4

    with quiet_stderr():
        base = cast("PreTrainedModel", AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32))
        if load_in == "nf4":
            round_to_nf4(base, nf4_names(model_path), getattr(torch, dtype))
    config = LoraConfig.from_pretrained(str(adapter))
    config.base_model_name_or_path = model_path  # it may have been elsewhere when the run saved the adapter
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # `_untie` sees to what this warns of
        peft_model = cast("PeftModel", get_peft_model(base, config))
    load_weights(peft_model, adapter)
    _untie(base)
    layers = [layer for layer in peft_model.modules() if isinstance(layer, LoraLayer)]
    adapted = [cast(Any, layer.get_base_layer()).weight for layer in layers]
    norms = [cast(Any, layer).get_delta_weight("default").norm().item() for layer in layers]
    merging: Any = peft_model
    model = merging.merge_and_unload(safe_merge=True)  # safe: refuses what is not finite
    return Merged(model, adapted, math.hypot(*norms))


def _untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own if it shares the embedding's and one of the two has an adapter."""
    import torch
    from peft.tuners.lora import LoraLayer

    embedding, head = (cast(Any, layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    is_adapted = isinstance(embedding, LoraLayer) or isinstance(head, LoraLayer)
    if not is_adapted or head.weight is not embedding.weight:
        return
    plain_head = head.get_base_layer() if isinstance(head, LoraLayer) else head
    plain_head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


# ------------------------------------------------------------------------------------------------------------- pieces


def _base_folder(trained: TrainedAdapter, say: Say) -> str:
    model = trained.config.model
    with log_to(say):
        return resolve_model(model.name, revision=model.revision)


def _own_dtype(model_path: str) -> str:
    """The dtype that the model's config.json names, `float32` where it names none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path)
    dtype = config.dtype or config.get_text_config().dtype
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")


def _cast(merged: Merged, dtype: str) -> float:
    """Round every parameter to `dtype`, once; returns the adapted weights' change over that of the merging.

    Raises:
        ValueError: a weight is too large for it.
    """
    import torch

    adapted, errors = {id(weight) for weight in merged.adapted}, []
    for name, parameter in merged.model.named_parameters():
        rounded = parameter.data.to(getattr(torch, dtype))
        if not rounded.isfinite().all():
            raise ValueError(f"{name} has a weight that is too large for {dtype}: take --dtype bfloat16 or float32")
        if id(parameter) in adapted:
            errors.append((rounded.float() - parameter.data).norm().item())
        parameter.data = rounded
    return math.hypot(*errors) / merged.update_norm if merged.update_norm else 0.0


def _save_model(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Config, weights and the base's own generation config, byte for byte: transformers would refuse to write some of them."""
    from transformers import GenerationConfig

    has_own = (base / GENERATION_FILE).is_file()
    if has_own:
        model.generation_config = GenerationConfig()
    with quiet_stderr():
        model.save_pretrained(folder)
    if has_own:
        shutil.copyfile(base / GENERATION_FILE, folder / GENERATION_FILE)


def _save_tokenizer(model_path: str, folder: Path) -> None:
    """The base model's tokenizer, chat template included."""
    from transformers import AutoTokenizer

    with quiet_stderr():
        AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)


def _check_output(output: Path, trained: TrainedAdapter, *, overwrite: bool) -> None:
    """See that `output` is free, or an earlier export that may be replaced: never a folder of something else."""
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} is there already: add --overwrite to replace it, or name another --output")
    card = output / CARD_FILE
    is_export = card.is_file() and EXPORT_MARK in card.read_text(encoding="utf-8")
    folders_in_use = (trained.folder.resolve(), Path(trained.config.model.name).expanduser().resolve())
    if not is_export or any(folder.is_relative_to(output.resolve()) for folder in folders_in_use):
        raise ValueError(f"{output} is no export that could be replaced: name another --output, or remove it yourself")
