"""The section `model` of a run's configuration: the base model. Imports no torch."""

from typing import Literal

from pydantic import Field

from ...section import Section


class ModelConfig(Section):
    """The base model."""

    name: str = Field(default="smollm2-135m-instruct", min_length=1)
    """Model to train: `smollm2-135m-instruct` (embedded, offline), a local folder, or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. None: the default branch."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base weights and of the adapter that vLLM samples with. Adapter masters are always float32."""

    load_in: Literal["nf4"] | None = None
    """Round the base's linear layers, but for the head, to 4 bits (NF4, bitsandbytes) for trainer and sampler: `nf4`. The
    trainer holds them packed; vLLM cannot and holds what they stand for, in `dtype`. None: as they are."""

    share_base_weights: Literal["auto"] | bool = "auto"
    """Build the trainer's model on vLLM's own base weights: `true`, `false`, or `auto`, which shares what vLLM keeps as it was
    loaded: on CUDA everything, on CPU all but the weights of linear layers. There `true` makes vLLM keep these too, which
    slows sampling down."""
