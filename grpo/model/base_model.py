"""The frozen base model of a policy, in no more memory than it needs.

    base = load_base(path, dtype=torch.bfloat16)                                  # a separate copy
    base = load_base(path, dtype=torch.bfloat16, load_in="nf4")                   # linear layers in 4 bits
    base = load_base(path, dtype=torch.bfloat16, shared=engine.base_weights())    # on the sampler's weights where possible
    base.model, base.unshared_bytes, base.shared_bytes

A shared parameter is a view of vLLM's: nothing is loaded for it. A layer in 4 bits is read, rounded and freed before the next
one is read. `nf4_names` lists the weights that are rounded, so that the sampler rounds the same (`rollout/base_weights.py`).
Under torch's `FakeTensorMode` no file of weights is read: the parameters have shapes and no values.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._guards import detect_fake_mode
from transformers import AutoConfig, PreTrainedModel

from ...kernels.nf4 import BLOCKSIZE, Nf4Weight
from ...rollout.model_classes import auto_class, build_model, has_tower, without_towers
from ..common.weight_files import INDEX, files_of_weights, find_weights
from .lora_layers import Nf4Linear
from .saved_weights import SavedWeights, saved_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A loaded base.

    weights: its parameters by name, and the scales of those in 4 bits. They are read-only for as long as the base is used.
    unshared: names of those that only the trainer holds, `unshared_bytes` in total; the others are shared with the sampler.
    """

    model: PreTrainedModel
    weights: Mapping[str, torch.Tensor]
    unshared: tuple[str, ...]
    unshared_bytes: int
    shared_bytes: int
    versions: tuple[int, ...]
    """torch's write counter of each weight at the time of loading."""
    checksums: tuple[int, ...]
    """Of each weight at the time of loading; empty on fake tensors."""

    def written(self, *, thoroughly: bool = False) -> list[str]:
        """Names of the weights that were written into since then.

        By torch's counters, which count writes by torch's operations through any view, but neither writes through `.data` nor
        writes by other kernels; `thoroughly` also compares checksums of all weights.
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
        dtype: of the weights that are not in 4 bits, and of the dequantized values of the others.
        load_in: "nf4": linear layers except the head become `Nf4Linear`; shared ones stay unpacked.
        shared: tensors by parameter name that replace parameters of the same shape, dtype and device. Not on fake tensors.

    Raises:
        ValueError: in NF4, the model's files name weights differently from transformers; or a weight is not finite in `dtype`.
    """
    if detect_fake_mode() is not None:
        return _without_values(model_path, dtype, load_in)
    shared = shared or {}
    if load_in is None and not shared and not has_tower(AutoConfig.from_pretrained(model_path)):
        return _loaded_plainly(model_path, dtype, device)
    files = files_of_weights(Path(model_path))
    model = empty_model(model_path, dtype, files)
    saved = saved_weights(model, files)
    rounded = set(_linear_weights(model)) if load_in == "nf4" else set()
    fitting = {name: shared[name] for name, p in model.named_parameters() if name in shared and _fits(shared[name], p, device)}
    for name in _changed_by_loading({n: t for n, t in fitting.items() if n not in rounded}, saved):
        del fitting[name]
    unshared = [name for name, _ in model.named_parameters() if name not in fitting]
    unknown = [name for name in unshared if name not in saved] + _saved_buffers(model)
    if unknown and load_in is not None:
        raise ValueError(_not_found(model_path, unknown[0], files))
    if unknown:
        return _loaded_plainly(model_path, dtype, device)
    for name, tensor in fitting.items():
        _set_parameter(model, name, tensor)
    for name, tensor in saved.read(unshared, device):
        if name in rounded:
            _set_nf4(model, name, Nf4Weight.quantise(tensor.to(dtype)))
        else:
            _set_parameter(model, name, tensor.to(dtype))
    _tie(model, saved)
    nn.Module.to(model, device)  # its buffers
    return _described(model, fitting)


@functools.lru_cache(maxsize=8)
def nf4_names(model_path: str) -> tuple[str, ...]:
    """Names in the files of the weights that `load_in="nf4"` rounds: those of all linear layers except the head.

    Raises:
        ValueError: the files of the model do not have one of them.
    """
    files = files_of_weights(Path(model_path))
    model = empty_model(model_path, torch.bfloat16, files)
    names, saved = _linear_weights(model), saved_weights(model, files)
    for name in names:
        if name not in saved:
            raise ValueError(_not_found(model_path, name, files))
    return tuple(saved.keys[name] for name in names)


def saved_weight(model_path: str, names: Sequence[str]) -> torch.Tensor | None:
    """The first of these weights that the model's files have; None if they have none of them."""
    files = files_of_weights(Path(model_path))
    saved = saved_weights(empty_model(model_path, torch.bfloat16, files), files)
    found = [name for name in names if name in saved]
    return next(saved.read(found[:1], "cpu"))[1] if found else None


def round_to_nf4(model: PreTrainedModel, model_path: str, dtype: torch.dtype) -> None:
    """Replace the weights that `nf4_names` has, of a model of any dtype, by their values after rounding `dtype` to 4 bits."""
    names = {key: name for name, key in saved_weights(model, files_of_weights(Path(model_path))).keys.items()}
    for key in nf4_names(model_path):
        weight = model.get_parameter(names[key])
        weight.data = Nf4Weight.quantise(weight.data.to(dtype)).dense().to(weight.dtype)


def empty_model(model_path: str, dtype: torch.dtype, files: Mapping[str, Path]) -> PreTrainedModel:
    """The model without memory for its parameters, which are on the meta device; its buffers are computed."""
    config = AutoConfig.from_pretrained(model_path)
    with init_empty_weights(include_buffers=False):
        model = build_model(config, dtype=dtype)
    _tie(model, saved_weights(model, files))
    return model


