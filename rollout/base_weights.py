"""vLLM's base weights: how they are loaded, and views of them.

    EngineArgs(**loading(("model.layers.0.self_attn.q_proj.weight", ...), (), keep_linear_weights=False), ...)
    find_base_weights(vllm_model)["model.layers.0.self_attn.q_proj.weight"]   # a view of vLLM's memory, [d_out, d_in]

`find_base_weights` uses the names of transformers: q, k, v (or gate, up) for the rows of a packed layer. The loader is vLLM's
default loader with three additions. It can read the files that the trainer reads, in a folder where vLLM would read others.
It can round weights to NF4 and back, because vLLM (0.32) cannot serve weights packed by bitsandbytes while the trainer computes
with them. And it can keep linear weights in their original layout on CPU, where vLLM would repack them and drop the originals.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.nf4 import Nf4Weight
from .layer_names import weights_by_transformers_names
from .vllm_compat import keep_linear_weights, require

LOAD_FORMAT = "rankup"


def loading(nf4_weights: Sequence[str], files: Sequence[str], *, keep_linear_weights: bool) -> dict[str, Any]:
    """The engine's arguments for its loader; none if vLLM's default loader will do.

    Args:
        nf4_weights: names of the weights to round, as in the model's files.
        files: names of the files in the model's folder to read; none: those that vLLM finds.
        keep_linear_weights: keep linear weights in their original layout, also on CPU.
    """
    if not nf4_weights and not keep_linear_weights and not files:
        return {}
    _register_loader()
    extra = {"nf4_weights": list(nf4_weights), "keep_linear_weights": keep_linear_weights, "files": list(files)}
    return {"load_format": LOAD_FORMAT, "model_loader_extra_config": extra}


def find_base_weights(vllm_model: nn.Module, model_path: str) -> dict[str, torch.Tensor]:
    """Views of all weights that vLLM holds in their original layout, without its padding, by their names in transformers.

    Raises:
        ValueError: the installed vLLM does not say which layers it packs.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    packed: dict[str, list[str]] = require(vllm_model, "packed_modules_mapping", purpose="find base weights")
    found: dict[str, torch.Tensor] = {}
    for wrapped_name, module in vllm_model.named_modules():
        name = wrapped_name.removesuffix(".base_layer")
        parent, _, layer = name.rpartition(".")
        prefix = f"{parent}." if parent else ""
        for kind, parameter in module.named_parameters(recurse=False):
            tensor = parameter.detach()
            if isinstance(module, LinearBase):
                parts, rows = packed.get(layer, [layer]), getattr(module, "output_sizes", [])
                if parts == [layer]:  # packed in transformers too, or not at all
                    found[f"{prefix}{layer}.{kind}"] = tensor
                elif len(parts) == len(rows) and tensor.shape[:1] == (sum(rows),):
                    views = tensor.split(list(rows))
                    found |= {f"{prefix}{part}.{kind}": view for part, view in zip(parts, views, strict=True)}
            elif isinstance(module, VocabParallelEmbedding):
                found[f"{name}.{kind}"] = tensor[: module.org_vocab_size]
            else:
                found[f"{name}.{kind}"] = tensor
    return weights_by_transformers_names(vllm_model, found, model_path)


@functools.cache
def _register_loader() -> None:
    """Register the loader with vLLM."""
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
            self.files: list[str] = extra["files"]

        def _prepare_weights(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> tuple[str, list[str], bool, str]:
            if not self.files:
                return super()._prepare_weights(model_name_or_path, *args, **kwargs)
            paths = [str(Path(model_name_or_path, name)) for name in self.files]
            return model_name_or_path, paths, paths[0].endswith(".safetensors"), "model.safetensors.index.json"

        def get_all_weights(
            self, model_config: ModelConfig, model: nn.Module
        ) -> Generator[tuple[str, torch.Tensor], None, None]:
            device, missing = next(model.parameters()).device, set(self.nf4_weights)
            for name, tensor in super().get_all_weights(model_config, model):
                if name in self.nf4_weights:
                    missing.remove(name)
                    yield name, Nf4Weight.quantise(tensor.to(device, model_config.dtype)).dense()
                else:
                    yield name, tensor
            if missing:
                raise ValueError(f"model.load_in: the model's files have no weight {min(missing)}: remove this option")

        def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
            super().load_weights(model, model_config)
            if self.keep_linear_weights:
                keep_linear_weights(model)

    register_model_loader(LOAD_FORMAT)(Loader)
