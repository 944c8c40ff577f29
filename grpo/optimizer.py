"""AdamW over the policy's masters, each with the learning rate that its role, rank and scale ask for, and the schedule.

The schedule is a pure function of the step, so nothing but the optimizer's state and the masters needs to be saved:
`optimizer_tensors` names the state, `set_optimizer_tensors` puts it back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .config import OptimConfig
from .lora_layers import Master
from .ranks import rate_factor


def learning_rate(optim: OptimConfig, step: int) -> float:
    """The learning rate of a step (from 0): warm-up from 0, then constant, or down to 0 at `max_steps`."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / (optim.max_steps - optim.warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return optim.learning_rate * factors[optim.lr_scheduler_type]


def make_optimizer(masters: Sequence[Master], optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW, one parameter group for each `factor` that the masters' learning rates are multiplied by."""
    by_factor: defaultdict[float, list[nn.Parameter]] = defaultdict(list)
    for master in masters:
        factor = rate_factor(master.role, scaling=master.scaling, rank=master.rank, optim=optim)
        by_factor[factor].append(master.parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "factor": factor, "lr": optim.learning_rate * factor}
            for factor, parameters in by_factor.items()
        ],
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next update; every group takes its factor of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The optimizer's state, not copied, as `<index of the parameter>.<name>`. Empty before the first update."""
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def set_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Make copies of `tensors` the optimizer's whole state, each on its parameter's device."""
    optimizer.state.clear()
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        optimizer.state[parameter][name] = tensor.to(parameter.device, copy=True)
