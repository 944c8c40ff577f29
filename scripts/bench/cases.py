"""Synthetic batches and adapters, the same for every side and in every process. Plain Python at import.

    case = Case.parse("256+64")             # 2 prompts of 256 tokens, 8 completions of 64 tokens each
    groups = case.groups()                  # as the learner takes them, the same in every process
"""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankup.grpo.data.groups import Group
    from rankup.grpo.model.policy import Policy

FIRST_TOKEN, LAST_TOKEN = 100, 49_000  # of SmolLM2's vocabulary: none of its special tokens
DEFAULTS = ("64+64", "256+64")


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

    @property
    def tokens(self) -> int:
        """That pass through the model with each prompt once. Nothing is predicted from the last one of a completion."""
        return self.prompts * (self.prompt_tokens + self.completions * (self.completion_tokens - 1))

    @property
    def targets(self) -> int:
        """Tokens of all completions."""
        return self.prompts * self.completions * self.completion_tokens

    def groups(self, *, last_token: int = LAST_TOKEN) -> list[Group]:
        """Random tokens and advantages. The sampler's log-probabilities affect only a metric."""
        from rankup.grpo.data.groups import Group
        from rankup.grpo.data.prompts import Prompt
        from rankup.rollout.types import Completion

        draw = random.Random(0)
        logprobs = (-1.0,) * self.completion_tokens

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(draw.randrange(FIRST_TOKEN, last_token) for _ in range(count))

        def completion() -> Completion:
            ids = tokens(self.completion_tokens)
            return Completion(token_ids=ids, logprobs=logprobs, text="", finish_reason="length", policy_version=0)

        return [
            Group(
                prompt=Prompt(content="", token_ids=tokens(self.prompt_tokens)),
                completions=tuple(completion() for _ in range(self.completions)),
                advantages=tuple(draw.gauss(0, 1) for _ in range(self.completions)),
            )
            for _ in range(self.prompts)
        ]


def add_case_argument(parser: argparse.ArgumentParser) -> None:
    """`--case P+C`, repeatable; `cases_of` reads it."""
    text = f"PROMPT+COMPLETION, tokens of each; may be repeated (default {' and '.join(DEFAULTS)})"
    parser.add_argument("--case", type=Case.parse, action="append", metavar="P+C", help=text)


def cases_of(options: argparse.Namespace) -> dict[str, Case]:
    """The cases of a command line by their names."""
    cases = options.case or map(Case.parse, DEFAULTS)
    return {f"{case.prompt_tokens}+{case.completion_tokens}": case for case in cases}


def randomise_adapter(policy: Policy, std: float) -> None:
    """Fill every B of an adapter with normal values, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for b in policy.masters[1::2]:
            b.copy_(torch.randn(b.shape, generator=generator) * std)
