"""What practice recommends for an adapter, by task: rank, alpha, rsLoRA, dropout, targets and learning rate, each with its
reason.

    advice = advise("math", rows=20_000)
    advice["rank"].value, advice["rank"].reason     # 128, "usual for math: 64 to 128; more than 10,000 rows call for the ..."

The tables are those of LoRA practice in supervised training. For reinforcement learning (`rl`, the default) rank, dropout and
targets are the same; if rankup's default differs, the reason says why. rankup trains with dropout 0 for every task, so another
dropout is shown and not written to a run file. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...update.ranks import REFERENCE_ALPHA, REFERENCE_RATE

FEW_ROWS, MANY_ROWS = 1_000, 10_000
RSLORA_FROM = 32  # rank from which rsLoRA is recommended (Kalajdzievski, 2312.03732)
TIGHT_RANK = 16  # practice's upper end where memory is tight: 8 to 16
TARGETS_IN_WORDS = {"attention": "attention only", "all-linear": "all linear layers"}
ONE_POLICY = "with dropout, trainer and sampler would no longer be the same policy"


class Practice(NamedTuple):
    """A row of the table: a description of the task, lowest, usual and highest rank, dropout, targets."""

    task: str
    low: int
    usual: int
    high: int
    dropout: float
    targets: str

    @property
    def ranks(self) -> str:
        """Their range in words."""
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


PRACTICE: dict[str, Practice] = {
    "simple": Practice("simple adaptation, classification, style, format", 4, 8, 16, 0.05, "attention"),
    "chat": Practice("chat, instruction, question answering", 16, 16, 32, 0.05, "all-linear"),
    "domain": Practice("domain adaptation", 32, 32, 32, 0.1, "all-linear"),
    "code": Practice("code", 64, 64, 64, 0.1, "all-linear"),
    "reasoning": Practice("complex reasoning, multi-step", 32, 32, 64, 0.0, "all-linear"),
    "math": Practice("mathematics and code at highest capacity", 64, 64, 128, 0.0, "all-linear"),
    "rl": Practice("reinforcement learning (GRPO, PPO)", 64, 64, 128, 0.0, "all-linear"),
}


class Preset(NamedTuple):
    """Named rank, alpha and targets."""

    rank: int
    alpha: float
    targets: str


PRESETS: dict[str, Preset] = {
    "memory-efficient": Preset(8, 16.0, "attention"),
    "high-quality": Preset(64, 128.0, "all-linear"),
    "rl": Preset(64, REFERENCE_ALPHA, "all-linear"),
}


class Choice(NamedTuple):
    """A recommended value and its reason in one line."""

    value: Any
    reason: str


def advise(
    task: str = "rl",
    *,
    rows: int | None = None,
    preset: str | None = None,
    rank: int | None = None,
    targets: str | Sequence[str] | None = None,
    tight_rank: int | None = None,
) -> dict[str, Choice]:
    """The adapter for a task, in the order in which it is shown. `learning_rate` suits alpha, rank and rsLoRA.

    Args:
        task: a key of `PRACTICE`.
        rows: of the training data.
        preset: a key of `PRESETS`, which decides rank, alpha and targets.
        rank, targets: user-supplied; they override the preset.
        tight_rank: a lower rank, to save memory.
    """
    practice = PRACTICE[task]
    usual_targets = TARGETS_IN_WORDS[practice.targets]
    reason = f"enough for {task}" if practice.targets == "attention" else f"best for {task}; never norm layers"
    chosen = {
        "rank": _rank(task, rows, tight_rank),
        "dropout": Choice(0.0, f"usual here too; {ONE_POLICY}"),
        "targets": Choice(practice.targets, f"{usual_targets}: {reason}"),
    }
    if practice.dropout:
        chosen["dropout"] = Choice(practice.dropout, f"usual here; rankup trains with 0 only: {ONE_POLICY}")
    if preset is not None:
        chosen |= {name: Choice(getattr(PRESETS[preset], name), f"the preset {preset}") for name in ("rank", "targets")}
    if rank is not None:
        where = "below" if rank < practice.low else "above" if rank > practice.high else "within"
        chosen["rank"] = Choice(rank, f"user-supplied; {where} the usual {practice.ranks} for {task}")
    if targets is not None:
        chosen["targets"] = Choice(targets, f"user-supplied; usual for {task}: {usual_targets}")
    chosen |= _scale(chosen["rank"].value, preset, is_rl=(preset or task) == "rl")
    names = ("rank", "alpha", "use_rslora", "dropout", "targets", "learning_rate")
    return {name: chosen[name] for name in names}


def lower_ranks(task: str, rank: int) -> list[int]:
    """Ranks to fall back on if memory is tight, highest first: those of the task's range, then 16."""
    practice = PRACTICE[task]
    candidates = {practice.high, practice.usual, practice.low, min(practice.low, TIGHT_RANK)}
    return sorted((candidate for candidate in candidates if candidate < rank), reverse=True)


