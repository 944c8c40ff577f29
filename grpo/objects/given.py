"""What TRL's `GRPOTrainer` takes as objects, as this package's configuration.

    given = from_objects(config, model=peft_model, processing_class=tokenizer)
    given.config        # model.name, model.dtype, model.load_in, model.tokenizer, lora.* are set
    given.notes         # one line each for the user; `given.config.notes` has them too, so a run shows them

Objects are read, saved to the user's cache where no file has the same content, and not kept: the trained model is
`trainer.model`, not the object that was passed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..common.model_files import resolve_model
from ..config import GRPOConfig, ModelConfig, with_options
from .adapter import adapter_name, base_model_of, save_adapter
from .base import base_of, num_embeddings
from .peft_config import check_agreement, lora_options, without_effect
from .quantization import quantization
from .targets import Structure, structure_of, structure_of_files
from .tokenizer import check_ids, fingerprint, own_tokenizer, save_tokenizer, tokenizer_of
from .weights import wrapped_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The configuration with the objects' options and notes, and the notes alone."""

    config: GRPOConfig
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Options:
    """Options of the sections `model` and `lora` as they are found, and notes."""

    model: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tokenizer_is_given: bool = False


def from_objects(
    config: GRPOConfig,
    *,
    model: str | PreTrainedModel | PeftModel | None = None,
    peft_config: PeftConfig | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> Given:
    """The configuration of a run with these arguments of `GRPOTrainer`. None: what the configuration says.

    A model object is not modified, and training works on a copy of it.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is not supported, or contradicts another one or the configuration; the message says what to do.
    """
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError(
            "peft_config: the model is a PeftModel already: pass it alone to train its adapter, or merge it with "
            "merge_and_unload, and pass the result with peft_config"
        )
    found = _Options()
    tokenizer = None
    if processing_class is not None:
        tokenizer, notes = tokenizer_of(processing_class)
        found.notes += notes
    _add_model(found, config.model, model, tokenizer)
    if quantization_config is not None:
        _add_quantization(found, config.model, model, quantization_config)
    name = found.model.get("name", config.model.name)
    revision = found.model.get("revision", config.model.revision)
    if tokenizer is not None and not found.tokenizer_is_given:
        _add_tokenizer(found, tokenizer, model, name, revision)
    if peft_config is not None:
        found.lora |= lora_options(peft_config, _structure(model, name, revision))
        check_agreement(config.lora, found.lora)
        found.notes += without_effect(peft_config)
    elif config.has_trl_batch and not (config.lora.model_fields_set or found.lora):
        lora = config.lora
        found.notes.append(f"training a LoRA adapter of rank {lora.rank} on {lora.targets} (peft_config sets another)")
    options = {section: values for section, values in (("model", found.model), ("lora", found.lora)) if values}
    return Given(config=with_options(config, options, notes=found.notes), notes=tuple(found.notes))


def _add_model(
    found: _Options,
    config: ModelConfig,
    model: str | PreTrainedModel | PeftModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if model is None:
        return
    if isinstance(model, str):
        found.model["name"] = model
        return
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(
            f"model must be a name, a transformers.PreTrainedModel or a peft.PeftModel (got {type(model).__name__})"
        )
    if isinstance(model, PreTrainedModel) and wrapped_layers(model):
        raise ValueError("model: has layers of PEFT: pass the PeftModel, or the model before get_peft_model and add_adapter")
    adapter = adapter_name(model) if isinstance(model, PeftModel) else None
    base = base_of(base_model_of(model) if isinstance(model, PeftModel) else model, config, tokenizer)
    found.model |= {"name": base.name, "revision": base.revision, "dtype": base.dtype, "load_in": base.load_in}
    if base.tokenizer_is_given:
        found.tokenizer_is_given, found.model["tokenizer"] = True, None
    found.notes += base.notes
    if isinstance(model, PeftModel) and adapter is not None:
        folder = save_adapter(model, adapter, base=base.name)
        found.lora["start_from"] = str(folder)
        found.notes.append(f"model: training starts from its adapter, saved in {folder}")
        found.notes += without_effect(model.peft_config[adapter])


def _add_quantization(
    found: _Options,
    config: ModelConfig,
    model: str | PreTrainedModel | PeftModel | None,
    quantization_config: QuantizationConfigMixin,
) -> None:
    if isinstance(model, PreTrainedModel | PeftModel):
        found.notes.append("quantization_config: no effect, as in TRL; the model is loaded already")
        return
    load_in, notes = quantization(quantization_config, dtype=config.dtype)
    if "load_in" in config.model_fields_set and config.load_in != load_in:
        raise ValueError(
            f"quantization_config: is {load_in}, and the configuration sets model.load_in to {config.load_in}: keep one of them"
        )
    found.model["load_in"] = load_in
    found.notes += notes


def _add_tokenizer(
    found: _Options,
    tokenizer: PreTrainedTokenizerBase,
    model: str | PreTrainedModel | PeftModel | None,
    name: str,
    revision: str | None,
) -> None:
    own, content = own_tokenizer(name, revision), fingerprint(tokenizer)
    if own is not None and fingerprint(own) == content:
        found.model["tokenizer"] = None
        return
    if isinstance(model, PreTrainedModel | PeftModel):
        base = model if isinstance(model, PreTrainedModel) else base_model_of(model)
        config, embeddings = base.config, num_embeddings(base)
    else:
        config = AutoConfig.from_pretrained(resolve_model(name, revision=revision, config_only=True))
        embeddings = config.get_text_config().vocab_size
    check_ids(tokenizer, embeddings=embeddings, own=lambda: own)
    folder = save_tokenizer(tokenizer, content, model_type=config.model_type)
    found.model["tokenizer"] = str(folder)
    found.notes.append(f"processing_class: differs from the model's tokenizer, so it is saved in {folder}")


def _structure(
    model: str | PreTrainedModel | PeftModel | None, name: str, revision: str | None
) -> Callable[[], Structure]:
    """What finds the modules of the model, once they are needed."""
    if isinstance(model, PreTrainedModel):
        return lambda: structure_of(model)
    return lambda: structure_of_files(resolve_model(name, revision=revision, config_only=True))
