"""Which dtype real models are tested in on this CPU."""

import torch


def fast_dtype() -> str:
    """`bfloat16` if the CPU multiplies it natively (AVX-512), else `float32`: emulated, bf16 is 50 times slower."""
    is_native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if is_native else "float32"
