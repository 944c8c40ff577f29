"""Convolutions and recurrences over packs that contain each prompt once, followed by its completions.

    reason = why_not(model)         # None: all its layers with a state can share prompts
    install(model)
    with active(layout):            # of `shared_prompt_attention.py`, around the forward and the backward pass of one pack
        model(...)

Layers with a state (gated delta nets, Mamba 2, short convolutions) run over a prompt once. Each completion begins with the
state that its prompt ends with: the recurrent state, and the last inputs of the convolution. Autograd adds up the gradients of
the completions in that state. It is exact: a row with prompt and completion computes the same.

Transformers' models call functions of their own module for this, such as `causal_conv1d_fn`, which are fast kernels where these
are installed. `install` replaces them by functions that do the same outside of `active`, and within it call them for the
prompts and for the completions of a pack. What is not among these functions keeps prompts from being shared (`why_not`).

Shapes: L tokens of the pack, C channels, K taps, B tokens at the beginning of sequences, H heads, D head dimension. A batch of
the pack's sequences has [U, T] tokens (`recurrence_plan.py`).
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .recurrence_plan import Batch, RecurrencePlan
from .shared_prompt_attention import active_layout

SINGLE_STEPS = {"causal_conv1d_update", "torch_recurrent_gated_delta_rule", "mamba2_selective_state_update"}
"""What layers call with a cache only, when they decode."""


def layers_with_state(model: nn.Module) -> list[nn.Module]:
    """Those with a convolution over tokens, which all of them have."""
    return [module for module in model.modules() if any(isinstance(child, nn.Conv1d) for child in module.children())]


def why_not(model: nn.Module) -> str | None:
    """None if every layer with a state mixes tokens by functions that `install` replaces; else the reason, in words."""
    for kind in {type(layer) for layer in layers_with_state(model)}:
        called = set(re.findall(r"\b(\w+)\(", inspect.getsource(kind.forward)))
        known = {*REPLACEMENTS, *SINGLE_STEPS}
        # Functions of its module that a package of kernels can replace: what mixes tokens is among these.
        mixing = {name for name in called if hasattr(vars(sys.modules[kind.__module__]).get(name), "__wrapped__")}
        if "causal_conv1d_fn" not in mixing:
            return f"{kind.__name__} has a convolution of its own"
        if mixing - known:
            return f"{kind.__name__} mixes tokens by {min(mixing - known)}"
    return None


def install(model: nn.Module) -> None:
    """Replace the functions that this model's layers with a state call. A second time changes nothing."""
    for kind in {type(layer) for layer in layers_with_state(model)}:
        namespace = vars(sys.modules[kind.__module__])
        for name, replacement in REPLACEMENTS.items():
            function = namespace.get(name)
            if function is not None and not hasattr(function, "takes_packs"):
                namespace[name] = _dispatch(function, replacement)


def _dispatch(function: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself outside of `active`, and within it the replacement."""

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        layout = active_layout()
        if layout is None:
            return function(*args, **kwargs)
        return replacement(function, layout.recurrence_plan, *args, **kwargs)

    either.takes_packs = True  # type: ignore[attr-defined]
    return either


def shared_convolution(
    convolve: Callable[..., torch.Tensor],
    plan: RecurrencePlan,
    inputs_1CL: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A causal convolution of each channel: over the whole pack, and again where a sequence begins, with what it sees there."""
    from transformers.activations import ACT2FN

    convolved_1CL = convolve(inputs_1CL, weight_CK, bias_C, activation=activation, **kwargs)
    windows = plan.windows(weight_CK.shape[1])
    seen_BKC = windows.seen.gather(inputs_1CL[0].transpose(0, 1)).unflatten(0, windows.is_before_BK.shape)
    wide = torch.promote_types(weight_CK.dtype, torch.float32)
    seen_BKC = seen_BKC.to(wide).masked_fill(windows.is_before_BK[:, :, None], 0.0)
    begins_BC = (seen_BKC * weight_CK.to(wide).transpose(0, 1)).sum(1)
    if bias_C is not None:
        begins_BC = begins_BC + bias_C
    if activation is not None:
        begins_BC = ACT2FN[activation](begins_BC)
    return convolved_1CL.index_copy(2, windows.tokens_B, begins_BC.to(convolved_1CL.dtype).transpose(0, 1)[None])


def shared_delta_rule(
    delta_rule: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    plan: RecurrencePlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule, [1, L, H, D] in and out. Padding neither decays the state (g = 0) nor adds to it (beta = 0)."""
    assert initial_state is None and not output_final_state and cu_seqlens is None, "packs are trained on, without a cache"

    def run(batch: Batch, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return delta_rule(
            *(batch.rows(t[0]) for t in (query, key, value)),
            g=batch.padded(g[0], 0.0),
            beta=batch.padded(beta[0], 0.0),
            initial_state=state,
            output_final_state=state is None,
            **kwargs,
        )

    return _over_both(plan, run), None


def shared_scan(
    scan: Callable[..., Any],
    plan: RecurrencePlan,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Mamba 2's scan, [1, L, H, D] in and out.

    Time steps are formed here, in fp32, so that those of padding can be 0, whatever the limit: it changes no state.
    """
    assert initial_states is None and not return_final_states, "packs are trained on, without a cache"
    steps_1LH = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        steps_1LH = steps_1LH + dt_bias
    if dt_softplus:
        steps_1LH = nn.functional.softplus(steps_1LH)
    steps_1LH = steps_1LH.clamp(*dt_limit)

    def run(batch: Batch, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = scan(
            batch.rows(hidden_states[0]),
            batch.padded(steps_1LH[0], 0.0),
            A,
            batch.rows(B[0]),
            batch.rows(C[0]),
            initial_states=state,
            return_final_states=state is None,
            **kwargs,
        )
        return output if state is None else (output, None)

    return _over_both(plan, run)


def no_short_cut(*args: Any, **kwargs: Any) -> None:
    """In place of a kernel that computes a whole layer, convolution and scan: the layer takes the two steps instead."""
    return None


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": shared_convolution,
    "torch_chunk_gated_delta_rule": shared_delta_rule,
    "mamba2_chunk_scan": shared_scan,
    "mamba2_split_conv1d_scan_combined": no_short_cut,
}


def _over_both(
    plan: RecurrencePlan, run: Callable[[Batch, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]
) -> torch.Tensor:
    """Run over the prompts, then over the completions from the states there; the outputs in the pack's order, [1, L, ...]."""
    outputs, states = run(plan.prompts, None)
    assert states is not None
    flat = outputs.flatten(0, 1)
    if plan.completions is not None:
        of_completions, _ = run(plan.completions, plan.prompt_of.gather(states))
        flat = torch.cat([flat, of_completions.flatten(0, 1)])
    return flat.index_select(0, plan.places_L)[None]
