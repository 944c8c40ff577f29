"""Synthetic batches and adapters, the same for every side and in every process. Plain Python at import.

    case = Case.parse("256+64")             # 2 prompts of 256 tokens, 8 completions of 64 tokens each
    groups = case.groups()                  # the same in every process
    rows = padded_rows(groups)              # one row per completion, for a trainer that repeats the prompt
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankup.grpo.model.policy import Policy

FIRST_TOKEN, LAST_TOKEN = 100, 49_000  # of SmolLM2's vocabulary: none of its special tokens
PADDING = 0


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt and its completions, and one advantage per completion."""

    prompt: list[int]
    completions: list[list[int]]
    advantages: list[float]


@dataclass(frozen=True)
class Case:
    """The shape of a batch. All prompts have one length, and so have all completions; both in tokens."""

    prompt_tokens: int
    completion_tokens: int
    prompts: int = 2
    completions: int = 8

    @staticmethod
    def parse(name: str) -> Case:
        """From `PROMPT+COMPLETION`, the tokens of each.

        Raises:
            argparse.ArgumentTypeError: any other format, or a length of 0.
        """
        match = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)", name)
        if match is None:
            raise argparse.ArgumentTypeError(f"a case is PROMPT+COMPLETION, tokens of each, such as 64+64 (got {name!r})")
        return Case(int(match[1]), int(match[2]))

    def groups(self) -> list[Group]:
        """Random tokens and advantages, the same in every process."""
        draw = random.Random(0)

        def tokens(count: int) -> list[int]:
            return [draw.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]

        return [
            Group(
                prompt=tokens(self.prompt_tokens),
                completions=[tokens(self.completion_tokens) for _ in range(self.completions)],
                advantages=[draw.gauss(0, 1) for _ in range(self.completions)],
            )
            for _ in range(self.prompts)
        ]

    def shapes(self) -> list[tuple[int, list[int]]]:
        """(prompt length, completion lengths) of each group."""
        return [(self.prompt_tokens, [self.completion_tokens] * self.completions)] * self.prompts


def add_case_argument(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """`--case P+C`, repeatable; `cases_of` reads it."""
    text = f"PROMPT+COMPLETION, tokens of each; may be repeated (default {' and '.join(default)})"
    parser.add_argument("--case", type=Case.parse, action="append", metavar="P+C", help=text)
    parser.set_defaults(default_cases=default)


def cases_of(options: argparse.Namespace) -> dict[str, Case]:
    """The cases of a command line by their names."""
    cases = options.case or [Case.parse(name) for name in options.default_cases]
    return {f"{case.prompt_tokens}+{case.completion_tokens}": case for case in cases}


@dataclass(frozen=True)
class PaddedRows:
    """One row per completion, its prompt first, padded on the right to the longest row.

    `attention` is 1 for tokens, `is_target` is 1 for tokens of a completion. `prompt_lengths` and `advantages` hold one
    number per row.
    """

    token_ids: list[list[int]]
    attention: list[list[int]]
    is_target: list[list[int]]
    prompt_lengths: list[int]
    advantages: list[float]

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model, padding included."""
        return len(self.token_ids) * len(self.token_ids[0])


def padded_rows(groups: Sequence[Group]) -> PaddedRows:
    """The completions of all groups, in their order."""
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    padding = [width - len(prompt) - len(completion) for prompt, completion in pairs]
    return PaddedRows(
        token_ids=[p + c + [PADDING] * n for (p, c), n in zip(pairs, padding, strict=True)],
        attention=[[1] * (width - n) + [0] * n for n in padding],
        is_target=[[0] * len(p) + [1] * len(c) + [0] * n for (p, c), n in zip(pairs, padding, strict=True)],
        prompt_lengths=[len(prompt) for prompt, _ in pairs],
        advantages=[advantage for group in groups for advantage in group.advantages],
    )


def randomise_adapter(policy: Policy, std: float) -> None:
    """Fill every B of an adapter with normal values, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for b in policy.masters[1::2]:
            b.copy_(torch.randn(b.shape, generator=generator) * std)
