"""PEFT's side of the policy: which layers get an adapter, how it begins, and whether a saved one fits.

    peft_model = inject(model, lora, seed=0)        # LoRA layers of ours inside the model, PEFT's names and files
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from .config import LoraConfig
from .lora_layers import FusedLoRALinear


def check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    head = model.get_output_embeddings()
    for target in targets:
        modules = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not modules:
            raise ValueError(f"lora.targets: {type(model).__name__} has no layer {target}")
        if any(module is head or not isinstance(module, nn.Linear) for module in modules):
            raise ValueError(f"lora.targets: {target} cannot be adapted: only linear layers before the head can")


def inject(base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        use_rslora=lora.use_rslora,
        target_modules=list(lora.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: FusedLoRALinear})
    # PEFT draws A from the global generator; the run's seed, and nothing that ran before, decides what it draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(base, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model
