"""Which layers of a model get an adapter: the option `lora.targets`.

    targets = find_targets(model, "all-linear")
    targets.modules                                   # the layers, by their complete names
    targets.names                                     # the same in PEFT's form: ends of names, or a regular expression
    target_module_names("path/to/model", "qkv")       # ("q_proj", "k_proj", "v_proj"): vLLM selects layers by these

A preset means layers of the model's own decoder, whatever they are called: `all-linear` every linear layer except routers,
`attention` those of layers that mix tokens (attention, delta nets, state spaces, short convolutions), `qkv` the same without
their output projections. Experts that are one 3-D weight are no linear layers: they are frozen. Layers on which vLLM could not
load an adapter are left out of presets (`rollout/adaptable.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.utils.other import match_target_against_key
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ...rollout.adaptable import not_adaptable
from ...rollout.model_classes import build_model, has_tower
from ..config.lora import TARGET_PRESETS

MIXERS = re.compile(r"Attention|DeltaNet|Mamba|Mixer|ShortConv")
"""Classes of layers that mix tokens."""

OUTPUTS = frozenset({"o_proj", "out_proj", "c_proj", "dense", "wo"})
"""Their output projections."""

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Modules that choose or weight experts."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Layers with an adapter.

    Attributes:
        modules: by their complete names.
        names: in PEFT's form, which matches these modules and no others.
        notes: what a preset leaves out, and why.
    """

    modules: dict[str, nn.Module]
    names: list[str] | str
    notes: tuple[str, ...] = ()


def find_targets(model: PreTrainedModel, targets: Sequence[str] | str) -> Targets:
    """The layers that `lora.targets` selects.

    Args:
        targets: a preset, names that match as ends of module names, or a regular expression for complete names.

    Raises:
        ValueError: something is selected that cannot be adapted, or a target selects nothing.
    """
    if not isinstance(targets, str) or targets not in TARGET_PRESETS:
        check_targets(model, targets)
        modules = targeted_modules(model, targets)
        return Targets(modules, _names(model, modules, targets if isinstance(targets, str) else list(targets)))
    selected, refused = _of_preset(model, targets), not_adaptable(model.config)
    left_out = sorted({role(name) for name in selected} & set(refused))
    modules = {name: module for name, module in selected.items() if role(name) not in left_out}
    if not modules:
        raise ValueError(f"lora.targets: {type(model).__name__} has no layers that {targets} selects; name layers in a list")
    by_reason = {refused[name]: [other for other in left_out if refused[other] == refused[name]] for name in left_out}
    notes = [f"lora.targets={targets} leaves out {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    if targets == "all-linear" and (experts := _experts(model)):
        notes.append(f"lora.targets=all-linear leaves out the experts ({experts}): they are frozen")
    names = shortest(modules, [name for name, _ in model.named_modules() if name])
    return Targets(modules, _names(model, modules, names), tuple(notes))


def target_module_names(model_path: str, targets: Sequence[str] | str) -> tuple[str, ...]:
    """The last parts of the names of all targeted modules, each once, such as `q_proj`: vLLM selects layers by these.

    Builds the model without weights, except for targets that are names.

    Raises:
        ValueError: see `find_targets`; names are not checked.
    """
    if not isinstance(targets, str):
        return tuple(dict.fromkeys(map(role, targets)))
    with torch.device("meta"):
        model = build_model(AutoConfig.from_pretrained(model_path))
    return tuple(dict.fromkeys(map(role, find_targets(model, targets).modules)))


def preset_of(model: PreTrainedModel, modules: Collection[str]) -> str | None:
    """The preset that selects exactly these modules, if there is one."""
    for preset in TARGET_PRESETS:
        selected, refused = _of_preset(model, preset), not_adaptable(model.config)
        if {name for name in selected if role(name) not in refused} == set(modules):
            return preset
    return None


def check_targets(model: PreTrainedModel, targets: Sequence[str] | str) -> None:
    """Check that the modules selected by `targets` (names, or a regular expression for complete names) can be adapted.

    Raises:
        ValueError: a name or the expression matches no module, or one that is neither linear nor the input embedding.
    """
    embedding = model.get_input_embeddings()
    adaptable = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) or module is embedding}
    for target in [targets] if isinstance(targets, str) else targets:
        if not targeted_modules(model, targets if isinstance(targets, str) else [target]):
            roles = ", ".join(sorted({role(name) for name in adaptable}))
            raise ValueError(f"lora.targets: {type(model).__name__} has no layer {target}; name some of {roles}")
    others = {name: module for name, module in targeted_modules(model, targets).items() if name not in adaptable}
    norms = [name for name, module in others.items() if _is_norm(module)]
    if norms and len(norms) == len(others):
        raise ValueError(
            f"lora.targets: {some(norms)} cannot be adapted: LoRA does not apply to norm layers, whose weights are vectors; "
            "remove them"
        )
    if others:
        raise ValueError(
            f"lora.targets: {some(list(others))} cannot be adapted: only linear layers and the input embedding can"
        )


