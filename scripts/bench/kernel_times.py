#!/usr/bin/env python3
"""Each kernel of a training step beside torch: medians of CUDA events, the L2 cache emptied before each call.

"products" are LoRA's: `x W + h B` of a forward and `g W^T + u A` of a backward for the layers of two models, rank 64, in one
Triton kernel; as cuBLAS product and `addmm_`; and the cuBLAS product alone, which is the least that either can take. "others"
move memory: norms, SwiGLU, rows of logits, NF4; attention with shared prompts beside torch's with a prompt per row. bf16. Needs
torch, and Triton on CUDA. On CPU there are no Triton kernels: the sizes are tiny and only show that the script runs.

examples:
  scripts/bench/kernel_times.py --json kernel_times.json
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from common import Result, command_line, markdown, run

if TYPE_CHECKING:
    from torch import Tensor

    from rankup.kernels.shared_prompt_attention import SharedPromptLayout

RANK = 64
LAYERS = {  # (I, O) of its linear layers
    "1.5B": {"q, o": (1536, 1536), "k, v": (1536, 256), "gate, up": (1536, 8960), "down": (8960, 1536)},
    "8B": {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 12288), "down": (12288, 4096)},
}


class Sizes(NamedTuple):
    """T tokens, D width, M width of the MLP, n rows of logits, V vocabulary; tokens of a prompt and of 8 completions; heads."""

    tokens: int
    width: int
    mlp: int
    rows: int
    vocabulary: int
    prompt: int
    completion: int
    heads: tuple[int, int]
    head_dim: int


ON_CUDA = Sizes(8192, 4096, 12288, 2048, 151_936, 512, 961, (32, 8), 128)
TINY = Sizes(64, 32, 48, 8, 512, 8, 5, (4, 2), 16)


def main() -> None:
    """Measure, print the tables and write the JSON file."""
    parser = command_line(__doc__, repeats=20, what="timed calls of each")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as on CPU")
    run(parser.parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Milliseconds of each kernel and of what stands beside it."""
    from gpu_timing import DEVICE, milliseconds

    tiny = options.tiny or DEVICE == "cpu"
    time = partial(milliseconds, repeats=options.repeats)
    sizes = TINY if tiny else ON_CUDA
    layers = {"tiny": {"gate, up": (sizes.width, sizes.mlp)}} if tiny else LAYERS
    products = [
        {"model": model, "layer": name, **one}
        for model, shapes in layers.items()
        for name, shape in shapes.items()
        for one in _products(shape, sizes.tokens, DEVICE, time)
    ]
    others = [
        {"kernel": name, "megabytes": size / 1e6, "ours": time(ours), "torch": time(torchs)}
        for part in (_norms, _swiglu, _logits, _attention, _nf4)
        for name, size, ours, torchs in part(sizes, DEVICE)
    ]
    left_out = [] if importlib.util.find_spec("bitsandbytes") is not None else ["NF4: bitsandbytes is not installed"]
    return {"device": DEVICE, "tokens": sizes.tokens, "products": products, "others": others, "left_out": left_out}


Pair = tuple[str, float, Callable[[], object], Callable[[], object]]
"""Name, bytes that it must move, our function, torch's."""


