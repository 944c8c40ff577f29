"""What each kernel of a training step is tried on, and what plain torch computes in its place: the section `self-test`.

    for finding in examine(CHECKS): ...
    compare("RMSNorm", MAKERS["RMSNorm"](Numbers("cuda", torch.bfloat16)))
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from ....kernels.logprob import Head, linear_logprob_loss
from ....kernels.lora import Adapter, Projection, lora_embedding, lora_linear, lora_mlp, lora_projections
from ....kernels.nf4 import BLOCKSIZE, Nf4Weight
from ....kernels.rms_norm import rms_norm
from ....kernels.shared_prompt_attention import SharedPromptLayout, shared_prompt_attention
from .compare import Case, compare
from .findings import Check, Finding

TOKENS, WIDTH, MLP_WIDTH, RANK, VOCABULARY = 300, 576, 1536, 64, 5003
SCALING = 0.5  # a power of two, so that `b` of the adapter is exact in every dtype
EPS = 1e-5
GROUPS = ((40, (30, 0, 17, 30)), (1, (9, 25)))  # tokens of each prompt and of its completions


class Numbers:
    """Random tensors whose numbers are of the dtype; those of the masters are fp32 ones."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def weight(self, out: int, width: int) -> torch.Tensor:
        return self.normal(out, width, scale=width**-0.5)

    def masters(self, out: int, width: int) -> list[torch.Tensor]:
        """A [R, width] and B [out, R] of an adapter, in fp32."""
        return [self.weight(RANK, width).float(), self.weight(out, RANK).float()]

    def ids(self, count: int, below: int) -> torch.Tensor:
        return torch.randint(0, below, (count,), generator=self.generator).to(self.device)


def _adapter(master_a: torch.Tensor, master_b: torch.Tensor, dtype: torch.dtype) -> Adapter:
    """Its operands as the sampler would have them."""
    a, b = master_a.detach().to(dtype), (SCALING * master_b.detach()).to(dtype)
    return Adapter(master_a, master_b, a, b, SCALING)


def _plain_linear(x: torch.Tensor, weight: torch.Tensor, master_a: torch.Tensor, master_b: torch.Tensor) -> torch.Tensor:
    a, b = master_a.to(x.dtype), SCALING * master_b.to(x.dtype)
    return x @ weight.t() + x @ a.t() @ b.t()