def targeted_modules(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """All modules that PEFT would adapt, by name: names match as suffixes, a regular expression matches complete names."""

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return match_target_against_key(targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in targets)

    return {name: module for name, module in model.named_modules() if name and is_target(name)}


def role(name: str) -> str:
    """The last part of a module's name, such as `q_proj`."""
    return name.rpartition(".")[2]


def some(names: Sequence[str]) -> str:
    """The first three names, and the number of others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------------- presets


def _of_preset(model: PreTrainedModel, preset: str) -> dict[str, nn.Module]:
    linear = dict(_decoder_layers(model))
    if preset == "all-linear":
        return linear
    modules = dict(model.named_modules())
    mixing = {name: module for name, module in linear.items() if _is_in_mixer(name, modules)}
    return mixing if preset == "attention" else {name: module for name, module in mixing.items() if role(name) not in OUTPUTS}


def _decoder_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of the decoder, except for the head and routers. A vision or audio tower is no part of it."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    (prefix,) = (name for name, module in model.named_modules() if module is decoder)
    for inner, module in decoder.named_modules():
        if isinstance(module, nn.Linear) and module is not head and ROUTERS.isdisjoint(inner.split(".")):
            yield f"{prefix}.{inner}" if prefix else inner, module


def _is_in_mixer(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parents = name.split(".")[:-1]
    return any(MIXERS.search(type(modules[".".join(parents[:depth])]).__name__) for depth in range(1, len(parents) + 1))


def _experts(model: PreTrainedModel) -> str:
    """The kinds of 3-D weights of the decoder's experts, as names with commas."""
    named = model.get_decoder().named_parameters()
    return ", ".join(sorted({role(name) for name, weight in named if weight.dim() == 3 and "experts" in name}))


def _is_norm(module: nn.Module) -> bool:
    """Whether all parameters of a layer are vectors, as in RMSNorm and LayerNorm."""
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(parameter.dim() == 1 for parameter in parameters)


# --------------------------------------------------------------------------------------------------------------- names


def _names(model: PreTrainedModel, modules: Collection[str], names: str | list[str]) -> str | list[str]:
    """What the saved adapter says: `names`, unless the checkpoint has towers, whose layers PEFT would find by them too."""
    return expression(modules) if has_tower(model.config) else names


def shortest(selected: Collection[str], modules: Collection[str]) -> str | list[str]:
    """Ends of names, sorted, or a regular expression: what matches `selected` among all `modules`, and no other."""
    names = sorted({role(name) for name in selected})
    matched = {module for module in modules if any(f".{module}".endswith(f".{name}") for name in names)}
    return names if matched == set(selected) else expression(selected)


def expression(names: Iterable[str]) -> str:
    """A regular expression that matches these complete names and no others; names of the same layers are joined."""
    layers_of: dict[tuple[str, str], list[str]] = {}  # by the text before and after the layer's number
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        before, layer, after = match.groups() if match else (name, "", "")
        layers_of.setdefault((before, after), []).append(layer)
    ends_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, after), layers in layers_of.items():
        ends_of.setdefault((before, tuple(layers)), []).append(after)
    return _one_of([
        re.escape(before) + _one_of(layers) + _one_of([re.escape(end) for end in ends])
        for (before, layers), ends in ends_of.items()
    ])  # fmt: skip


def _one_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"
