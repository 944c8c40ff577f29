"""The frozen base model that a policy stands on, in no more memory than it needs.

    base = load_base(path, dtype=torch.bfloat16)                                  # a copy of its own
    base = load_base(path, dtype=torch.bfloat16, load_in="nf4")                   # its linear layers in 4 bits
    base = load_base(path, dtype=torch.bfloat16, shared=engine.base_weights())    # where it can, the sampler's own memory
    base.model, base.own_bytes, base.shared_bytes

A shared parameter is a view of vLLM's: nothing is loaded for it. A layer in 4 bits is read, rounded and forgotten before the
next one is read. `nf4_names` says which weights are rounded, so that the sampler rounds the same (`rollout/base_weights.py`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ...kernels.nf4 import Nf4Weight
from .lora_layers import Nf4Linear

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A loaded base.

    weights: its parameters by name, and the scales of those in 4 bits; for as long as it is used nobody may write into them.
    own: names of those that it holds itself, in `own_bytes`; all others lie in shared memory.
    """

    model: PreTrainedModel
    weights: Mapping[str, torch.Tensor]
    own: tuple[str, ...]
    own_bytes: int
    shared_bytes: int
    versions: tuple[int, ...]
    """How often torch had written into each of the weights when they were loaded."""
    checksums: tuple[int, ...]
    """Of each of the weights when they were loaded."""

    def written(self, *, thoroughly: bool = False) -> list[str]:
        """Names of the weights that were written into since then.

        By torch's counters, which see what torch's operations do through any view, but not through `.data`, and not what other
        kernels do; `thoroughly` reads all weights again.
        """
        found = [n for (n, w), version in zip(self.weights.items(), self.versions, strict=True) if w._version != version]
        if thoroughly and not found:
            found = [n for (n, w), was in zip(self.weights.items(), self.checksums, strict=True) if _checksum(w) != was]
        return found


def load_base(
    model_path: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    load_in: Literal["nf4"] | None = None,
    shared: Mapping[str, torch.Tensor] | None = None,
) -> BaseModel:
    """The model in a folder, in evaluation mode, with parameters that take no gradient.

    Args:
        dtype: of the weights that are not in 4 bits, and of what those in 4 bits stand for.
        load_in: "nf4": linear layers but for the head become `Nf4Linear`; those that `shared` has are taken as they are there.
        shared: tensors by parameter name that take the place of parameters, where shape, dtype and device are the same.

    Raises:
        ValueError: in NF4, the files of the model name weights otherwise than transformers does.
    """
    shared = shared or {}
    if load_in is None and not shared:
        return _loaded_plainly(model_path, dtype, device)
    files = _files_of_weights(Path(model_path))
    model = empty_model(model_path, dtype, files)
    rounded = set(_linear_weights(model)) if load_in == "nf4" else set()
    fitting = {name: shared[name] for name, p in model.named_parameters() if name in shared and _fits(shared[name], p, device)}
    for name in _changed_by_loading({n: t for n, t in fitting.items() if n not in rounded}, files):
        del fitting[name]
    own = [name for name, _ in model.named_parameters() if name not in fitting]
    unknown = [name for name in own if name not in files] + _saved_buffers(model)
    if unknown and load_in is not None:
        raise ValueError(_not_found(model_path, unknown[0], files))
    if unknown:
        return _loaded_plainly(model_path, dtype, device)
    for name, tensor in fitting.items():
        _set_parameter(model, name, tensor)
    for name, tensor in _read(files, own, device):
        if name in rounded:
            _set_nf4(model, name, Nf4Weight.quantise(tensor.to(dtype)))
        else:
            _set_parameter(model, name, tensor.to(dtype))
    _tie(model, files)
    nn.Module.to(model, device)  # its buffers
    return _described(model, fitting)


@functools.lru_cache(maxsize=8)
def nf4_names(model_path: str) -> tuple[str, ...]:
    """Names of the weights that `load_in="nf4"` rounds: those of all linear layers but the head.

    Raises:
        ValueError: the files of the model do not have one of them.
    """
    files = _files_of_weights(Path(model_path))
    names = tuple(_linear_weights(empty_model(model_path, torch.bfloat16, files)))
    for name in names:
        if name not in files:
            raise ValueError(_not_found(model_path, name, files))
    return names


def round_to_nf4(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    """Give a model of any dtype the values that its weights of these names have in 4 bits, made from `dtype`."""
    for name in names:
        weight = model.get_parameter(name)
        weight.data = Nf4Weight.quantise(weight.data.to(dtype)).dense().to(weight.dtype)


def empty_model(model_path: str, dtype: torch.dtype, files: Mapping[str, Path]) -> PreTrainedModel:
    """The model without memory for its parameters, which are on the meta device; its buffers are computed."""
    config = AutoConfig.from_pretrained(model_path)
    with init_empty_weights(include_buffers=False):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))
    _tie(model, files)
    return model


