"""What practice recommends for an adapter, by task: rank, alpha, dropout, targets, rsLoRA and learning rate, each with its
reason.

    advice = advise("math", rows=20_000)
    advice.rank.value, advice.rank.reason       # 128, "math takes 64 to 128; more than 10,000 rows call for the upper end"
    lora_fields(advice)                         # {"rank": 128, "alpha": 256.0, ...}: the section of a run file

The tables are those of LoRA practice in supervised training. For reinforcement learning (`rl`, the default) rank, dropout and
targets are the same; if rankup's default differs, the reason says why. rankup trains with dropout 0 for every task, so another
dropout is shown and not written to a run file. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...update.ranks import REFERENCE_ALPHA, REFERENCE_RATE

FEW_ROWS, MANY_ROWS = 1_000, 10_000
RSLORA_FROM = 32  # rank from which rsLoRA is recommended (Kalajdzievski, 2312.03732)
TIGHT_RANK = 16  # practice's upper end where memory is tight: 8 to 16


@dataclass(frozen=True, slots=True)
class Practice:
    """A row of the table: a description of the task, lowest, usual and highest rank, dropout, targets."""

    task: str
    low: int
    usual: int
    high: int
    dropout: float
    targets: Literal["attention", "all-linear"]


PRACTICE: dict[str, Practice] = {
    "simple": Practice("simple adaptation, classification, style, format", 4, 8, 16, 0.05, "attention"),
    "chat": Practice("chat, instruction, question answering", 16, 16, 32, 0.05, "all-linear"),
    "domain": Practice("domain adaptation", 32, 32, 32, 0.1, "all-linear"),
    "code": Practice("code", 64, 64, 64, 0.1, "all-linear"),
    "reasoning": Practice("complex reasoning, multi-step", 32, 32, 64, 0.0, "all-linear"),
    "math": Practice("mathematics and code at highest capacity", 64, 64, 128, 0.0, "all-linear"),
    "rl": Practice("reinforcement learning (GRPO, PPO)", 64, 64, 128, 0.0, "all-linear"),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """Named rank, alpha and targets."""

    rank: int
    alpha: float
    targets: Literal["attention", "all-linear"]


PRESETS: dict[str, Preset] = {
    "memory-efficient": Preset(8, 16.0, "attention"),
    "high-quality": Preset(64, 128.0, "all-linear"),
    "rl": Preset(64, REFERENCE_ALPHA, "all-linear"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A recommended value and its reason in one line."""

    value: Any
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The recommended adapter. `dropout` is practice's value; `learning_rate` suits alpha, rank and rsLoRA."""

    task: str
    rank: Choice
    alpha: Choice
    dropout: Choice
    targets: Choice
    use_rslora: Choice
    learning_rate: Choice

    @property
    def choices(self) -> dict[str, Choice]:
        """All of them by name, in the order in which they are shown."""
        names = ("rank", "alpha", "use_rslora", "dropout", "targets", "learning_rate")
        return {name: getattr(self, name) for name in names}


def advise(
    task: str = "rl",
    *,
    rows: int | None = None,
    preset: str | None = None,
    rank: int | None = None,
    targets: str | Sequence[str] | None = None,
    tight_rank: int | None = None,
) -> Advice:
    """The adapter for a task.

    Args:
        task: a key of `PRACTICE`.
        rows: of the training data.
        preset: a key of `PRESETS`, which decides rank, alpha and targets.
        rank, targets: user-supplied; they override the preset.
        tight_rank: a lower rank, to save memory.
    """
    practice, named = PRACTICE[task], None if preset is None else PRESETS[preset]
    of_preset = f"the preset {preset}"
    chosen_rank = _rank(task, practice, rows, tight_rank)
    if rank is not None:
        chosen_rank = Choice(rank, _requested_rank(rank, task, practice))
    elif named is not None:
        chosen_rank = Choice(named.rank, of_preset)
    chosen_targets = Choice(practice.targets, _why_targets(task, practice))
    if targets is not None:
        chosen_targets = Choice(targets, f"user-supplied; usual for {task}: {_in_words(practice.targets)}")
    elif named is not None:
        chosen_targets = Choice(named.targets, of_preset)
    is_rl = task == "rl" if preset is None else preset == "rl"
    rslora = _rslora(chosen_rank.value, is_rl=is_rl, preset=preset)
    alpha = Choice(named.alpha, of_preset) if named is not None and not is_rl else _alpha(chosen_rank.value, is_rl=is_rl)
    return Advice(
        task=task,
        rank=chosen_rank,
        alpha=alpha,
        dropout=_dropout(practice),
        targets=chosen_targets,
        use_rslora=rslora,
        learning_rate=_learning_rate(chosen_rank.value, alpha.value, use_rslora=rslora.value),
    )


