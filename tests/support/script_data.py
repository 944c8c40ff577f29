"""What the scripts of `tests/scripts_of_trl` read: rows, a sequence classifier, and an adapter, all tiny.

make_data(tmp_path / "data", model=make_tiny_model(tmp_path / "model", "llama"))
"""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import VOCABULARY, tiny_tokenizer


def make_data(folder: Path, *, model: Path) -> Path:
    """Write `train.jsonl`, `test.jsonl`, `classifier/` and `adapter/`, a LoRA of rank 4 on `model`; returns the folder."""
    folder.mkdir(parents=True)
    rows = [{"prompt": f"count to {n}", "target": n} for n in range(16)]
    for name, part in (("train", rows[:12]), ("test", rows[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    _make_classifier(folder / "classifier")
    _make_adapter(folder / "adapter", model)
    return folder


def _make_classifier(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _make_adapter(folder: Path, model: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        get_peft_model(base, config).save_pretrained(str(folder))