def _lora_linear(numbers: Numbers) -> Case:
    out = WIDTH + 24

    def ours(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        return [lora_linear(x, Projection(weight, None, _adapter(a, b, x.dtype)))]

    def plain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        return [_plain_linear(x, weight, a, b)]

    leaves = [numbers.normal(TOKENS, WIDTH), *numbers.masters(out, WIDTH)]
    return Case(leaves=leaves, constants=[numbers.weight(out, WIDTH)], ours=ours, plain=plain)


def _lora_projections(numbers: Numbers) -> Case:
    widths = (WIDTH, 64, 64)

    def ours(x: torch.Tensor, *rest: torch.Tensor) -> Sequence[torch.Tensor]:
        return lora_projections(x, _layers(x, rest))

    def plain(x: torch.Tensor, *rest: torch.Tensor) -> Sequence[torch.Tensor]:
        return [_plain_linear(x, weight, a, b) for weight, a, b in _parts(rest)]

    masters = [master for out in widths for master in numbers.masters(out, WIDTH)]
    weights = [numbers.weight(out, WIDTH) for out in widths]
    return Case(leaves=[numbers.normal(TOKENS, WIDTH), *masters], constants=weights, ours=ours, plain=plain)


def _parts(rest: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(weight, A, B) of three layers, from their masters and then their weights."""
    masters, weights = rest[:6], rest[6:]
    return zip(weights, masters[::2], masters[1::2], strict=True)


def _layers(x: torch.Tensor, rest: Sequence[torch.Tensor]) -> list[Projection]:
    return [Projection(weight, None, _adapter(a, b, x.dtype)) for weight, a, b in _parts(rest)]


def _lora_mlp(numbers: Numbers) -> Case:
    sizes = ((MLP_WIDTH, WIDTH), (MLP_WIDTH, WIDTH), (WIDTH, MLP_WIDTH))

    def ours(x: torch.Tensor, *rest: torch.Tensor) -> Sequence[torch.Tensor]:
        return [lora_mlp(x, _layers(x, rest), "silu")]

    def plain(x: torch.Tensor, *rest: torch.Tensor) -> Sequence[torch.Tensor]:
        gate, up, down = _parts(rest)
        return [_plain_linear(F.silu(_plain_linear(x, *gate)) * _plain_linear(x, *up), *down)]

    masters = [master for size in sizes for master in numbers.masters(*size)]
    weights = [numbers.weight(*size) for size in sizes]
    return Case(leaves=[numbers.normal(TOKENS, WIDTH), *masters], constants=weights, ours=ours, plain=plain)


def _lora_embedding(numbers: Numbers) -> Case:
    def ours(embedded: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Sequence[torch.Tensor]:
        return [lora_embedding(ids, embedded, _adapter(a, b, embedded.dtype))]

    def plain(embedded: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Sequence[torch.Tensor]:
        return [embedded + F.embedding(ids, a.t().to(embedded.dtype)) @ (SCALING * b.to(embedded.dtype)).t()]

    leaves = [numbers.normal(TOKENS, WIDTH), *numbers.masters(WIDTH, VOCABULARY)]
    return Case(leaves=leaves, constants=[numbers.ids(TOKENS, 50)], ours=ours, plain=plain)


def _rms_norm(numbers: Numbers) -> Case:
    def ours(x: torch.Tensor, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        return [rms_norm(x, weight, EPS), rms_norm(x, weight, EPS, unit_offset=True)]

    def plain(x: torch.Tensor, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return [weight * normed.to(x.dtype), (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)]

    return Case(leaves=[numbers.normal(TOKENS, WIDTH)], constants=[numbers.normal(WIDTH)], ours=ours, plain=plain)


def _logprobs(numbers: Numbers) -> Case:
    """Log-probabilities and entropies, and the gradients of a loss of both for hidden states and for the head's adapter."""

    def loss(logprobs_N: torch.Tensor, entropy_N: torch.Tensor) -> torch.Tensor:
        return (logprobs_N * torch.linspace(-1, 2, len(logprobs_N)).to(logprobs_N) - 0.1 * entropy_N).sum()

    def ours(
        hidden: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        head = Head(weight_VD=weight, adapter=_adapter(a, b, hidden.dtype))
        some = 100 * VOCABULARY * hidden.itemsize  # several chunks, each of which is formed twice
        return linear_logprob_loss(
            hidden, head, targets, lambda logprobs, entropy, tokens: loss(logprobs, entropy), passes=2, chunk_bytes=some
        )

    def plain(
        hidden: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        logits_NV = _plain_linear(hidden, weight, a, b)
        log_p_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)
        logprobs_N, entropy_N = log_p_NV.gather(1, targets[:, None])[:, 0], -(log_p_NV.exp() * log_p_NV).sum(-1)
        return [loss(logprobs_N, entropy_N), logprobs_N.detach(), entropy_N.detach()]

    leaves = [numbers.normal(TOKENS, WIDTH), *numbers.masters(VOCABULARY, WIDTH)]
    constants = [numbers.weight(VOCABULARY, WIDTH), numbers.ids(TOKENS, VOCABULARY)]
    return Case(leaves=leaves, constants=constants, ours=ours, plain=plain)


def _attention(numbers: Numbers) -> Case:
    """Grouped queries; every completion by itself behind its prompt, under a causal mask, is the plain form."""
    heads, key_heads, dim = 6, 2, 64
    layout = SharedPromptLayout.build(GROUPS, numbers.device)
    rows = [
        [*range(group.prompt.start, group.prompt.stop), *range(part.start, part.stop)]
        for group in layout.groups
        for part in group.completions
    ]

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sequence[torch.Tensor]:
        query_HLD, key_KLD, value_KLD = (t.transpose(0, 1) for t in (query, key, value))
        return [shared_prompt_attention(query_HLD, key_KLD, value_KLD, layout, None)]

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sequence[torch.Tensor]:
        out_LHD = torch.zeros_like(query)
        for row in rows:
            tokens = torch.tensor(row, device=query.device)
            out_LHD = out_LHD.index_copy(0, tokens, _causal_attention(query[tokens], key[tokens], value[tokens]))
        return [out_LHD]

    leaves = [numbers.normal(layout.length, count, dim) for count in (heads, key_heads, key_heads)]
    return Case(leaves=leaves, constants=[], ours=ours, plain=plain)


def _causal_attention(query_LHD: torch.Tensor, key_LKD: torch.Tensor, value_LKD: torch.Tensor) -> torch.Tensor:
    query_HLD, key_KLD, value_KLD = (t.transpose(0, 1) for t in (query_LHD, key_LKD, value_LKD))
    key_HLD, value_HLD = (t.repeat_interleave(len(query_HLD) // len(t), 0) for t in (key_KLD, value_KLD))
    scores_HLL = query_HLD @ key_HLD.transpose(1, 2) * query_HLD.shape[-1] ** -0.5
    future_LL = torch.ones_like(scores_HLL[0], dtype=torch.bool).triu(1)
    wide = torch.promote_types(scores_HLL.dtype, torch.float32)
    weights_HLL = scores_HLL.masked_fill(future_LL, float("-inf")).softmax(-1, dtype=wide).to(query_HLD.dtype)
    return (weights_HLL @ value_HLD).transpose(0, 1)


def _nf4(numbers: Numbers) -> Case:
    """A weight formed again from its 4 bits: two values a byte, the first in the upper half, times the scale of their block."""
    from bitsandbytes.functional import get_4bit_type

    rounded = Nf4Weight.quantise(numbers.weight(MLP_WIDTH, WIDTH))

    def ours(packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> Sequence[torch.Tensor]:
        return [Nf4Weight(packed, absmax, rounded.shape, rounded.dtype).dense()]

    def plain(packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> Sequence[torch.Tensor]:
        bits = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().int()
        values = code[bits].view(-1, BLOCKSIZE) * absmax[:, None]
        return [values.view(rounded.shape).to(values.dtype if values.dtype == torch.float64 else rounded.dtype)]

    code = get_4bit_type("nf4", device=numbers.device)
    return Case(leaves=[], constants=[rounded.packed, rounded.absmax, code], ours=ours, plain=plain)


MAKERS: dict[str, Callable[[Numbers], Case]] = {
    "LoRA, a layer": _lora_linear,
    "LoRA, q/k/v": _lora_projections,
    "LoRA, an MLP": _lora_mlp,
    "LoRA, the embedding": _lora_embedding,
    "RMSNorm": _rms_norm,
    "log-probabilities": _logprobs,
    "attention": _attention,
    "NF4": _nf4,
}


def try_kernel(name: str, make: Callable[[Numbers], Case], dtype: torch.dtype) -> Iterator[Finding]:
    """One kernel on the device that is there."""
    if make is _nf4 and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding(name=name, value="not tried", level="warning", note="bitsandbytes is not installed")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield compare(name, make(Numbers(device, dtype)))


CHECKS: dict[str, Check] = {
    f"{name}, {label}": partial(try_kernel, f"{name}, {label}", make, dtype)
    for name, make in MAKERS.items()
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
}
