"""Tiny models that call a tool: random ones after some steps of supervised training on what they shall write.

    folder = make_calling_model(tmp_path / "model", multiply, {"a": 6, "b": 7})

The tokenizer has the chat template of Qwen 3, which TRL knows. After a prompt the model writes the call, after a result
`The answer is 42.`, most of the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dialects import dialect_tokenizer, template_of


def make_calling_model(
    folder: Path, tool: Callable[..., Any], arguments: Mapping[str, Any], *, answer: str = "The answer is 42."
) -> Path:
    """Write the model with its tokenizer to `folder`, in fp32; returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer = dialect_tokenizer(template_of("qwen3"), eos="<|im_end|>", plain=("<tool_call>", "</tool_call>"))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    call = {"name": tool.__name__, "arguments": dict(arguments)}
    asked = [{"role": "user", "content": "count to 7"}]
    called = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": tool.__name__, "content": "42"},
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        losses = [1.0]
        while max(losses) > 0.05:
            losses = []
            for messages, turn in (
                (asked, f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>"),
                (asked + called, f"{answer}<|im_end|>"),
            ):
                loss = _loss(model, tokenizer, messages, tool, turn)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _loss(model: Any, tokenizer: Any, messages: list[dict[str, Any]], tool: Callable[..., Any], turn: str) -> Any:
    """Of a turn behind these messages."""
    import torch

    prompt = tokenizer.apply_chat_template(messages, tools=[tool], add_generation_prompt=True, return_dict=False)
    ids = tokenizer(turn, add_special_tokens=False)["input_ids"]
    labels = [*[-100] * len(prompt), *ids]
    return model(input_ids=torch.tensor([[*prompt, *ids]]), labels=torch.tensor([labels])).loss
