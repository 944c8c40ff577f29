"""Numbers of a step's backward pass: what is counted on one worker, and the metrics of all.

    tally = tally_of(objective, packs, losses, logprobs, entropies, old=old, reference=reference)
    GradientStats.of(world.all_gather(tally), grad_norm=norm).metrics()
    packing_metrics(world.all_gather(packing_counts(packs, groups)))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..algorithm.corrections import gap_metrics, gap_tally
from ..algorithm.losses import kl_k3
from ..algorithm.tally import Tally
from ..data.groups import Group
from ..model.packing import Pack, has_targets, row_inputs
from ..model.routers import Flips
from .objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStats:
    """Numbers of one forward and backward pass over the step, of all workers. `grad_norm` is before clipping.

    `gap`: between sampler and trainer, see `gap_metrics`. `left_out_ratio`: the share of tokens in completions that a veto or
    mask switches off. `kl`, `clip_low`, `clip_high`: None if the objective has none. `router_flips`: the share of pairs of a
    token and a layer with experts in which the trainer's router chose another set of experts than the sampler's; None if the
    sampler's choice is not known.
    """

    loss: float
    grad_norm: float
    entropy: float
    gap: Mapping[str, float]
    left_out_ratio: float
    kl: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    router_flips: float | None = None

    @staticmethod
    def of(tallies: Sequence[Tally], *, grad_norm: float) -> GradientStats:
        """From the tallies of all workers, see `tally_of`."""
        tally = Tally.merge(tallies)
        return GradientStats(
            loss=tally.sums["loss"],
            grad_norm=grad_norm,
            entropy=tally.mean("entropy"),
            gap=gap_metrics(tally),
            left_out_ratio=1.0 - tally.mean("kept"),
            kl=tally.mean("kl_to_reference") if "kl_to_reference" in tally.sums else None,
            clip_low=tally.mean("clip_low") if "clip_low" in tally.sums else None,
            clip_high=tally.mean("clip_high") if "clip_high" in tally.sums else None,
            router_flips=tally.sums["flipped"] / tally.sums["compared"] if tally.sums.get("compared") else None,
        )

    def metrics(self) -> dict[str, float]:
        """By TRL's names."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "entropy": self.entropy,
            **self.gap,
            "sampling/left_out_ratio": self.left_out_ratio,
            **({} if self.router_flips is None else {"sampling/router_flips": self.router_flips}),
            **({} if self.kl is None else {"kl": self.kl}),
            **self._clip_metrics(),
        }

    def off_policy_metrics(self) -> dict[str, float]:
        """Those that a further iteration replaces. Metrics that compare with the sampler stay those of the first iteration."""
        return {"loss": self.loss, "grad_norm": self.grad_norm, **self._clip_metrics()}

    def _clip_metrics(self) -> dict[str, float]:
        if self.clip_low is None or self.clip_high is None:
            return {}
        return {
            "clip_ratio/low_mean": self.clip_low,
            "clip_ratio/high_mean": self.clip_high,
            "clip_ratio/region_mean": self.clip_low + self.clip_high,
        }


def tally_of(
    objective: Objective,
    packs: Sequence[Pack],
    losses: Sequence[torch.Tensor],
    logprobs: Sequence[torch.Tensor],
    entropies: Sequence[torch.Tensor],
    *,
    old: Sequence[torch.Tensor] | None,
    reference: Sequence[torch.Tensor] | None,
    flips: Flips | None = None,
) -> Tally:
    """Sums and extremes over the tokens of one worker, from the loss, log-probabilities and entropies of each of its packs.

    old, reference: the log-probabilities of each pack under these policies; None if there are none.
    flips: of the pass; None if the sampler's choice of experts is ignored.
    """
    if not packs:
        return Tally()
    pairs = list(zip(packs, logprobs, strict=True))
    logprobs_all = torch.cat(list(logprobs))
    sums = {
        "entropy": torch.cat(list(entropies)),
        "loss": torch.stack(list(losses)),
        "kept": torch.cat([objective.keeps(one, logprobs_N) for one, logprobs_N in pairs]),
    }
    if reference is not None:
        sums["kl_to_reference"] = kl_k3(logprobs_all, torch.cat(list(reference)))
    if old is not None:
        counts = [
            objective.clip_counts(one, logprobs_N, old_N) for (one, logprobs_N), old_N in zip(pairs, old, strict=True)
        ]
        sums["clip_low"], sums["clip_high"] = torch.stack(counts).unbind(1)
    gap = gap_tally(
        logprobs_all,
        torch.cat([one.sampler_logprobs_N for one in packs]),
        torch.cat([objective.weights(one, logprobs_N) for one, logprobs_N in pairs]),
    )
    tally = Tally.of(sums=sums, extremes={}).join(gap)
    if flips is None:
        return tally
    return tally.join(Tally(tally.count, {"flipped": flips.flipped, "compared": flips.compared}))


def packing_counts(packs: Sequence[Pack], groups: Sequence[Group]) -> dict[str, int]:
    """Packs and tokens of this worker, and the tokens of one prompt for each completion."""
    rows = [(len(g.prompt.token_ids), len(row_inputs(c)) + 1) for g in groups for c in g.completions if has_targets(c)]
    return {
        "packs": len(packs),
        "computed": sum(one.num_input_tokens for one in packs),
        "padding": sum(one.num_padding_tokens for one in packs),
        "completion": sum(len(one.targets_N) for one in packs),
        "plain": sum(map(sum, rows)),
    }


def packing_metrics(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Packs and tokens of all workers, the share of padding, and the ratio to one prompt for each completion."""
    total = {name: sum(one[name] for one in counts) for name in counts[0]}
    return {
        "packing/packs": float(total["packs"]),
        "packing/tokens": float(total["computed"]),
        "packing/completion_tokens": float(total["completion"]),
        "packing/padding_ratio": total["padding"] / (total["computed"] + total["padding"]),
        "packing/token_ratio": total["computed"] / total["plain"],
    }
