"""Which modules of the model run as one fused function, recognised by their structure and their output.

    fusion = fuse(model, forward=lambda: model(...))      # after PEFT's injection; changes no name and no parameter
    fusion.summary       # "fused: 30 q/k/v, 30 MLPs, 30 single layers, 61 norms"; the rest is listed with a reason

A candidate has the right children and parameters. An MLP is replaced if it computes down(act(gate(x)) * up(x)), a norm if its
output is bit-exactly ours. Both are tested on a miniature: the same module with small random weights instead of its
weights. So the test takes no time on a large model, and gives the same answer for a model whose weights have no values
(`grpo/memory/step_memory.py`). q, k and v run together if one forward of the model shows that they read the same tensor.
Nothing is skipped silently: an adapted layer outside of q/k/v and MLPs runs as a single fused layer, and a candidate that
computes something else is listed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast, get_args

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...kernels.lora import Activation
from ...kernels.rms_norm import rms_norm
from .lora_layers import MLP_LAYERS, FusedLoRALayer, FusedLoRALinear, FusedMLP, SharedInput

QKV_LAYERS = ("q_proj", "k_proj", "v_proj")
MINIATURE = (8, 12)  # d_model and width of a miniature MLP
SAME_OUTPUT = 1e-5  # largest relative difference in fp32 that counts as rounding
EPS_NAMES = ("variance_epsilon", "eps")


class FusedRMSNorm(nn.Module):
    """Replaces a model's RMSNorm: the same weight under the same name, a backward that keeps less."""

    def __init__(self, norm: nn.Module, *, unit_offset: bool) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, norm.weight)
        self.eps: float = _eps(norm)  # type: ignore[assignment]
        self.unit_offset = unit_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)


@dataclass
class Fusion:
    """Names of the attention modules, MLPs, layers and norms that run fused, and the candidates that do not, with reasons."""

    qkv: list[str] = field(default_factory=list)
    mlp: list[str] = field(default_factory=list)
    single: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    not_fused: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line for the log."""
        counts = (
            f"fused: {len(self.qkv)} q/k/v, {len(self.mlp)} MLPs, {len(self.single)} single layers, {len(self.norms)} norms"
        )
        names_of: dict[str, list[str]] = {}
        for name, reason in self.not_fused.items():
            names_of.setdefault(reason, []).append(name)
        reasons = [f"{', '.join(names)} ({reason})" for reason, names in names_of.items()]
        return "; not fused: ".join([counts, *(["; ".join(reasons)] if reasons else [])])


def fuse(model: nn.Module, forward: Callable[[], object]) -> Fusion:
    """Replace modules and join layers, in place. Slots must be attached; `forward` runs the model once on any input.

    On fake tensors `forward` is not called: q, k and v of one attention module are taken to read the same tensor.
    """
    fusion = Fusion()
    inputs: dict[str, SharedInput] = {}
    for name, module in list(model.named_modules()):
        adapted = _adapted(module, QKV_LAYERS)
        if len(adapted) > 1:
            inputs[name] = SharedInput(adapted)
        if _adapted(module, MLP_LAYERS):
            _fuse_mlp(model, name, module, fusion)
        if _is_norm(module):
            _fuse_norm(model, name, module, fusion)
    if detect_fake_mode() is None:
        with torch.no_grad():
            forward()
    for name, shared in inputs.items():
        if shared.has_unread_outputs:
            shared.dissolve()
            fusion.not_fused[name] = "q, k and v do not read the same tensor"
        else:
            fusion.qkv.append(name)
    parts = {f"{name}.{child}" for name in fusion.qkv for child in QKV_LAYERS}
    parts |= {f"{name}.{child}" for name in fusion.mlp for child in MLP_LAYERS}
    layers = [name for name, module in model.named_modules() if isinstance(module, FusedLoRALayer)]
    fusion.single = [name for name in layers if name not in parts]
    return fusion


def _adapted(module: nn.Module, names: tuple[str, ...]) -> list[FusedLoRALinear]:
    """The children of these names that have an adapter."""
    return [child for name, child in module.named_children() if name in names and isinstance(child, FusedLoRALinear)]


# ----------------------------------------------------------------------------------------------------------------- MLPs


def _fuse_mlp(model: nn.Module, name: str, mlp: nn.Module, fusion: Fusion) -> None:
    reason = _why_not_an_mlp(mlp)
    activation = None if reason else _activation(mlp)
    if activation is None:
        fusion.not_fused[name] = reason or "its output is not that of down(act(gate(x)) * up(x)) with SiLU or GELU"
    else:
        model.set_submodule(name, FusedMLP(mlp, activation))
        fusion.mlp.append(name)


def _why_not_an_mlp(mlp: nn.Module) -> str | None:
    children = dict(mlp.named_children())
    if not all(isinstance(children.get(name), nn.Linear | FusedLoRALinear) for name in MLP_LAYERS):
        return f"it lacks one of the linear layers {', '.join(MLP_LAYERS)}"
    if len(inspect.signature(mlp.forward).parameters) != 1:
        return "it takes more than one input"
    return None


@torch.no_grad()
def _activation(mlp: nn.Module) -> Activation | None:
    """The activation with which the fused form gives a miniature's output; None if there is no such activation."""
    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        d_model, width = MINIATURE
        sizes = {"gate_proj": (d_model, width), "up_proj": (d_model, width), "down_proj": (width, d_model)}
        small = {id(mlp.get_submodule(name)): nn.Linear(*sizes[name], dtype=torch.float32) for name in MLP_LAYERS}
        miniature = copy.deepcopy(mlp, small)  # the memo replaces its three layers
        x = torch.randn(4, d_model, dtype=torch.float32)
        try:
            expected = miniature(x)
        except RuntimeError:  # it works with the original sizes only
            return None
        for activation in get_args(Activation):
            difference = FusedMLP(miniature, activation)(x) - expected
            if difference.norm() <= SAME_OUTPUT * expected.norm():
                return activation
    return None


