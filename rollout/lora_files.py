"""Adapters in files as vLLM loads them: which layers they may have, and the empty one that an engine registers.

    check_loadable(manager, slots, ("q_proj", "lm_head"))       # vLLM's `LoRAModelManager`
    write_empty_adapter(folder, slots, settings)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .engine_settings import EngineSettings
from .slots import EMBEDDING, HEAD, AdapterSlot
from .vllm_compat import require


def check_loadable(manager: Any, slots: Mapping[str, AdapterSlot], targets: Sequence[str]) -> None:
    """Whether an engine has a slot for each target, and vLLM could serve the trained adapter from its file.

    Args:
        targets: last parts of the layers' names.

    Raises:
        ValueError: it has not, or could not.
    """
    found = {name.rpartition(".")[2] for name in slots}
    missing = [name for name in targets if name not in found]
    if missing:
        raise ValueError(f"vLLM has no LoRA layer for {missing} in this model (it has {sorted(found)}): change lora.targets")
    supported = require(manager, "supported_lora_modules", purpose="check which adapters it can load")
    packed = require(manager, "packed_modules_mapping", purpose="check which adapters it can load")
    loadable = {part for layer in supported for part in packed.get(layer, [layer])}
    if found == {HEAD} and HEAD not in loadable:  # Qwen2: vLLM has a LoRA layer for the head but rejects files that name it
        raise ValueError(f"vLLM cannot load an adapter on {HEAD} alone for this model: add another layer to lora.targets")
    for name in targets:
        # Qwen2's and Mistral's embedding; layers that transformers packs and vLLM expects in parts.
        if name != HEAD and name not in loadable:
            raise ValueError(f"vLLM cannot load an adapter on {name} for this model: remove it from lora.targets")


def write_empty_adapter(folder: Path, slots: Mapping[str, AdapterSlot], settings: EngineSettings) -> None:
    """Write the adapter that is registered with vLLM: zeros for one layer. The policy then writes to its buffers directly."""
    import torch
    from safetensors.torch import save_file

    kinds = {name: name.rpartition(".")[2] for name in slots if name.rpartition(".")[2] in settings.target_modules}
    # Prefer a small layer. The head comes last because vLLM rejects files that name it for some models.
    name = min(kinds, key=lambda name: (kinds[name] == HEAD, kinds[name] == EMBEDDING))
    key = "lora_embedding_{}" if kinds[name] == EMBEDDING else "lora_{}.weight"
    tensors = {
        f"base_model.model.{name}.{key.format('A')}": torch.zeros(settings.max_rank, slots[name].a.shape[1]),
        f"base_model.model.{name}.{key.format('B')}": torch.zeros(slots[name].b.shape[0], settings.max_rank),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": settings.max_rank,
        "lora_alpha": settings.max_rank,
        "target_modules": list(settings.target_modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