def _tie(model: PreTrainedModel, files: Mapping[str, Path]) -> None:
    """Let the head and the embedding share their weight where the model has it so.

    Not where the files have two that differ: then transformers and vLLM take them apart, whatever the configuration says.
    """
    ties: dict[str, str] = model.all_tied_weights_keys
    for target, source in ties.items():
        if target in files and source in files:
            (_, a), (_, b) = _read(files, [target, source], "cpu")
            if not torch.equal(a, b):
                return
    model.tie_weights()


def _not_found(model_path: str, name: str, files: Mapping[str, Path]) -> str:
    if not files:
        return f"model.load_in: {model_path} has no safetensors: convert the model, or leave this option out"
    where = f"the files of {model_path}"
    return f"model.load_in: {where} name weights otherwise than transformers (no {name}): leave this option out"


def _loaded_plainly(model_path: str, dtype: torch.dtype, device: str) -> BaseModel:
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype))
    nn.Module.to(model, device)
    return _described(model, {})


def _described(model: PreTrainedModel, shared: Mapping[str, torch.Tensor]) -> BaseModel:
    model.eval()
    model.requires_grad_(False)
    scales = {name: buffer for name, buffer in model.named_buffers() if name.endswith(f".{Nf4Linear.SCALES}")}
    weights = {**dict(model.named_parameters()), **scales}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}
    own = tuple(name for name in weights if name not in shared)
    return BaseModel(
        model=model,
        weights=weights,
        own=own,
        own_bytes=sum(sizes[name] for name in own),
        shared_bytes=sum(sizes[name] for name in shared),
        versions=tuple(tensor._version for tensor in weights.values()),
        checksums=tuple(_checksum(tensor) for tensor in weights.values()),
    )


def _checksum(weight: torch.Tensor) -> int:
    """The sum of its bits modulo 2^64, read as the widest whole numbers that fit: of narrow ones torch makes wide copies."""
    flat = weight.detach().reshape(-1)
    size, start = flat.numel() * flat.element_size(), flat.storage_offset() * flat.element_size()
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    width = next(width for width in kinds if size % width == start % width == 0)
    return int(flat.view(kinds[width]).sum(dtype=torch.int64).item())


# ------------------------------------------------------------------------------------------------------------- weights


def _fits(tensor: torch.Tensor, parameter: nn.Parameter, device: str) -> bool:
    return (tensor.shape, tensor.dtype, tensor.device.type) == (parameter.shape, parameter.dtype, torch.device(device).type)


def _changed_by_loading(shared: Mapping[str, torch.Tensor], files: Mapping[str, Path]) -> list[str]:
    """Names of the shared weights whose first or last row is not that of the files: vLLM keeps them in another form.

    The proof at the start of a run cannot see that: the trainer computes with them as vLLM does.
    """
    changed = []
    for name, tensor in shared.items():
        if name not in files:
            continue
        with safe_open(files[name], framework="pt") as file:  # each time anew, as in `_read`
            rows = file.get_slice(name)
            last = rows.get_shape()[0] - 1
            pairs = ((rows[:1], tensor[:1]), (rows[last:], tensor[last:]))
            if not all(torch.equal(row.to(tensor.device, tensor.dtype), held) for row, held in pairs):
                changed.append(name)
    return changed


def _linear_weights(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    return [f"{name}.weight" for name in layers]


def _saved_buffers(model: PreTrainedModel) -> list[str]:
    """Buffers that belong to the weights. Nothing here reads them."""
    return sorted({name for name, _ in model.named_buffers()} & set(model.state_dict()))


def _set_parameter(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(owner), own_name, nn.Parameter(tensor, requires_grad=False))


def _set_nf4(model: PreTrainedModel, name: str, weight: Nf4Weight) -> None:
    layer_name = name.rpartition(".")[0]
    model.set_submodule(layer_name, Nf4Linear(weight, cast(nn.Linear, model.get_submodule(layer_name)).bias))


def _files_of_weights(folder: Path) -> dict[str, Path]:
    """Which file holds each weight."""
    if (folder / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / SINGLE_FILE).is_file():
        return {}
    with safe_open(folder / SINGLE_FILE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE_FILE)


def _read(files: Mapping[str, Path], names: Sequence[str], device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight. On CPU it is the file itself, mapped into memory."""
    for name in names:
        # Opened each time: what is mapped through one opening stays resident until all of it is forgotten.
        with safe_open(files[name], framework="pt", device=device) as file:
            yield name, file.get_tensor(name)
