"""Reports of each worker about a step: its times, its tokens, and which policy it holds.

    reports = exchange_reports(world, session, clock.seconds, groups)
    metrics |= time_metrics(reports, trained_tokens=4096)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..common.world import World
from ..data.groups import Group
from ..update.session import Session


class DivergedError(RuntimeError):
    """Two workers hold different policies, so nothing they would compute next is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """One worker's step. `seen_tokens`: see `num_tokens`; `checksum`: of its fp32 master weights after the update."""

    seconds: Mapping[str, float]
    sampled_tokens: int
    seen_tokens: int
    policy_version: int
    checksum: int


def checksum(masters: Sequence[torch.Tensor]) -> int:
    """A 64-bit checksum of the fp32 master weights: the sum of their words, each tensor's sum weighted by its place."""
    sums = torch.stack([master.detach().view(torch.int32).sum(dtype=torch.int64) for master in masters]).tolist()
    return sum((2 * place + 1) * value for place, value in enumerate(sums)) % 2**64


def check_same_policy(reports: Sequence[WorkerReport]) -> None:
    """Check that all workers hold the main process's policy.

    Raises:
        DivergedError: one does not; with both versions and checksums.
    """
    first = reports[0]
    for rank, report in enumerate(reports):
        if (report.policy_version, report.checksum) != (first.policy_version, first.checksum):
            raise DivergedError(
                f"worker {rank} holds another policy than worker 0: version {report.policy_version}, adapter "
                f"{report.checksum:016x}, instead of version {first.policy_version}, adapter {first.checksum:016x}. Resume "
                "from the last checkpoint, and check that all nodes have the same software and hardware"
            )


def exchange_reports(
    world: World, session: Session, seconds: Mapping[str, float], groups: Sequence[Group]
) -> list[WorkerReport]:
    """The reports of all workers about a step, by rank.

    Raises:
        DivergedError: the workers hold different policies.
    """
    local = [group for group in groups if group.is_local]
    report = WorkerReport(
        seconds=dict(seconds),
        sampled_tokens=sum(c.num_tokens for g in local for c in g.completions),
        seen_tokens=sum(len(g.prompt.token_ids) + c.num_tokens for g in local for c in g.completions),
        policy_version=session.engine.policy_version,
        checksum=checksum(session.policy.masters) if world.size > 1 else 0,
    )
    reports = world.all_gather(report)
    check_same_policy(reports)
    return reports


def slowest(reports: Sequence[WorkerReport]) -> dict[str, float]:
    """Seconds by phase, each of the slowest worker: the others waited for it."""
    return {phase: max(report.seconds[phase] for report in reports) for phase in reports[0].seconds}


def time_metrics(reports: Sequence[WorkerReport], *, trained_tokens: float) -> dict[str, float]:
    """Seconds and tokens per second of a step, of all workers together and, with several workers, of each."""
    seconds = slowest(reports)
    of_each = {
        f"workers/{rank}/tokens_per_second": report.sampled_tokens / report.seconds["rollout"]
        for rank, report in enumerate(reports)
    }
    return {
        **{f"time/{phase}": value for phase, value in seconds.items()},
        "tokens_per_second/rollout": sum(report.sampled_tokens for report in reports) / seconds["rollout"],
        "tokens_per_second/train": trained_tokens / seconds["train"],
        **(of_each if len(reports) > 1 else {}),
    }


def num_tokens(reports: Sequence[WorkerReport]) -> int:
    """Tokens of all groups, the prompt counted once for each completion (TRL's `num_tokens`).

    Each worker counts its own groups: only there is the prompt as the environment has extended it.
    """
    return sum(report.seen_tokens for report in reports)