def _normal(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    import torch

    return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale


def _products(shape: tuple[int, int], tokens: int, device: str, time: Callable[..., Result]) -> Iterator[Result]:
    from torch.nn.functional import linear

    from rankup.kernels.lora import _product_with_adapter

    width, out = shape
    weight_OI = _normal(out, width, device=device, scale=width**-0.5)
    a_RI, b_OR = _normal(RANK, width, device=device), _normal(out, RANK, device=device)
    for direction, w_KN, b_RN in (("forward", weight_OI.t(), b_OR.t()), ("backward", weight_OI, a_RI)):
        x_TK, h_TR = _normal(tokens, w_KN.shape[0], device=device), _normal(tokens, RANK, device=device)
        ours = time(partial(_product_with_adapter, x_TK, w_KN, h_TR, b_RN))
        alone = time(partial(linear, x_TK, w_KN.t()))
        torchs = time(lambda x=x_TK, w=w_KN, h=h_TR, b=b_RN: linear(x, w.t()).addmm_(h, b))
        operations = 2 * tokens * w_KN.shape[1] * (w_KN.shape[0] + RANK)
        sizes = {"direction": direction, "K": w_KN.shape[0], "N": w_KN.shape[1], "operations": operations}
        yield {**sizes, "ours": ours, "torch": torchs, "product_alone": alone}


def _backward_of(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """The backward pass alone, which can be called again and again."""
    import torch

    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    grad = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def _norms(sizes: Sizes, device: str) -> Iterator[Pair]:
    from torch.nn.functional import rms_norm as of_torch

    from rankup.kernels.rms_norm import rms_norm

    x_TD, weight_D = _normal(sizes.tokens, sizes.width, device=device), _normal(sizes.width, device=device)

    def ours(x: Tensor) -> Tensor:
        return rms_norm(x, weight_D, 1e-6)

    def torchs(x: Tensor) -> Tensor:
        return of_torch(x, (sizes.width,), weight_D, 1e-6)

    yield "RMSNorm, forward", 2 * x_TD.nbytes, partial(ours, x_TD), partial(torchs, x_TD)
    yield "RMSNorm, backward", 3 * x_TD.nbytes, _backward_of(ours, x_TD), _backward_of(torchs, x_TD)


def _swiglu(sizes: Sizes, device: str) -> Iterator[Pair]:
    import torch
    from torch.nn.functional import silu

    from rankup.kernels.lora import _gated

    gate, up, grad = (_normal(sizes.tokens, sizes.mlp, device=device) for _ in range(3))

    def of_torch(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up

    yield "SwiGLU, forward", 3 * gate.nbytes, partial(_gated, gate, up, "silu"), partial(of_torch, gate, up)
    if device == "cuda":
        from rankup.kernels.triton.swiglu import swiglu_backward_in_place

        product = torch.empty_like(gate)
        ours = partial(swiglu_backward_in_place, grad, product, gate, up)
        yield "SwiGLU, backward", 5 * gate.nbytes, ours, _backward_of(of_torch, gate, up)


def _logits(sizes: Sizes, device: str) -> Iterator[Pair]:
    import torch

    from rankup.kernels.logprob import _row_arithmetic
    from rankup.kernels.logprob_rows import Slopes, TorchRows

    logits_nV = _normal(sizes.rows, sizes.vocabulary, device=device)
    targets_n = torch.arange(sizes.rows, device=device) % sizes.vocabulary
    slopes = Slopes(torch.ones(sizes.rows, device=device), torch.ones(sizes.rows, device=device))
    ours, torchs = _row_arithmetic(logits_nV, 1.0, None), TorchRows(logits_nV, 1.0, None)
    rows = ours.measure(logits_nV, targets_n, keep=False)
    yield (
        "rows of logits, measured",
        logits_nV.nbytes,
        lambda: ours.measure(logits_nV, targets_n, keep=False),
        lambda: torchs.measure(logits_nV, targets_n, keep=False),
    )
    yield (
        "rows of logits, gradient",
        2 * logits_nV.nbytes,
        lambda: ours.gradient_in_place(logits_nV, targets_n, rows, slopes),
        lambda: torchs.gradient_in_place(logits_nV, targets_n, rows, slopes),
    )


def _attention(sizes: Sizes, device: str) -> Iterator[Pair]:
    """Ours on a group of 8 completions; torch's on 8 rows of prompt and completion, as without shared prompts."""
    from torch.nn.functional import scaled_dot_product_attention

    from rankup.kernels.shared_prompt_attention import SharedPromptLayout, shared_prompt_attention

    layout: SharedPromptLayout = SharedPromptLayout.build([(sizes.prompt, [sizes.completion - 1] * 8)], device)
    heads, key_heads = sizes.heads
    row = sizes.prompt + sizes.completion - 1
    packed = [_normal(layout.length, h, sizes.head_dim, device=device) for h in (heads, key_heads, key_heads)]
    rows = [_normal(8, h, row, sizes.head_dim, device=device) for h in (heads, key_heads, key_heads)]

    def ours(*qkv: Tensor) -> Tensor:
        query, key, value = (t.transpose(0, 1) for t in qkv)
        return shared_prompt_attention(query, key, value, layout, None)

    def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    moved = 2 * packed[0].nbytes + 2 * packed[1].nbytes
    yield "attention, forward", moved, partial(ours, *packed), partial(torchs, *rows)
    yield "attention, backward", 2 * moved, _backward_of(ours, *packed), _backward_of(torchs, *rows)


def _nf4(sizes: Sizes, device: str) -> Iterator[Pair]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    import torch

    from rankup.kernels.nf4 import BLOCKSIZE, QUANT_TYPE, Nf4Weight

    weight = Nf4Weight.quantise(_normal(sizes.mlp, sizes.width, device=device))
    flat = (weight.shape.numel(),)
    of_bitsandbytes: Any = torch.ops.bitsandbytes.dequantize_4bit
    moved = weight.packed.nbytes + weight.absmax.nbytes + 2 * flat[0]
    torchs = partial(of_bitsandbytes, weight.packed, weight.absmax, BLOCKSIZE, QUANT_TYPE, flat, weight.dtype)
    yield "NF4 (beside bitsandbytes)", moved, weight.dense, torchs


# -------------------------------------------------------------------------------------------------------------- report


def report(result: Result) -> str:
    """Both tables, and the products in which cuBLAS is faster."""
    lines = [f"On {result['device']}, {result['tokens']} tokens, rank {RANK}.", "", table(result), "", _others(result), ""]
    slower = [one for one in result["products"] if one["ours"]["median"] > one["torch"]["median"]]
    lines.append(f"- cuBLAS and `addmm_` are faster in {len(slower)} of {len(result['products'])} products")
    return "\n".join([*lines, *(f"- not measured: {one}" for one in result["left_out"])])


def table(result: Result) -> str:
    """A row per product: milliseconds, and the rate of ours."""
    heads = ["model", "layer", "pass", "K → N", "one kernel, ms", "cuBLAS and addmm, ms", "cuBLAS alone, ms", "TFLOP/s"]
    rows = [
        [
            *(one["model"], one["layer"], one["direction"], f"{one['K']} → {one['N']}"),
            *(f"{one[name]['median']:.3f}" for name in ("ours", "torch", "product_alone")),
            _rate(one["operations"], one["ours"]["median"], 1e9),
        ]
        for one in result["products"]
    ]
    return markdown(heads, rows, left=4)


def _others(result: Result) -> str:
    heads = ["kernel", "ours, ms", "torch, ms", "times as fast", "GB/s"]
    rows = []
    for one in result["others"]:
        ours, torchs = one["ours"]["median"], one["torch"]["median"]
        rate, factor = _rate(one["megabytes"], ours, 1.0), f"{torchs / ours:.2f}" if ours else ""
        rows.append([one["kernel"], f"{ours:.3f}", f"{torchs:.3f}", factor, rate])
    return markdown(heads, rows, left=1)


def _rate(amount: float, milliseconds: float, unit: float) -> str:
    """Per second; empty for a device that measures no time."""
    return f"{amount / unit / milliseconds:.0f}" if milliseconds else ""


if __name__ == "__main__":
    main()