def lora_fields(advice: Advice) -> dict[str, Any]:
    """The section `lora` of a run file: all but the dropout, which is 0 in rankup."""
    targets = advice.targets.value
    return {
        "rank": advice.rank.value,
        "alpha": advice.alpha.value,
        "use_rslora": advice.use_rslora.value,
        "targets": targets if isinstance(targets, str) else list(targets),
    }


def lower_ranks(task: str, rank: int) -> list[int]:
    """Ranks to fall back on if memory is tight, highest first: those of the task's range, then 16."""
    practice = PRACTICE[task]
    candidates = {practice.high, practice.usual, practice.low, min(practice.low, TIGHT_RANK)}
    return sorted((candidate for candidate in candidates if candidate < rank), reverse=True)


def _range(practice: Practice) -> str:
    return str(practice.low) if practice.low == practice.high else f"{practice.low} to {practice.high}"


def _rank(task: str, practice: Practice, rows: int | None, tight_rank: int | None) -> Choice:
    takes = f"usual for {task}: {_range(practice)}"
    if tight_rank is not None:
        what = "the lower end" if tight_rank >= practice.low else f"less, since practice goes down to 8 or {TIGHT_RANK}"
        return Choice(tight_rank, f"{takes}; memory is tight: {what}")
    if practice.low == practice.high:
        return Choice(practice.usual, f"{takes}, for any number of rows")
    if rows is not None and rows < FEW_ROWS:
        return Choice(practice.low, f"{takes}; fewer than {FEW_ROWS:,} rows call for the lower end")
    if rows is not None and rows > MANY_ROWS:
        return Choice(practice.high, f"{takes}; more than {MANY_ROWS:,} rows call for the upper end")
    return Choice(practice.usual, f"{takes}, mostly {practice.usual}")


def _requested_rank(rank: int, task: str, practice: Practice) -> str:
    where = "within" if practice.low <= rank <= practice.high else "below" if rank < practice.low else "above"
    return f"user-supplied; {where} the usual {_range(practice)} for {task}"


def _alpha(rank: int, *, is_rl: bool) -> Choice:
    if is_rl:
        return Choice(
            REFERENCE_ALPHA,
            f"32 at every rank, not practice's r or 2r ({rank} or {2 * rank}): the best learning rate in RL then hardly "
            "depends on the rank",
        )
    return Choice(2.0 * rank, f"2r, where practice takes r or 2r ({rank} or {2 * rank})")


def _rslora(rank: int, *, is_rl: bool, preset: str | None) -> Choice:
    if is_rl:
        at = f"from rank {RSLORA_FROM}" if rank >= RSLORA_FROM else f"from rank {RSLORA_FROM} only"
        return Choice(
            False,
            f"scale alpha/r; practice recommends alpha/sqrt(r) {at}, but keeping the learning rate, a change of "
            "scale changes each step by up to 45 times",
        )
    if preset is not None:
        return Choice(False, f"the preset {preset} names a rank and an alpha for the scale alpha/r")
    if rank >= RSLORA_FROM:
        return Choice(True, f"scale alpha/sqrt(r), recommended from rank {RSLORA_FROM} (2312.03732)")
    return Choice(False, f"scale alpha/r; alpha/sqrt(r) is recommended from rank {RSLORA_FROM} only")


def _dropout(practice: Practice) -> Choice:
    if practice.dropout == 0:
        return Choice(0.0, "usual here too; with dropout, trainer and sampler would no longer be the same policy")
    return Choice(
        practice.dropout,
        "usual here; rankup trains with 0 only: with dropout, trainer and sampler would no longer be the same policy",
    )


def _why_targets(task: str, practice: Practice) -> str:
    if practice.targets == "attention":
        return f"{_in_words('attention')}: enough for {task}"
    return f"{_in_words('all-linear')}: best for {task}; never norm layers"


def _in_words(targets: str) -> str:
    return {"attention": "attention only", "all-linear": "all seven projections"}[targets]


def _learning_rate(rank: int, alpha: float, *, use_rslora: bool) -> Choice:
    """The rate at which an optimizer step changes a layer's output as 1e-4 does at alpha 32: `scale * rank * rate` is equal."""
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    times = scale * rank / REFERENCE_ALPHA
    if times == 1:
        return Choice(REFERENCE_RATE, "RL with LoRA uses 5e-6 to 1e-4 at this scale")
    rate = float(f"{REFERENCE_RATE / times:.1e}")
    comparison = f"{times:.3g} times as far" if times > 1 else f"1/{1 / times:.3g} times as far"
    return Choice(
        rate, f"at this scale a step of the same learning rate goes {comparison} as with alpha 32, so 1e-4 is divided by that"
    )
