"""A model object as files: those that it was loaded from if it is unchanged, else a folder in the user's cache.

    base = base_of(model, config.model, tokenizer)
    base.name, base.revision, base.dtype, base.load_in      # options of the section `model`

vLLM and the trainer read the same files. The object is neither changed nor kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ...rollout.model_classes import check_class, has_tower
from ..common.quiet import quiet_stderr
from ..common.weight_files import files_of_weights, quantization_of
from ..config import ModelConfig
from ..model.saved_weights import saved_weights
from .cache import Digest, cached_folder, new_folder, size_of
from .found import LocalCopy, comparable, different_weight, is_same_model, local_copies
from .quantization import quantization
from .tokenizer import check_ids, fingerprint, load_tokenizer, own_tokenizer, write_tokenizer
from .weights import DTYPES, SUPPORTED, plain_weights, run_dtype, tied_names, without_ties

MAX_SHARD_SIZE = "4GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Options of the section `model`, and notes for the user.

    Attributes:
        tokenizer_is_given: whether the folder was written with the tokenizer that the user passed.
    """

    name: str
    revision: str | None
    dtype: str
    load_in: str | None
    notes: tuple[str, ...]
    tokenizer_is_given: bool = False


def base_of(model: PreTrainedModel, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> Base:
    """The files of a model, without its adapters. Written to the cache if no local folder has the same model.

    Args:
        tokenizer: the one that the user passed, for the files; None: that of the model's name.

    Raises:
        ValueError: the model is not a causal language model, its weights are not in memory or not of a supported dtype, it is
            quantized otherwise than to NF4 by bitsandbytes, or there is no tokenizer.
    """
    _check_class(model)
    weights = plain_weights(model)
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError("model: some of its weights are not in memory (meta device): load it without offloading")
    if getattr(model, "hf_quantizer", None) is not None:
        return _nf4_base(model, weights, config)
    dtype, notes = run_dtype(weights, config)
    for found in local_copies(model.name_or_path):
        if is_same_model(model, weights, found.folder, dtype=getattr(torch, dtype)):
            if not (tokenizer or config.tokenizer) and own_tokenizer(found.name, found.revision) is None:
                raise ValueError(_no_tokenizer(found.name))
            return Base(name=found.name, revision=found.revision, dtype=dtype, load_in=config.load_in, notes=notes)
    if tokenizer is not None:
        check_ids(tokenizer, embeddings=num_embeddings(model), own=lambda: _own(model))
    folder = _save(model, weights, tokenizer or _configured(config))
    why = "the object has no files"
    if model.name_or_path:
        why = f"the object differs from the files of {model.name_or_path}, or its weights have other names in them"
    notes = (*notes, f"model: {why}: saved in {folder} ({size_of(folder)})")
    is_given = tokenizer is not None
    return Base(
        name=str(folder), revision=None, dtype=dtype, load_in=config.load_in, notes=notes, tokenizer_is_given=is_given
    )


def _check_class(model: PreTrainedModel) -> None:
    check_class(model.config)
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if has_tower(model.config) else MODEL_FOR_CAUSAL_LM_MAPPING
    loaded = mapping.get(type(model.config), ())
    classes = loaded if isinstance(loaded, tuple) else (loaded,)
    if type(model) not in classes:
        raise ValueError(
            f"model: a {type(model).__name__} is not a causal language model of transformers: load one with "
            + ("AutoModelForImageTextToText" if has_tower(model.config) else "AutoModelForCausalLM")
        )


def _nf4_base(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], config: ModelConfig) -> Base:
    """The files of a model that bitsandbytes quantized while it was loaded: they are read and rounded again."""
    loaded_in = str(model.config.dtype or model.dtype).removeprefix("torch.")
    dtype = config.dtype if "dtype" in config.model_fields_set else loaded_in
    if dtype not in DTYPES.values():
        raise ValueError(f"model: was loaded in {dtype}: load it with {SUPPORTED}")
    load_in, notes = quantization(model.config.quantization_config, dtype=dtype)
    name = model.name_or_path
    if not name:
        raise ValueError("model: is quantized, and its original weights have no name: pass the folder or the Hub id")
    found = next(local_copies(name), LocalCopy(Path(name), name, config.revision))
    if (found.folder / "config.json").is_file():
        if quantization_of(found.folder) is not None:
            raise ValueError(f"model: the files of {name} are quantized: pass the original model, with quantization_config")
        saved = saved_weights(model, files_of_weights(found.folder))
        plain = sorted(n for n in weights.keys() & saved.files.keys() if weights[n].is_floating_point())
        if not plain:
            raise ValueError(
                f"model: is quantized, and none of its weights is called as in the files of {name}: pass the model before "
                "quantization, and set model.load_in=nf4"
            )
        changed = different_weight(weights, saved, plain, dtype=getattr(torch, dtype))
        if changed is not None:
            raise ValueError(
                f"model: is quantized, and its {changed} differs from the files of {name}: pass the model before quantization, "
                "and set model.load_in=nf4"
            )
    notes = (*notes, f"model: its linear layers are read from {name} again, and rounded to NF4")
    return Base(name=found.name, revision=found.revision, dtype=dtype, load_in=load_in, notes=notes)


def _save(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase | None) -> Path:
    """The folder in the cache that has this model and tokenizer; written if it is not there."""
    of_name = tokenizer or _own(model)
    if of_name is None:
        raise ValueError(_no_tokenizer(model.name_or_path or "the model"))
    unique = without_ties(model, weights)
    shell = _shell_of(model, weights)
    digest = Digest()
    digest.add("config", repr(sorted(comparable(shell.config).items())).encode())
    digest.add("generation", _generation(model).to_json_string().encode())
    digest.add("tokenizer", fingerprint(of_name).encode())
    for name in sorted(unique):
        digest.add_tensor(name, unique[name])
    folder = cached_folder("models", Path(model.name_or_path or type(model).__name__).name, digest)
    with new_folder(folder) as partial:
        if partial is not None:
            with quiet_stderr():
                shell.save_pretrained(partial, state_dict=unique, max_shard_size=MAX_SHARD_SIZE)
            # Written as it is: transformers refuses to save some that it loads.
            (partial / "generation_config.json").write_text(_generation(model).to_json_string(), encoding="utf-8")
            write_tokenizer(of_name, partial)
    return folder


def _shell_of(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the same class and configuration without weights, which transformers can save with those of the object.

    Raises:
        ValueError: the object has other weights than its configuration says.
    """
    config = copy.deepcopy(model.config)
    if model.all_tied_weights_keys.keys() - tied_names(model, weights):  # vLLM would tie them again
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    with init_empty_weights(include_buffers=False):
        shell = type(model)._from_config(config, dtype=dtype)
    shell.generation_config = GenerationConfig()
    expected = {name: tensor.shape for name, tensor in shell.state_dict().items()}
    misfits = sorted(name for name, _ in {n: t.shape for n, t in weights.items()}.items() ^ expected.items())
    if misfits:
        raise ValueError(f"model: its weights do not fit its class {type(model).__name__} and its config, see {misfits[0]}")
    return shell


def num_embeddings(model: PreTrainedModel) -> int:
    """The number of tokens that the model has input embeddings for."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def _own(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    return own_tokenizer(model.name_or_path, None) if model.name_or_path else None


def _configured(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    return None if config.tokenizer is None else load_tokenizer(config.tokenizer)


def _generation(model: PreTrainedModel) -> GenerationConfig:
    return model.generation_config or GenerationConfig.from_model_config(model.config)


def _no_tokenizer(name: str) -> str:
    return f"model: {name} has no tokenizer, which sampling needs: pass processing_class"
