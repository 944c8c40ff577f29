#!/usr/bin/env python3
"""What fits on a card: tokens in vLLM's KV cache while sampling and tokens of a pack while training, from the memory plan.

With and without `rollout.release_kv_cache`, for models of 8B, 14B and 32B at rank 64. Nothing is run: every figure is what a
run on that card would decide at its start (`grpo/memory/decide.py`).

examples:
  scripts/bench/card_table.py                                     a Markdown table, in a minute or two
  scripts/bench/card_table.py --page docs/gpu.md                  into a page, between <!-- table: cards --> and <!-- end -->
  scripts/bench/card_table.py --models 8B --cards 24 80
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import markdown, replace_tables
from scaling import shape_of

from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory.decide import decide_budget
from rankup.grpo.memory.parts import GIB, tokens_per_pack
from rankup.grpo.memory.shapes import ModelShape

QWEN3: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "14B": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
"""Qwen3's, from their `config.json`; head and embedding are not tied."""
CARDS_GIB = (16, 24, 48, 80)
PROMPT, COMPLETION, GENERATIONS, PROMPTS = 512, 2048, 8, 32
NOTHING = "-"


class Room(NamedTuple):
    """What a run decides: tokens in the KV cache and tokens of a pack."""

    kv_tokens: int
    pack_tokens: int


def config_of(*, releases: bool, checkpointing: bool) -> GRPOConfig:
    """256 sequences of 2,560 tokens in a step."""
    return GRPOConfig(
        max_prompt_length=PROMPT,
        max_completion_length=COMPLETION,
        num_generations=GENERATIONS,
        prompts_per_step=PROMPTS,
        release_kv_cache=releases,
        gradient_checkpointing=checkpointing,
    )


def room(shape: ModelShape, card_gib: int, *, releases: bool, checkpointing: bool) -> Room | None:
    """What a run on this card decides; None if it does not fit."""
    config = config_of(releases=releases, checkpointing=checkpointing)
    try:
        decided, budget = decide_budget(shape, config, device="cuda", vram=card_gib * GIB)
    except ValueError:  # too small for the base weights
        return None
    return Room(budget.kv_tokens, tokens_per_pack(decided)) if budget.fits else None


def rows(models: Sequence[str], cards: Sequence[int]) -> Iterator[list[str]]:
    """The cells of the table, line by line."""
    for name in models:
        shape = shape_of(QWEN3 | MODELS[name] | {"tie_word_embeddings": False})
        for card in cards:
            for checkpointing in (False, True):
                found = [room(shape, card, releases=releases, checkpointing=checkpointing) for releases in (False, True)]
                cells = [NOTHING if one is None else f"{value:,}" for one in found for value in (one or (0, 0))]
                yield [name, str(card), "yes" if checkpointing else "no", *cells]


def table(models: Sequence[str] = tuple(MODELS), cards: Sequence[int] = CARDS_GIB) -> str:
    """The table in Markdown."""
    heads = ["model", "card, GiB", "checkpointing", "KV tokens, kept", "pack, kept", "KV tokens, released", "pack, released"]
    return markdown(heads, list(rows(models, cards)), left=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS_GIB), metavar="GIB", help="default: %(default)s")
    parser.add_argument("--page", type=Path, help="a page with <!-- table: cards -->")
    options = parser.parse_args()
    made = table(options.models, options.cards)
    if options.page is None:
        print(made)
    else:
        options.page.write_text(replace_tables(options.page.read_text(encoding="utf-8"), {"cards": made}), encoding="utf-8")


if __name__ == "__main__":
    main()
