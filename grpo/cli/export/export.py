"""The command `rankup export`: write the adapter of a run, or its base model with the adapter merged into it, to a folder to
share or to serve.

    rankup export runs/quickstart                               # runs/quickstart/export/adapter: PEFT's format
    rankup export runs/quickstart --merge                       # runs/quickstart/export/merged: a transformers model
    rankup export runs/quickstart/checkpoints/step_000010 --merge --dtype float32 --output mine
    rankup export runs/quickstart --gguf                        # runs/quickstart/export/gguf: the merged model for llama.cpp

All come with the tokenizer and a model card (`model_card.py`). Merging computes in fp32 and casts once. The output folder is
written atomically; the base model's files are not changed.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import warnings
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ...common.files import atomic_folder
from ...common.log import log_to, logger
from ...common.model_files import hub_id, resolve_model
from ...common.quiet import quiet_stderr
from ..command import add_command
from .model_card import TrainedAdapter, model_card, read_run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["adapter", "merged", "gguf"]
DTYPES = ("auto", "float32", "bfloat16", "float16")
GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"
LARGE_ROUNDING = 0.5  # of the update: 0.9 has lost a part of the reward gain, 0.49 has not (docs/export.md)
EXPORT_TAG = "\n- rankup\n"  # a tag of our cards, which marks a folder as an export
EXAMPLES = """examples:
  rankup export runs/quickstart                          the adapter in PEFT's format, with tokenizer and model card
  rankup export runs/quickstart --merge                  a plain transformers model, in the base model's dtype
  rankup export runs/quickstart --merge --dtype float32 --output merged
  rankup export runs/quickstart --gguf                   the merged model as a GGUF file, for llama.cpp
"""

# ------------------------------------------------------------------------------------------------------- command line


def add_export_command(commands: Any) -> None:
    """Add `export` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "write a run's adapter, or the model with it merged in, to share or to serve"
    add = add_command(commands, "export", text, examples=EXAMPLES, run=export).add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or a folder checkpoints/step_<N> of one")
    add("--merge", action="store_true", help="merge the adapter into the base model")
    add("--gguf", action="store_true", help="merge, and write one GGUF file for llama.cpp (Llama, Qwen2 and Qwen3)")
    add("--output", type=Path, metavar="FOLDER", help="default RUN/export/adapter, RUN/export/merged or RUN/export/gguf")
    add("--dtype", choices=DTYPES, default="auto", help="type of merged weights (default auto: that of the base model)")
    add("--overwrite", action="store_true", help="replace an existing export")


def export(options: argparse.Namespace) -> int:
    """`rankup export RUN [--merge | --gguf] [--output FOLDER] [--dtype DTYPE] [--overwrite]`"""
    if options.merge and options.gguf:
        raise ValueError("--gguf merges too: give one of --merge and --gguf, and export twice for both")
    kind: Kind = "gguf" if options.gguf else "merged" if options.merge else "adapter"
    if options.dtype != "auto" and kind == "adapter":
        raise ValueError("--dtype needs --merge or --gguf: an adapter is exported in float32, the dtype of training")
    trained = read_run(options.run)
    output: Path = options.output or default_output(trained, options.run, kind)
    with log_to(lambda text: print(f"{text} ...", flush=True)):
        if kind != "adapter":
            as_gguf = kind == "gguf"
            rounding = export_merged(trained, output, dtype=options.dtype, overwrite=options.overwrite, as_gguf=as_gguf)
        else:
            export_adapter(trained, output, overwrite=options.overwrite)
            rounding = 0.0
    if rounding > LARGE_ROUNDING:
        print(
            f"note: rounding the merged weights is {rounding:.2f}x the trained change: evaluate the merged model, or use "
            "--dtype float16 or float32"
        )
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output} ({size / 2**20:,.1f} MiB)")
    if trained.config.model.load_in == "nf4" and kind == "adapter":
        print(
            "note: the adapter was trained on the base in NF4. On the base in its original dtype, which vLLM serves, it is a "
            "different policy: `rankup export RUN --merge` writes the model that was trained"
        )
        return 0
    print(f"serve it: {shlex.join(_serve_command(trained, output, kind))}")
    return 0


