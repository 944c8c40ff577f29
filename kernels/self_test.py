"""Self-test of the kernels: each one against plain torch, both against plain torch in fp64.

    result = self_test("RMSNorm", torch.bfloat16, "cuda")      # a name of `CASES`
    assert result.passed, f"error {result.error}, bound {result.bound}"

Outputs and gradients are compared. The error of a tensor is the norm of its difference from fp64, relative to the norm of the
fp64 tensor. A kernel's error may be at most `ALLOWANCE` times that of plain torch in the same dtype on the same device, or
fp32's epsilon if that is more.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional as F

from .logprob import Head, linear_logprob_loss
from .lora import Adapter, Projection, lora_embedding, lora_linear, lora_mlp, lora_projections
from .nf4 import BLOCKSIZE, Nf4Weight
from .rms_norm import rms_norm
from .shared_prompt_attention import SharedPromptLayout, shared_prompt_attention

ALLOWANCE = 2.0
FP32_EPSILON = torch.finfo(torch.float32).eps  # no kernel computes in more than fp32

TOKENS, WIDTH, MLP_WIDTH, RANK, VOCABULARY = 300, 576, 1536, 64, 5003
SCALING = 0.5  # a power of two: `b` of the adapter is exact in every dtype
RMS_EPS = 1e-5
GROUPS = ((40, (30, 0, 17, 30)), (1, (9, 25)))  # tokens of each prompt and of its completions

Function = Callable[..., Sequence[Tensor]]
Normal = Callable[..., Tensor]  # (*shape, scale=1.0) -> random values that are representable in the kernel's dtype


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel and its reference.

    inputs: gradients are compared for those that require one.
    kernel, reference: called with the inputs, return tensors. `reference` is plain torch and is also called with fp64 inputs. A
        returned scalar is differentiated, but not compared: errors in a sum may cancel.
    """

    inputs: Sequence[Tensor]
    kernel: Function
    reference: Function


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tensor whose relative error is closest to its bound, or furthest above it; seconds that the kernel took."""

    error: float
    bound: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


def self_test(name: str, dtype: torch.dtype, device: str) -> Comparison:
    """Run one of `CASES`."""
    return compare(make_case(name, dtype, device))


def make_case(name: str, dtype: torch.dtype, device: str) -> Case:
    """One of `CASES`, with random inputs on a device: master weights are fp32, other floating-point inputs `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    return CASES[name](normal)


def compare(case: Case) -> Comparison:
    """Run kernel and reference, forward and backward."""
    started = time.perf_counter()
    results = _outputs_and_gradients(case.kernel, case.inputs)
    if results[0].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    plain = _outputs_and_gradients(case.reference, case.inputs)
    exact = _outputs_and_gradients(case.reference, [t.double() if t.is_floating_point() else t for t in case.inputs])
    comparisons = [
        Comparison(_error(ours, true), max(ALLOWANCE * _error(torchs, true), FP32_EPSILON), seconds)
        for ours, torchs, true in zip(results, plain, exact, strict=True)
        if ours.dim()
    ]
    return max(comparisons, key=lambda one: (not one.passed, one.error / one.bound))


def _outputs_and_gradients(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    outputs = list(function(*inputs))
    generator = torch.Generator().manual_seed(0)
    differentiable = [output for output in outputs if output.requires_grad]
    # Small integers, which are exact in every dtype.
    directions = [torch.randint(-4, 5, output.shape, generator=generator).to(output) for output in differentiable]
    leaves = [t for t in inputs if t.requires_grad]
    return [*outputs, *(torch.autograd.grad(differentiable, leaves, directions) if leaves else ())]


def _error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def _wide(x: Tensor) -> Tensor:
    """In fp32; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _master_weights(normal: Normal, out: int, width: int) -> tuple[Tensor, Tensor]:
    """A [R, width] and B [out, R] of an adapter, in fp32."""
    a, b = normal(RANK, width, scale=width**-0.5), normal(out, RANK, scale=RANK**-0.5)
    return a.float().requires_grad_(), b.float().requires_grad_()


def _ids(like: Tensor, below: int) -> Tensor:
    """A token id for each row of a tensor."""
    return torch.arange(len(like), device=like.device) * 7919 % below


def _adapter(master_a: Tensor, master_b: Tensor, dtype: torch.dtype) -> Adapter:
    """The master weights, and the operands that the sampler would have."""
    return Adapter(master_a, master_b, master_a.detach().to(dtype), SCALING * master_b.detach().to(dtype), SCALING)


def _projection(weight: Tensor, master_a: Tensor, master_b: Tensor) -> Projection:
    return Projection(weight, None, _adapter(master_a, master_b, weight.dtype))


def _plain_layer(weight: Tensor, master_a: Tensor, master_b: Tensor) -> Callable[[Tensor], Tensor]:
    a, b = master_a.to(weight.dtype), SCALING * master_b.to(weight.dtype)
    return lambda x: x @ weight.t() + x @ a.t() @ b.t()


def _layers(shapes: Sequence[tuple[int, int]], kernel: Function, reference: Function, normal: Normal) -> Case:
    """Layers of `shapes` [O, I] with adapters: `kernel` takes x and a `Projection` each, `reference` x and a function each."""

    def run(function: Function, make_layer: Callable[..., object], x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        return function(x, *map(make_layer, tensors[::3], tensors[1::3], tensors[2::3]))

    layers = [(normal(out, width, scale=width**-0.5), *_master_weights(normal, out, width)) for out, width in shapes]
    inputs = [normal(TOKENS, shapes[0][1]).requires_grad_(), *itertools.chain(*layers)]
    return Case(inputs, partial(run, kernel, _projection), partial(run, reference, _plain_layer))


def _logprobs(normal: Normal) -> Case:
    """Log-probabilities and entropies, and the gradients of a loss of both for hidden states and the head's adapter."""

    def loss(logprobs_N: Tensor, entropy_N: Tensor, tokens: slice = slice(None)) -> Tensor:
        return (logprobs_N * torch.linspace(-1, 2, len(logprobs_N)).to(logprobs_N) - 0.1 * entropy_N).sum()

    def kernel(hidden_ND: Tensor, layer: Projection) -> Sequence[Tensor]:
        assert isinstance(layer.weight, Tensor)
        head = Head(weight_VD=layer.weight, adapter=layer.adapter)
        chunk_bytes = 100 * VOCABULARY * hidden_ND.itemsize  # several chunks, each of which is formed twice
        return linear_logprob_loss(hidden_ND, head, _ids(hidden_ND, VOCABULARY), loss, passes=2, chunk_bytes=chunk_bytes)

    def reference(hidden_ND: Tensor, head: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        tokens = Categorical(logits=_wide(head(hidden_ND)))
        logprobs_N, entropy_N = tokens.log_prob(_ids(hidden_ND, VOCABULARY)), tokens.entropy()
        return [loss(logprobs_N, entropy_N), logprobs_N.detach(), entropy_N.detach()]

    return _layers([(VOCABULARY, WIDTH)], kernel, reference, normal)


def _embedding(normal: Normal) -> Case:
    """With repeated ids, whose gradients add up."""
    return Case(
        [normal(TOKENS, WIDTH).requires_grad_(), *_master_weights(normal, WIDTH, VOCABULARY)],
        lambda x, a, b: [lora_embedding(_ids(x, 50), x, _adapter(a, b, x.dtype))],
        lambda x, a, b: [x + F.embedding(_ids(x, 50), a.t().to(x.dtype)) @ (SCALING * b.to(x.dtype)).t()],
    )


def _rms_norm(normal: Normal) -> Case:
    def kernel(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return [rms_norm(x, weight, RMS_EPS), rms_norm(x, weight, RMS_EPS, unit_offset=True)]

    def reference(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        normed = F.rms_norm(_wide(x), (WIDTH,), eps=RMS_EPS)
        return [weight * normed.to(x.dtype), (normed * (1.0 + _wide(weight))).to(x.dtype)]

    return Case([normal(TOKENS, WIDTH).requires_grad_(), normal(WIDTH)], kernel, reference)


def _attention(normal: Normal) -> Case:
    """Grouped-query attention over shared prompts; the reference masks the scores of all pairs of tokens."""
    heads, key_heads, dim = 6, 2, 64
    length = sum(prompt + sum(completions) for prompt, completions in GROUPS)
    query, key, value = (normal(length, count, dim).requires_grad_() for count in (heads, key_heads, key_heads))
    layout = SharedPromptLayout.build(GROUPS, query.device)
    allowed_LL = torch.zeros(length, length, dtype=torch.bool, device=query.device)
    for group in layout.groups:
        for tokens in (group.prompt, *group.completions):
            allowed_LL[tokens, group.prompt] = allowed_LL[tokens, tokens] = True
    allowed_LL = allowed_LL.tril()

    def kernel(*query_key_value: Tensor) -> Sequence[Tensor]:
        query_HLD, key_KLD, value_KLD = (t.transpose(0, 1) for t in query_key_value)
        return [shared_prompt_attention(query_HLD, key_KLD, value_KLD, layout, None)]

    def reference(query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Sequence[Tensor]:
        key_LHD, value_LHD = (t.repeat_interleave(heads // key_heads, 1) for t in (key_LKD, value_LKD))
        scores_HLL = query_LHD.transpose(0, 1) @ key_LHD.permute(1, 2, 0) * dim**-0.5
        weights_HLL = _wide(scores_HLL.masked_fill(~allowed_LL, float("-inf"))).softmax(-1).to(query_LHD.dtype)
        return [(weights_HLL @ value_LHD.transpose(0, 1)).transpose(0, 1)]

    return Case([query, key, value], kernel, reference)


def _nf4(normal: Normal) -> Case:
    """Dequantization: two values per byte, the first in the upper half, times the scale of their block."""
    from bitsandbytes.functional import get_4bit_type

    weight = Nf4Weight.quantise(normal(MLP_WIDTH, WIDTH))

    def reference(packed: Tensor, absmax: Tensor, code: Tensor) -> Sequence[Tensor]:
        indices = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().int()
        values = (code[indices].view(-1, BLOCKSIZE) * absmax[:, None]).view(weight.shape)
        return [values if values.dtype == torch.float64 else values.to(weight.dtype)]

    return Case(
        [weight.packed, weight.absmax, get_4bit_type("nf4", device=weight.device)],
        lambda packed, absmax, code: [Nf4Weight(packed, absmax, weight.shape, weight.dtype).dense()],
        reference,
    )


QKV = [(WIDTH, WIDTH), (64, WIDTH), (64, WIDTH)]
MLP = [(MLP_WIDTH, WIDTH), (MLP_WIDTH, WIDTH), (WIDTH, MLP_WIDTH)]

CASES: dict[str, Callable[[Normal], Case]] = {
    "LoRA layer": partial(_layers, [(600, WIDTH)], lambda x, layer: [lora_linear(x, layer)], lambda x, layer: [layer(x)]),
    "LoRA q/k/v": partial(_layers, QKV, lambda x, *qkv: lora_projections(x, qkv), lambda x, *qkv: [layer(x) for layer in qkv]),
    "LoRA MLP": partial(
        _layers,
        MLP,
        lambda x, *layers: [lora_mlp(x, layers, "silu")],
        lambda x, gate, up, down: [down(F.silu(gate(x)) * up(x))],
    ),
    "LoRA embedding": _embedding,
    "RMSNorm": _rms_norm,
    "log-probabilities": _logprobs,
    "attention": _attention,
    "NF4": _nf4,
}
"""The kernels of a training step by name; `NF4` needs bitsandbytes."""
