"""The made-up batches of the training benchmarks: the same token ids and advantages for every side. Plain Python.

    case = Case.parse("256+64")                             # 2 prompts of 256 tokens, 8 completions of 64 tokens each
    groups = case.groups()                                  # always the same ones
    rows = padded_rows(groups)                              # as a trainer without shared prompts computes them
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_TOKEN, LAST_TOKEN = 100, 49_000  # of SmolLM2's vocabulary: none of its special tokens
PADDING = 0


@dataclass(frozen=True)
class Group:
    """A prompt and its completions as token ids, and one advantage a completion."""

    prompt: list[int]
    completions: list[list[int]]
    advantages: list[float]


@dataclass(frozen=True)
class Case:
    """A batch: so many prompts with so many completions each, and the length of each prompt and completion in tokens."""

    prompt_tokens: int
    completion_tokens: int
    prompts: int = 2
    completions: int = 8

    @staticmethod
    def parse(name: str) -> Case:
        """From `PROMPT+COMPLETION`, tokens of each.

        Raises:
            ValueError: it is written in another way, or a length is 0.
        """
        match = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)", name)
        if match is None:
            raise ValueError(f"a case is PROMPT+COMPLETION, tokens of each, such as 64+64 (got {name!r})")
        return Case(int(match[1]), int(match[2]))

    def groups(self) -> list[Group]:
        """Random tokens and advantages, the same ones in every process."""
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
    """`--case P+C`, as often as wanted; names, None where it is not given."""
    text = f"PROMPT+COMPLETION, tokens of each; may be given several times (default {' and '.join(default)})"
    parser.add_argument("--case", type=_case_name, action="append", metavar="P+C", help=text)


def _case_name(name: str) -> str:
    try:
        Case.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


@dataclass(frozen=True)
class PaddedRows:
    """One row a completion, its prompt first, padded on the right to the longest row.

    `attention` is 1 where a row has a token, `is_target` where that token is a completion's. `prompt_lengths` and
    `advantages` hold one number a row.
    """

    token_ids: list[list[int]]
    attention: list[list[int]]
    is_target: list[list[int]]
    prompt_lengths: list[int]
    advantages: list[float]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return len(self.token_ids) * len(self.token_ids[0])


def padded_rows(groups: Sequence[Group]) -> PaddedRows:
    """The groups as rows, in their order."""
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