def _rank(task: str, rows: int | None, tight_rank: int | None) -> Choice:
    practice = PRACTICE[task]
    if tight_rank is not None:
        what = "the lower end" if tight_rank >= practice.low else f"less, since practice goes down to 8 or {TIGHT_RANK}"
        value, why = tight_rank, f"; memory is tight: {what}"
    elif practice.low == practice.high:
        value, why = practice.usual, ", for any number of rows"
    elif rows is not None and rows < FEW_ROWS:
        value, why = practice.low, f"; fewer than {FEW_ROWS:,} rows call for the lower end"
    elif rows is not None and rows > MANY_ROWS:
        value, why = practice.high, f"; more than {MANY_ROWS:,} rows call for the upper end"
    else:
        value, why = practice.usual, f", mostly {practice.usual}"
    return Choice(value, f"usual for {task}: {practice.ranks}{why}")


def _scale(rank: int, preset: str | None, *, is_rl: bool) -> dict[str, Choice]:
    """Alpha, rsLoRA, and the learning rate at which a step changes a layer's output as 1e-4 does at alpha 32."""
    if is_rl:
        alpha = Choice(
            REFERENCE_ALPHA,
            f"32 at every rank, not practice's r or 2r ({rank} or {2 * rank}): the best learning rate in RL then hardly "
            "depends on the rank",
        )
        at = f"from rank {RSLORA_FROM}" + ("" if rank >= RSLORA_FROM else " only")
        rslora = Choice(
            False,
            f"scale alpha/r; practice recommends alpha/sqrt(r) {at}, but keeping the learning rate, a change of scale changes "
            "each step by up to 45 times",
        )
    elif preset is not None:
        alpha = Choice(PRESETS[preset].alpha, f"the preset {preset}")
        rslora = Choice(False, f"the preset {preset} names a rank and an alpha for the scale alpha/r")
    else:
        alpha = Choice(2.0 * rank, f"2r, where practice takes r or 2r ({rank} or {2 * rank})")
        rslora = Choice(False, f"scale alpha/r; alpha/sqrt(r) is recommended from rank {RSLORA_FROM} only")
        if rank >= RSLORA_FROM:
            rslora = Choice(True, f"scale alpha/sqrt(r), recommended from rank {RSLORA_FROM} (2312.03732)")
    times = alpha.value * (math.sqrt(rank) if rslora.value else 1) / REFERENCE_ALPHA
    rate = Choice(REFERENCE_RATE, "RL with LoRA uses 5e-6 to 1e-4 at this scale")
    if times != 1:
        factor = f"{times:.3g}" if times > 1 else f"1/{1 / times:.3g}"
        reason = f"at this scale a step of the same learning rate goes {factor} times as far as with alpha 32"
        rate = Choice(float(f"{REFERENCE_RATE / times:.1e}"), f"{reason}, so 1e-4 is divided by that")
    return {"alpha": alpha, "use_rslora": rslora, "learning_rate": rate}
