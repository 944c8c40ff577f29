"""vLLM's base weights: as they are loaded, and where they lie.

    EngineArgs(**loading(nf4_weights=("model.layers.0.self_attn.q_proj.weight", ...), keep_linear_weights=False), ...)
    find_base_weights(vllm_model)["model.layers.0.self_attn.q_proj.weight"]   # a view of vLLM's own memory, [d_out, d_in]

`find_base_weights` names each weight as transformers does: rows of a packed layer (q, k, v; gate, up) by their parts. The
loader is vLLM's own with two additions. It rounds the weights that it is told to NF4 and back, since vLLM (0.32) cannot serve
weights that bitsandbytes has packed: so the sampler computes with what the trainer computes with. And it can keep linear layers
as they were loaded on CPU, where vLLM otherwise repacks them for its own products and drops the originals.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.nf4 import Nf4Weight
from .vllm_compat import keep_linear_weights, require

LOAD_FORMAT = "rankup"


def loading(*, nf4_weights: Sequence[str], keep_linear_weights: bool) -> dict[str, Any]:
    """The engine's arguments for its loader; vLLM's own where nothing is asked for.

    Args:
        nf4_weights: names, in the files of the model, of the weights to round.
        keep_linear_weights: keep linear layers as they are loaded, also on CPU.
    """
    if not nf4_weights and not keep_linear_weights:
        return {}
    _register_loader()
    extra = {"nf4_weights": list(nf4_weights), "keep_linear_weights": keep_linear_weights}
    return {"load_format": LOAD_FORMAT, "model_loader_extra_config": extra}


def find_base_weights(vllm_model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight that vLLM holds as it was loaded, by its name in transformers, without vLLM's padding; views, none a copy.

    Raises:
        ValueError: this vLLM names its packed layers otherwise.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    packed: dict[str, list[str]] = require(vllm_model, "packed_modules_mapping", purpose="find base weights")
    found: dict[str, torch.Tensor] = {}
    for wrapped_name, module in vllm_model.named_modules():
        name = wrapped_name.removesuffix(".base_layer")
        parent, _, own_name = name.rpartition(".")
        prefix = f"{parent}." if parent else ""
        for kind, parameter in module.named_parameters(recurse=False):
            tensor = parameter.detach()
            if isinstance(module, LinearBase):
                parts, rows = packed.get(own_name, [own_name]), getattr(module, "output_sizes", [])
                if parts == [own_name]:  # packed in transformers too, or not at all
                    found[f"{prefix}{own_name}.{kind}"] = tensor
                elif len(parts) == len(rows) and tensor.shape[:1] == (sum(rows),):
                    views = tensor.split(list(rows))
                    found |= {f"{prefix}{part}.{kind}": view for part, view in zip(parts, views, strict=True)}
            elif isinstance(module, VocabParallelEmbedding):
                found[f"{name}.{kind}"] = tensor[: module.org_vocab_size]
            else:
                found[f"{name}.{kind}"] = tensor
    return found


@functools.cache
def _register_loader() -> None:
    """Make the loader known to vLLM."""

    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class Loader(DefaultModelLoader):
        def __init__(self, load_config: LoadConfig) -> None:
            plain = copy.copy(load_config)
            plain.load_format, plain.model_loader_extra_config = "auto", {}
            super().__init__(plain)
            extra: dict[str, Any] = load_config.model_loader_extra_config  # type: ignore[assignment]
            self.nf4_weights = frozenset(extra["nf4_weights"])
            self.keep_linear_weights: bool = extra["keep_linear_weights"]

        def get_all_weights(
            self, model_config: ModelConfig, model: nn.Module
        ) -> Generator[tuple[str, torch.Tensor], None, None]:
            device, waiting = next(model.parameters()).device, set(self.nf4_weights)
            for name, tensor in super().get_all_weights(model_config, model):
                if name in self.nf4_weights:
                    waiting.remove(name)
                    yield name, Nf4Weight.quantise(tensor.to(device, model_config.dtype)).dense()
                else:
                    yield name, tensor
            if waiting:
                raise ValueError(f"model.load_in: the model has no weight {min(waiting)} in its files: leave this option out")

        def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
            super().load_weights(model, model_config)
            if self.keep_linear_weights:
                keep_linear_weights(model)

    register_model_loader(LOAD_FORMAT)(Loader)
