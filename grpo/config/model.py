"""The section `model`: the base model. Imports no torch."""

import os.path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ...section import Section


class ModelConfig(Section):
    """The base model."""

    name: str = Field(default="smollm2-135m-instruct", min_length=1)
    """Model to train: `smollm2-135m-instruct` (embedded, offline), a local folder, or an id on the Hub."""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hub. None: the default branch."""

    tokenizer: Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)] | None = None
    """Tokenizer, if it is not the model's: a local folder, or an id on the Hub. Prompts are encoded and completions decoded
    with it. None: the model's own."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of the base weights and of the adapter that vLLM samples with. The adapter's master weights are always
    float32. `float16` is for GPUs without bfloat16 (before Ampere), and has a smaller gap between sampler and trainer
    (2510.26788); its range ends at 65504, so gradients are computed with a loss scale (`optim.initial_loss_scale`), and
    models with larger weights or activations cannot use it (Gemma 2 and 3, GLM-4)."""

    load_in: Literal["nf4"] | None = None
    """`nf4`: quantize the base model's linear layers, except the head, to 4 bits (NF4, bitsandbytes) for trainer and sampler.
    vLLM cannot read packed 4-bit weights and keeps the dequantized values in `dtype`, so this saves memory only where the
    trainer has a separate copy. None: no quantization."""

    share_base_weights: Literal["auto"] | bool = "auto"
    """Use vLLM's base weights in the trainer instead of a second copy: `true`, `false`, or `auto`, which shares weights that
    vLLM keeps in their original layout: on CUDA all, on CPU all but those of linear layers. On CPU, `true` makes vLLM keep
    these in their original layout too, which makes sampling slower."""