# ----------------------------------------------------------------------------------------------------------------- norms


def _is_norm(module: nn.Module) -> bool:
    """Whether it looks like a norm without a bias: one frozen vector, called weight, and an epsilon."""
    parameters = dict(module.named_parameters())
    is_vector = list(parameters) == ["weight"] and parameters["weight"].dim() == 1 and not parameters["weight"].requires_grad
    return is_vector and _eps(module) is not None


def _eps(norm: nn.Module) -> float | None:
    found = [getattr(norm, name) for name in EPS_NAMES if isinstance(getattr(norm, name, None), float)]
    return found[0] if found else None


@torch.no_grad()
def _fuse_norm(model: nn.Module, name: str, norm: nn.Module, fusion: Fusion) -> None:
    if len(inspect.signature(norm.forward).parameters) != 1:  # a norm with a gate, for one
        fusion.not_fused[name] = "its forward takes further arguments"
        return
    # On the CPU, whatever the model's device: a GPU kernel sums in another order, so its last bit may differ.
    original = cast(nn.Parameter, norm.weight)
    with unset_fake_temporarily():
        generator = torch.Generator().manual_seed(0)
        weight, x = (torch.randn(rows, len(original), generator=generator).to(original.dtype) for rows in (1, 4))
        miniature = copy.deepcopy(norm, {id(original): nn.Parameter(weight[0], requires_grad=False)})
        expected = miniature(x)
        offsets = [on for on in (False, True) if torch.equal(FusedRMSNorm(miniature, unit_offset=on)(x), expected)]
    if offsets:
        model.set_submodule(name, FusedRMSNorm(norm, unit_offset=offsets[0]))
        fusion.norms.append(name)
    else:
        fusion.not_fused[name] = "its output is not that of an RMSNorm"
