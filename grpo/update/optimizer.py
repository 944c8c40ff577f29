"""AdamW over the fp32 master weights, each with the learning rate that its role, rank and scale ask for.

    optimizer = make_optimizer(policy.master_roles, config.optim)
    set_learning_rate(optimizer, learning_rate(config.optim, step))
    optimizer.step()

The schedule (`schedule.py`) is a pure function of the step, so only the optimizer's state and the master weights need to be
saved: `optimizer_tensors` names the state, `set_optimizer_tensors` restores it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import OptimConfig
from ..model.lora_layers import Master
from .ranks import rate_factor

ADAMW_STATE = frozenset({"step", "exp_avg", "exp_avg_sq"})
EIGHT_BIT_STATE = frozenset({"step", "state1", "state2", "absmax1", "absmax2"})
"""Names of a parameter's state in torch's and in bitsandbytes' AdamW. A small parameter has no `absmax1` and `absmax2`."""


def check_device(optim: OptimConfig, device: str) -> None:
    """Whether the optimizer runs on `cpu` or `cuda`.

    Raises:
        ValueError: it does not, with one that does.
    """
    if optim.optimizer == "paged_adamw_8bit" and device != "cuda":
        raise ValueError(
            "optim.optimizer=paged_adamw_8bit needs CUDA, which moves its state to the host where memory is short: "
            f"take optim.optimizer=adamw_8bit on {device}"
        )


def make_optimizer(masters: Sequence[Master], optim: OptimConfig) -> torch.optim.Optimizer:
    """The AdamW of `optim.optimizer`, one parameter group for each `factor` of the master weights' learning rates.

    Raises:
        ValueError: it does not run on the master weights' device.
    """
    check_device(optim, masters[0].parameter.device.type)
    by_factor: defaultdict[float, list[nn.Parameter]] = defaultdict(list)
    for master in masters:
        factor = rate_factor(master.role, scaling=master.scaling, rank=master.rank, optim=optim)
        by_factor[factor].append(master.parameter)
    groups = [
        {"params": parameters, "factor": factor, "lr": optim.learning_rate * factor}
        for factor, parameters in by_factor.items()
    ]
    settings = {
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_epsilon,
        "weight_decay": optim.weight_decay,
    }
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    optimizer = (PagedAdamW8bit if optim.optimizer == "paged_adamw_8bit" else AdamW8bit)(groups, **settings)
    _make_8bit_state(optimizer, in_32_bits={master.parameter for master in masters if master.role == "embedding"})
    return optimizer


def _make_8bit_state(optimizer: Any, *, in_32_bits: set[nn.Parameter]) -> None:
    """Make the state that bitsandbytes would make at the first update.

    So it is written in place ever after: paged memory is what bitsandbytes has allocated itself, and it never frees it.
    """
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter in in_32_bits:
                # Most tokens have no gradient in a step. In a block with a token that has one, their second moment rounds to
                # zero in 8 bits, and their first is divided by it (arXiv 2110.02861 keeps embeddings in 32 bits for that).
                moments = {name: optimizer.get_state_buffer(parameter, torch.float32) for name in ("state1", "state2")}
                optimizer.state[parameter] = {"step": 0, **moments}
            else:
                optimizer.init_state(group, parameter, group_index, index)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next update; every group takes its factor of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<index of the parameter>.<name>`: its tensors, not copied, and its counts as new ones.

    Before the first update there is none with torch's AdamW, and zeros with bitsandbytes'.
    """
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if name in ADAMW_STATE | EIGHT_BIT_STATE  # the 8-bit code table is the same for all, and no state
    }


def is_state_of(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether `tensors` are named as this kind of optimizer names its state. Where there are none, they are."""
    names = ADAMW_STATE if isinstance(optimizer, torch.optim.AdamW) else EIGHT_BIT_STATE
    return {key.partition(".")[2] for key in tensors} <= names


@torch.no_grad()
def set_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Make `tensors` the optimizer's complete state: in place, or as copies on the parameter's device where it has none yet.

    State that is not among them becomes zero, as before the first update.
    """
    assert is_state_of(optimizer, tensors), "the state of another kind of optimizer"
    for key in dict.fromkeys([*optimizer_tensors(optimizer, parameters), *tensors]):
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        state, value = optimizer.state[parameter], tensors.get(key, torch.tensor(0))
        if name not in state:
            state[name] = value.to(parameter.device, copy=True)
        elif isinstance(state[name], torch.Tensor):
            state[name].copy_(value)
        else:
            state[name] = int(value)  # bitsandbytes counts its steps in Python
