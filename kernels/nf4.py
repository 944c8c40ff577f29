"""Frozen weights in 4 bits: NF4 (arXiv 2305.14314) by bitsandbytes, 0.5625 bytes a value.

    weight = Nf4Weight.quantise(linear.weight)      # packed, with one fp32 scale per block of 64 values
    y = x @ weight.dense().t()                      # dequantised before each product, to the original dtype

The scales are not quantised (no double quantisation), so rounding is idempotent in bf16 and fp32: quantising `dense()` again
gives the same bits. A model whose weights were rounded in this way while loading (the sampler's) therefore has exactly the
values of `dense()`. transformers' `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` gives the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .device import runs_triton

BLOCKSIZE = 64
QUANT_TYPE = "nf4"
PIECE = 2**16  # values; a multiple of the block's


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Weight:
    """A weight [O, I] in 4 bits.

    packed: two values a byte, uint8.
    absmax: the scale of each block, fp32.
    shape, dtype: of the dequantised weight.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def quantise(weight: torch.Tensor) -> Nf4Weight:
        """Round `weight`, of any shape in fp32, bf16 or fp16, on its device."""
        from bitsandbytes.functional import quantize_4bit  # this import takes a second

        # In pieces on CPU, where bitsandbytes compares each value with all 16 codes together, taking some 200 bytes a value.
        flat = weight.reshape(-1)
        pieces = flat.split(PIECE) if flat.device.type == "cpu" else (flat,)
        packed, states = zip(*(quantize_4bit(p, blocksize=BLOCKSIZE, quant_type=QUANT_TYPE) for p in pieces), strict=True)
        return Nf4Weight(torch.cat(packed), torch.cat([state.absmax for state in states]), weight.shape, weight.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the packed weight."""
        return self.packed.device

    def dense(self) -> torch.Tensor:
        """The weight as a new tensor: `code * scale` in fp32, rounded once."""
        if runs_triton(self.absmax):
            from .triton.nf4 import dequantise

            code = _code(self.device)
            return dequantise(self.packed, self.absmax, code, self.shape, self.dtype, blocksize=BLOCKSIZE)
        import bitsandbytes  # noqa: F401  # registers the operator

        # As one row: for a matrix, bitsandbytes' CPU kernel assumes that rows consist of complete blocks.
        flat = (self.shape.numel(),)
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.absmax, BLOCKSIZE, QUANT_TYPE, flat, self.dtype
        ).view(self.shape)


@functools.cache
def _code(device: torch.device) -> torch.Tensor:
    """The values of the 16 codes."""
    from bitsandbytes.functional import get_4bit_type

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # bitsandbytes' choice otherwise: bf16 while vLLM loads a model
    try:
        return get_4bit_type(QUANT_TYPE, device=device)
    finally:
        torch.set_default_dtype(before)