def _tie(model: PreTrainedModel, saved: SavedWeights) -> None:
    """Tie the head's weight to the embedding's if the model does so.

    Not if the files have two that differ: then transformers and vLLM untie them, whatever the configuration says.
    """
    ties: dict[str, str] = model.all_tied_weights_keys
    for target, source in ties.items():
        if target in saved and source in saved:
            (_, a), (_, b) = saved.read([target, source], "cpu")
            if not torch.equal(a, b):
                return
    model.tie_weights()


def _not_found(model_path: str, name: str, files: Mapping[str, Path]) -> str:
    if not files:
        return f"model.load_in: {model_path} has no safetensors: convert the model, or leave this option out"
    where = f"the files of {model_path}"
    return f"model.load_in: {where} name the weights differently from transformers (no {name}): leave this option out"


def load_plainly(model_path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers loads it, towers included, from the files that vLLM reads too (`common/weight_files.py`).

    Raises:
        ValueError: the files lack some of its weights.
    """
    config = AutoConfig.from_pretrained(model_path)
    # Without it, transformers would not read an index beside a model.safetensors.
    config.transformers_weights = INDEX if find_weights(Path(model_path)).has_index else None
    loaded: Any = auto_class(config).from_pretrained(model_path, config=config, dtype=dtype, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"]:  # transformers has initialised them at random
        raise ValueError(f"the files in {model_path} have no weight {min(report['missing_keys'])}, which the model has")
    del model.config.transformers_weights
    return cast(PreTrainedModel, model)


def _loaded_plainly(model_path: str, dtype: torch.dtype, device: str) -> BaseModel:
    model = without_towers(load_plainly(model_path, dtype))
    nn.Module.to(model, device)
    return _described(model, {})


def _without_values(model_path: str, dtype: torch.dtype, load_in: Literal["nf4"] | None) -> BaseModel:
    model = build_model(AutoConfig.from_pretrained(model_path), dtype=dtype)
    for name in _linear_weights(model) if load_in == "nf4" else ():
        weight = model.get_parameter(name)
        packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
        absmax = torch.empty(-(-weight.numel() // BLOCKSIZE))
        _set_nf4(model, name, Nf4Weight(packed, absmax, weight.shape, dtype))
    return _described(model, {})


def _described(model: PreTrainedModel, shared: Mapping[str, torch.Tensor]) -> BaseModel:
    model.eval()
    model.requires_grad_(False)
    scales = {name: buffer for name, buffer in model.named_buffers() if name.endswith(f".{Nf4Linear.SCALES}")}
    weights = {**dict(model.named_parameters()), **scales}
    _check_range(weights)
    unshared = tuple(name for name in weights if name not in shared)
    return BaseModel(
        model=model,
        weights=weights,
        unshared=unshared,
        unshared_bytes=sum(weights[name].nbytes for name in unshared),
        shared_bytes=sum(weights[name].nbytes for name in shared),
        versions=tuple(tensor._version for tensor in weights.values()),
        checksums=tuple(_checksum(tensor) for tensor in weights.values()) if detect_fake_mode() is None else (),
    )


def _check_range(weights: Mapping[str, torch.Tensor]) -> None:
    """Whether float16 holds all weights (of those in 4 bits: their scales). The files' dtype may have a wider range."""
    if detect_fake_mode() is not None or all(weight.dtype != torch.float16 for weight in weights.values()):
        return
    for name, weight in weights.items():
        # A sum in fp32 is finite if the numbers are, and needs no mask of the weight's size.
        if weight.is_floating_point() and not weight.sum(dtype=torch.float32).isfinite():
            raise ValueError(
                f"model.dtype=float16: {name} has a value beyond float16's range (65504): set model.dtype=bfloat16 or float32"
            )


def _checksum(weight: torch.Tensor) -> int:
    """The sum of its bits modulo 2^64, read as the widest integers that fit: torch makes wide copies of narrow ones."""
    flat = weight.detach().reshape(-1)
    size, start = flat.nbytes, flat.storage_offset() * flat.element_size()
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    width = next(width for width in kinds if size % width == start % width == 0)
    return int(flat.view(kinds[width]).sum(dtype=torch.int64).item())


# ------------------------------------------------------------------------------------------------------------- weights


def _fits(tensor: torch.Tensor, parameter: nn.Parameter, device: str) -> bool:
    return (tensor.shape, tensor.dtype, tensor.device.type) == (parameter.shape, parameter.dtype, torch.device(device).type)


def _changed_by_loading(shared: Mapping[str, torch.Tensor], saved: SavedWeights) -> list[str]:
    """Names of the shared weights whose first or last row differs from the files: vLLM keeps them in another form.

    The proof at the start of a run cannot detect this: trainer and vLLM compute with the same tensor.
    """
    changed = []
    for name, tensor in shared.items():
        if name not in saved:
            continue
        pairs = zip(saved.ends(name), (tensor[:1], tensor[-1:]), strict=True)
        if not all(torch.equal(row.to(tensor.device, tensor.dtype), held) for row, held in pairs):
            changed.append(name)
    return changed


def _linear_weights(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    return [f"{name}.weight" for name in layers]


def _saved_buffers(model: PreTrainedModel) -> list[str]:
    """Buffers that are saved with the weights. They are not read here."""
    return sorted({name for name, _ in model.named_buffers()} & set(model.state_dict()))


def _set_parameter(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(owner), own_name, nn.Parameter(tensor, requires_grad=False))


def _set_nf4(model: PreTrainedModel, name: str, weight: Nf4Weight) -> None:
    layer_name = name.rpartition(".")[0]
    model.set_submodule(layer_name, Nf4Linear(weight, cast(nn.Linear, model.get_submodule(layer_name)).bias))
