"""Which files of a folder hold a model's weights: one answer for transformers, vLLM, plans and exports.

    found = find_weights(Path("path/to/model"))
    found.names, found.others                   # ("model-00001-of-00002.safetensors", ...), ("model.safetensors",)
    check_weights("my model", folder)           # every file and every weight of the index is there
    files_of_weights(folder)["lm_head.weight"]  # the file that holds it

By themselves, transformers prefers `model.safetensors` to an index of shards, and vLLM `consolidated.safetensors`, then an
index, then everything that ends in `.safetensors`. Here the index decides, then `model.safetensors`; both are told the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that are not quantized, by their names in safetensors."""
QUANTIZATIONS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4"}
"""How methods in `quantization_config` are written in messages."""
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files of older tools that say how a model was quantized (AutoGPTQ, AutoAWQ, ModelOpt)."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The names of the files in a folder that hold its model's weights, none if there are none.

    others: names of further files that transformers or vLLM could take for weights. has_index: whether an index of safetensors
    names the files.
    """

    names: tuple[str, ...]
    others: tuple[str, ...]
    has_index: bool


def find_weights(folder: Path) -> WeightFiles:
    """The files that hold the weights: those of the index, else `model.safetensors`, else pickled ones.

    Raises:
        ValueError: the index is damaged.
    """
    has_index = (folder / INDEX).is_file()
    if has_index:
        names = sorted(set(_weight_map(folder / INDEX).values()))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / PICKLED).is_file():
        names = [PICKLED]
    else:
        names = sorted(set(_weight_map(folder / PICKLED_INDEX).values())) if (folder / PICKLED_INDEX).is_file() else []
    others = {path.name for pattern in ("*.safetensors", "*.bin", "*.pt") for path in folder.glob(pattern)} - set(names)
    return WeightFiles(tuple(names), tuple(sorted(others)), has_index)


def check_weights(model: str, folder: Path) -> None:
    """Check that the weights of a model are complete and not quantized, from the headers of their files.

    Raises:
        ValueError: there are none, one is missing, in two files or quantized, or a file is missing or damaged.
    """
    try:
        found = find_weights(folder)
        if not found.names:
            hint = f" (it has {found.others[0]})" if found.others else ""
            raise ValueError(f"the folder has no {SINGLE} and no {INDEX}{hint}: save the model with transformers")
        missing = [name for name in found.names if not (folder / name).is_file()]
        if missing:
            stale = f", or remove {INDEX} if {SINGLE} is the model" if SINGLE in found.others else ""
            raise ValueError(f"the index names {missing[0]}, which is missing: download or copy the model again{stale}")
        if (folder / PICKLED).is_file() and (folder / PICKLED_INDEX).is_file() and found.names[0].endswith(".bin"):
            raise ValueError(f"the folder has {PICKLED} and {PICKLED_INDEX}: remove the one that is not the model")
        files = files_of_weights(folder)
        if found.has_index:
            for name, file in _weight_map(folder / INDEX).items():
                if name not in files or files[name].name != file:
                    raise ValueError(f"the index names {name} in {file}, which does not have it: download or copy it again")
    except ValueError as error:
        raise ValueError(f"model {model}: {error}") from error


def files_of_weights(folder: Path) -> dict[str, Path]:
    """Which file holds each weight, by the headers of the files; none if they are not safetensors.

    Raises:
        ValueError: a file is missing or damaged, a weight is in two files, or a weight is quantized.
    """
    from safetensors import SafetensorError, safe_open

    files: dict[str, Path] = {}
    for path in (folder / name for name in find_weights(folder).names if name.endswith(".safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    if name in files:
                        raise ValueError(f"{name} is in {files[name].name} and in {path.name}: keep one of them")
                    kind = file.get_slice(name).get_dtype()
                    if kind not in FLOATS and name.endswith("weight"):
                        raise ValueError(_quantized(f"{name} is in {kind}"))
                    files[name] = path
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} is damaged or missing: {first_line(error)}") from error
    return files


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if not all(isinstance(file, str) for file in found.values()):
            raise TypeError("its weight_map has other things than names of files")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index.name} is damaged: {first_line(error)}") from error
    return found


# -------------------------------------------------------------------------------------------------------- quantization


def refuse_quantized(model: str, folder: Path) -> None:
    """Raise ValueError if the configuration of a model says that its weights are quantized."""
    method = quantization_of(folder)
    if method is not None:
        raise ValueError(f"model {model}: {_quantized(method)}")


def quantization_of(folder: Path) -> str | None:
    """How the weights of a model are quantized; None if they are not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever reads it next says so
        return None
    parts = [config, *(part for part in config.values() if isinstance(part, dict))] if isinstance(config, dict) else []
    for part in parts:
        found: Any = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict):
            return _described(found)
    return next((f"it has a {name}" for name in QUANTIZATION_FILES if (folder / name).is_file()), None)


def _described(config: Mapping[str, Any]) -> str:
    method = str(config.get("quant_method") or "quantization_config in its config.json")
    bits = config.get("bits") or (4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None)
    return QUANTIZATIONS.get(method, method) + (f", {bits} bits" if bits else "")


def _quantized(how: str) -> str:
    return (
        f"its weights are quantized already ({how}), and training needs the original ones: set model.name to the model that it "
        "was made from (model.load_in=nf4 rounds that one to 4 bits)"
    )
