"""Which modules of the model run as one fused function, found by what they do rather than by their class.

    fusion = fuse(model, forward=lambda: model(...))      # after PEFT's injection; changes no name and no parameter
    fusion.summary       # "fused: 30 q/k/v, 30 MLPs, 30 single layers, 61 norms"; what is not is named, with the reason

q, k and v run together where they turn out to read the same tensor; an MLP is replaced where down(act(gate(x)) * up(x)) gives
its output, a norm where ours gives its output to the last bit. Nothing is skipped silently: an adapted layer that is not part
of q/k/v or an MLP runs as a single fused layer, and a candidate that does something else is listed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast, get_args

import torch
from torch import nn

from ...kernels.lora import Activation
from ...kernels.rms_norm import rms_norm
from .lora_layers import MLP_LAYERS, FusedLoRALayer, FusedLoRALinear, FusedMLP, SharedInput, projection

QKV_LAYERS = ("q_proj", "k_proj", "v_proj")
# Largest relative difference of an MLP from its fused form that is rounding.
SAME_OUTPUT = {torch.bfloat16: 0.02, torch.float16: 0.005}
SAME_OUTPUT_FP32 = 1e-5


class FusedRMSNorm(nn.Module):
    """Stands in for a model's RMSNorm: the same weight under the same name, a leaner backward."""

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
    """Names of the attention modules, MLPs, layers and norms that run fused, and of candidates that do something else."""

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
        return "; not fused as a whole: ".join([counts, *(["; ".join(reasons)] if reasons else [])])


def fuse(model: nn.Module, forward: Callable[[], object]) -> Fusion:
    """Bring together what computes together. Slots must be attached; `forward` runs the model once on any input."""
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
    with torch.no_grad():
        forward()
    for name, shared in inputs.items():
        if shared.has_unread_outputs:
            shared.dissolve()
            fusion.not_fused[name] = "q, k and v do not read the same tensor"
        else:
            fusion.qkv.append(name)
    parts = {f"{name}.{own}" for name in fusion.qkv for own in QKV_LAYERS}
    parts |= {f"{name}.{own}" for name in fusion.mlp for own in MLP_LAYERS}
    layers = [name for name, module in model.named_modules() if isinstance(module, FusedLoRALayer)]
    fusion.single = [name for name in layers if name not in parts]
    return fusion


def _adapted(module: nn.Module, names: tuple[str, ...]) -> list[FusedLoRALinear]:
    """The children of these names that have an adapter."""
    return [child for name, child in module.named_children() if name in names and isinstance(child, FusedLoRALinear)]


def _fuse_mlp(model: nn.Module, name: str, mlp: nn.Module, fusion: Fusion) -> None:
    reason = _why_not_an_mlp(mlp)
    if reason is None:
        fused, error = _closest(mlp)
        if error <= SAME_OUTPUT.get(projection(fused.get_submodule("gate_proj")).weight.dtype, SAME_OUTPUT_FP32):
            model.set_submodule(name, fused)
            fusion.mlp.append(name)
            return
        reason = "its output is not that of down(act(gate(x)) * up(x)) with SiLU or GELU"
    fusion.not_fused[name] = reason


def _why_not_an_mlp(mlp: nn.Module) -> str | None:
    children = dict(mlp.named_children())
    if not all(isinstance(children.get(name), nn.Linear | FusedLoRALinear) for name in MLP_LAYERS):
        return f"it lacks one of the linear layers {', '.join(MLP_LAYERS)}"
    if len(inspect.signature(mlp.forward).parameters) != 1:
        return "it takes more than one input"
    return None


@torch.no_grad()
def _closest(mlp: nn.Module) -> tuple[FusedMLP, float]:
    """The fused form whose activation comes closest to the MLP, and how far it is off, relative to the output."""
    weight_MD = projection(mlp.get_submodule("gate_proj")).weight
    x = torch.randn(4, weight_MD.shape[1], generator=torch.Generator().manual_seed(0)).to(weight_MD.device, weight_MD.dtype)
    expected = mlp(x).float()
    candidates = []
    for activation in get_args(Activation):
        fused = FusedMLP(mlp, activation)
        candidates.append((((fused(x).float() - expected).norm() / expected.norm()).item(), fused))
    error, fused = min(candidates, key=lambda candidate: candidate[0])
    return fused, error


def _is_norm(module: nn.Module) -> bool:
    """Whether it looks like a norm without a bias: one frozen vector, called weight, and an epsilon."""
    parameters = dict(module.named_parameters())
    is_vector = list(parameters) == ["weight"] and parameters["weight"].dim() == 1 and not parameters["weight"].requires_grad
    return is_vector and _eps(module) is not None


def _eps(norm: nn.Module) -> float | None:
    found = [getattr(norm, name) for name in ("variance_epsilon", "eps") if isinstance(getattr(norm, name, None), float)]
    return found[0] if found else None


@torch.no_grad()
def _fuse_norm(model: nn.Module, name: str, norm: nn.Module, fusion: Fusion) -> None:
    # On the CPU, whatever the model's device: a kernel sums in another order, so that bits would differ for no reason.
    twin = copy.deepcopy(norm).cpu()
    x = torch.randn(4, twin.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(twin.weight)  # type: ignore[arg-type]
    expected = twin(x)
    for unit_offset in (False, True):
        if torch.equal(FusedRMSNorm(twin, unit_offset=unit_offset)(x), expected):
            model.set_submodule(name, FusedRMSNorm(norm, unit_offset=unit_offset))
            fusion.norms.append(name)
            return
    fusion.not_fused[name] = "its output is not that of an RMSNorm"
