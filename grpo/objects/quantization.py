"""TRL's argument `quantization_config` as the option `model.load_in`.

    load_in, notes = quantization(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), dtype="bfloat16")
    load_in, notes      # "nf4", ("quantization_config: products are computed in bfloat16 (model.dtype), not in float32",)
"""

from __future__ import annotations

from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

INSTEAD = 'set BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), or model.load_in=nf4'


def quantization(config: QuantizationConfigMixin, *, dtype: str) -> tuple[str, tuple[str, ...]]:
    """The value of `model.load_in`, and notes about what differs from bitsandbytes. `dtype`: that of `model.dtype`.

    NF4 rounds weights to the same values. Their scales are not rounded a second time, and all products are in `dtype`.

    Raises:
        ValueError: it is not NF4, or keeps layers out of it that NF4 rounds here.
    """
    if not isinstance(config, BitsAndBytesConfig):
        raise ValueError(f"quantization_config: {type(config).__name__} is not supported; {INSTEAD}")
    method = config.quantization_method()
    if method != "nf4":
        what = {None: "it quantizes nothing", "llm_int8": "8 bits are not supported"}.get(method, f"{method} is not supported")
        raise ValueError(f"quantization_config: {what}; {INSTEAD}")
    skipped = sorted({*(config.llm_int8_skip_modules or ())} - {"lm_head"})
    if skipped:
        raise ValueError(
            f"quantization_config.llm_int8_skip_modules: {', '.join(skipped)} cannot be left out: all linear layers except the "
            "head are quantized"
        )
    notes = []
    compute_dtype = str(config.bnb_4bit_compute_dtype).removeprefix("torch.")
    if compute_dtype != dtype:
        notes.append(f"quantization_config: products are computed in {dtype} (model.dtype), not in {compute_dtype}")
    if config.bnb_4bit_use_double_quant:
        notes.append("quantization_config: no double quantization here; the scales of NF4 stay in float32")
    return "nf4", tuple(notes)