def default_output(trained: TrainedAdapter, run: Path, kind: Kind) -> Path:
    """`RUN/export/<kind>`; `RUN/export/step_<N>-<kind>` for a checkpoint, which the run may delete with everything in it."""
    folder = run.resolve()
    return run / "export" / kind if trained.step is None else folder.parents[1] / "export" / f"{folder.name}-{kind}"


def _serve_command(trained: TrainedAdapter, output: Path, kind: Kind) -> list[str]:
    if kind == "merged":
        return ["vllm", "serve", str(output)]
    if kind == "gguf":
        return ["llama-server", "-m", str(output / gguf_name(trained))]
    model = trained.config.model
    base = hub_id(model.name)
    where = [resolve_model(model.name)] if base is None else [base, *(["--revision", model.revision] if model.revision else [])]
    rank = str(trained.config.lora.max_rank)
    return ["vllm", "serve", *where, "--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"policy={output}"]


# ------------------------------------------------------------------------------------------------------------ exports


def export_adapter(trained: TrainedAdapter, output: Path, *, overwrite: bool = False) -> None:
    """Write the adapter in PEFT's format (fp32), the run's tokenizer and a model card to the folder `output`.

    The configuration names the base model by its Hub id, or by its bare name if it is not from the Hub.

    Raises:
        ValueError: no such base model, or `output` exists already (`overwrite` replaces an earlier export, nothing else).
    """
    from ...data.tokenizers import copy_tokenizer  # in the functions: it imports transformers, which takes seconds

    _check_output(output, trained, overwrite=overwrite)
    model_path = _base_folder(trained)
    with atomic_folder(output.resolve()) as partial:
        config = json.loads((trained.folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = trained.base_name
        config["revision"] = trained.config.model.revision
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(trained.folder / "adapter_model.safetensors", partial / "adapter_model.safetensors")
        copy_tokenizer(trained.config, model_path, partial)
        (partial / CARD_FILE).write_text(model_card(trained), encoding="utf-8")


def export_merged(
    trained: TrainedAdapter, output: Path, *, dtype: str = "auto", overwrite: bool = False, as_gguf: bool = False
) -> float:
    """Write the base model with the adapter merged into it, the run's tokenizer and a model card to the folder `output`.

    With `as_gguf` model and tokenizer are one GGUF file, with the same weights.

    Returns the change of the adapted weights by rounding to the dtype, relative to their change by training (Frobenius norms
    over all of them).

    dtype: `float32`, `bfloat16`, `float16`, or `auto`: that in the base model's config.json, else float32.

    Raises:
        ValueError: no such base model, the adapter does not fit it, weights that are not finite (in that dtype), `output`
            exists already, or GGUF cannot hold a model of this kind.
    """
    from ...data.tokenizers import copy_tokenizer
    from .gguf_file import write_gguf

    _check_output(output, trained, overwrite=overwrite)
    model_path = _base_folder(trained)
    tokenizer = _checked_tokenizer(trained, model_path) if as_gguf else None
    logger.info("loading %s and merging the adapter, in float32", trained.base_name)
    model_config = trained.config.model
    merged = merge(model_path, trained.folder, load_in=model_config.load_in, dtype=model_config.dtype)
    stored_as = _base_dtype(model_path) if dtype == "auto" else dtype
    rounding = _cast(merged, stored_as)
    with atomic_folder(output.resolve()) as partial:
        logger.info("writing the weights in %s", stored_as)
        if tokenizer is not None:
            write_gguf(merged.model, tokenizer, partial / gguf_name(trained), dtype=stored_as, name=trained.name)
        else:
            _save_model(merged.model, Path(model_path), partial)
            copy_tokenizer(trained.config, model_path, partial)
        card = model_card(trained, merged_dtype=stored_as, gguf=gguf_name(trained) if as_gguf else None)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
    return rounding


def gguf_name(trained: TrainedAdapter) -> str:
    """The name of the file."""
    return f"{trained.name.replace('/', '-')}.gguf"


def _checked_tokenizer(trained: TrainedAdapter, model_path: str) -> PreTrainedTokenizerFast:
    """The run's tokenizer. ValueError if it or the model cannot be written as GGUF."""
    from transformers import AutoConfig

    from ...data.tokenizers import load_tokenizer
    from .gguf_file import check_supported

    tokenizer = load_tokenizer(trained.config, model_path)
    check_supported(AutoConfig.from_pretrained(model_path), tokenizer)
    return cast("PreTrainedTokenizerFast", tokenizer)


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model, its weights that had an adapter, and the norm of the updates that were added to them."""

    model: PreTrainedModel
    adapted: list[torch.Tensor]
    update_norm: float


def merge(model_path: str, adapter: Path, *, load_in: Literal["nf4"] | None = None, dtype: str = "bfloat16") -> Merged:
    """The model in that folder with `W + scale * B @ A` for the weight W of every adapted layer, all in fp32.

    With `load_in`, W is the dequantized weight that the run trained with, quantized from `dtype`. An adapter on the head or on
    the embedding changes only that one: if the two shared their weights, they no longer do.

    Raises:
        ValueError: the adapter does not fit the model, or a merged weight is not finite.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    from ...model.adapters import load_weights
    from ...model.base_model import load_plainly, round_to_nf4

    with quiet_stderr():
        base = load_plainly(model_path, torch.float32)
        if load_in == "nf4":
            round_to_nf4(base, model_path, getattr(torch, dtype))
    config = LoraConfig.from_pretrained(str(adapter))
    config.base_model_name_or_path = model_path  # its path may have been another when the run saved the adapter
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # `_untie` does what this asks for
        peft_model = cast("PeftModel", get_peft_model(base, config))
    load_weights(peft_model, adapter)
    _untie(base)
    layers = [layer for layer in peft_model.modules() if isinstance(layer, LoraLayer)]
    adapted = [cast(Any, layer.get_base_layer()).weight for layer in layers]
    norms = [cast(Any, layer).get_delta_weight("default").norm().item() for layer in layers]
    merging: Any = peft_model
    model = merging.merge_and_unload(safe_merge=True)  # safe: refuses weights that are not finite
    return Merged(model, adapted, math.hypot(*norms))


def _untie(model: PreTrainedModel) -> None:
    """Give the head separate weights if it shares those of the embedding and one of the two has an adapter."""
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


def _base_folder(trained: TrainedAdapter) -> str:
    model = trained.config.model
    return resolve_model(model.name, revision=model.revision)


def _base_dtype(model_path: str) -> str:
    """The dtype in the model's config.json, else `float32`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path)
    dtype = config.dtype or config.get_text_config().dtype
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")


def _cast(merged: Merged, dtype: str) -> float:
    """Round every parameter to `dtype`, once; returns the change of the adapted weights relative to that of merging.

    Raises:
        ValueError: a weight is too large for it.
    """
    import torch

    adapted, errors = {id(weight) for weight in merged.adapted}, []
    for name, parameter in merged.model.named_parameters():
        rounded = parameter.data.to(getattr(torch, dtype))
        if not rounded.isfinite().all():
            raise ValueError(f"{name} has a weight that is too large for {dtype}: use --dtype bfloat16 or float32")
        if id(parameter) in adapted:
            errors.append((rounded.float() - parameter.data).norm().item())
        parameter.data = rounded
    return math.hypot(*errors) / merged.update_norm if merged.update_norm else 0.0


def _save_model(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Config, weights, and unmodified copies of files of the base.

    These are the generation config, of which transformers refuses to write some, and what a checkpoint with a vision tower has
    to prepare images.
    """
    from transformers import GenerationConfig

    has_generation_config = (base / GENERATION_FILE).is_file()
    if has_generation_config:
        model.generation_config = GenerationConfig()
    with quiet_stderr():
        model.save_pretrained(folder)
    if has_generation_config:
        shutil.copyfile(base / GENERATION_FILE, folder / GENERATION_FILE)
    for path in base.glob("*processor_config.json"):
        shutil.copyfile(path, folder / path.name)


def _check_output(output: Path, trained: TrainedAdapter, *, overwrite: bool) -> None:
    """Raise ValueError unless `output` is free, or an earlier export that may be replaced."""
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists already: add --overwrite to replace it, or give another --output")
    card = output / CARD_FILE
    is_export = card.is_file() and EXPORT_TAG in card.read_text(encoding="utf-8")
    folders_in_use = (trained.folder.resolve(), Path(expanduser(trained.config.model.name)).resolve())
    if not is_export or any(folder.is_relative_to(output.resolve()) for folder in folders_in_use):
        raise ValueError(f"{output} is not an export, so it is not replaced: give another --output, or remove it yourself")
