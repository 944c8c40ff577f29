"""Tokenizers for chat templates: trained on a template, with the special tokens that it writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(trl.__file__).parent / "chat_templates"
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja"))

_SPECIAL = re.compile(
    r"<\|[a-zA-Z_0-9]+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|</?(?:start|end)_of_turn>|<end_of_utterance>|<\|[A-Z_]+\|>|\[gMASK\]|<sop>"
    r'|<\|"\|>'
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}<tools>"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>\n\n')[-1] }}"
    '{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ "\n" }}{% endif %}'
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n"
    "{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
OWN = {"chatml": CHATML, "smollm2": SMOLLM2, "gemma_1": GEMMA, "qwen3_small": QWEN3, "llama3_small": LLAMA3}
"""Small templates in the manner of those families."""


def schema(name: str, **parameters: str) -> dict[str, Any]:
    """A tool with parameters of these types."""
    properties = {key: {"type": kind, "description": f"The {key}."} for key, kind in parameters.items()}
    described = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": described}}


SCHEMAS = [schema("add", a="integer", b="integer"), schema("look_up", word="string", flag="boolean")]


def template_of(name: str) -> str:
    """The text of a template of TRL or of `OWN`."""
    return OWN[name] if name in OWN else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def dialect_tokenizer(
    template: str, *, eos: str | None = None, plain: tuple[str, ...] = (), has_metaspace: bool = False
) -> Any:
    """A byte-level BPE tokenizer, or one like Llama 2's, with the special tokens that are in a template.

    Args:
        eos: its end-of-sequence token; None: one that the template does not write, as Gemma's and Phi's.
        plain: added tokens that are not special, as `<tool_call>` is in Qwen's.
        has_metaspace: it puts a space in front of a text, and its special tokens remove white space behind them, as Phi-3's.
    """
    special = ["<pad>", "<s>", "</s>", *sorted(set(_SPECIAL.findall(template)))]
    tokenizer: Any = Tokenizer(models.BPE())
    if has_metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = [chr(code) for code in range(32, 127)] if has_metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=[*alphabet, "\n", "▁"], show_progress=False)
    tokenizer.train_from_iterator([template.replace("\n", "\n\n"), template], trainer)
    tokens = [AddedToken(token, special=True, normalized=False, rstrip=has_metaspace) for token in special]
    tokenizer.add_special_tokens(tokens)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos or "</s>",
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text without anything added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
