"""Adapters made by stock PEFT on a tiny model, what they compute in stock PEFT, and changes to their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save_stock_adapter(model_path: Path, folder: Path, *, strength: float = 0.1, **options: Any) -> Path:
    """Write an adapter with normal A and B to a folder; `options` are those of PEFT's `LoraConfig`."""
    options = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj"]} | options
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)
    model.save_pretrained(str(folder))
    return folder


def stock_logprobs(model_path: Path, adapter: Path, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of each token after the first, by transformers and PEFT in fp64."""
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), str(adapter)).double()
    found = []
    for ids in map(torch.tensor, sequences):
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        found.append(logprobs[:-1].gather(1, ids[1:, None])[:, 0].tolist())
    return found


def change_config(folder: Path, **values: Any) -> None:
    """Set fields of an adapter's configuration."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of an adapter's file."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
