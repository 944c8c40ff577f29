"""The update: groups with advantages in, one (or `num_iterations`) optimizer steps out.

    learner = Learner(policy, config)
    gradients = learner.backward(groups)                                # summed over workers and clipped
    decision = learner.guards.inspect(step, {**rollout_metrics, **gradients.metrics()})
    update = learner.apply(decision, gradients, step=step)              # step, skip, or roll back
    update.metrics["learning_rate"], update.notes

Guards inspect every update between its backward pass and the optimizer step: they can skip it or restore a snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..algorithm.losses import Counts, entropy_bound
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..data.groups import Group
from ..guards.decision import Decision
from ..guards.guards import Guards
from ..model.policy import Policy
from .loss_scale import LossScale
from .objective import Objective, StepConstants
from .optimizer import make_optimizer, set_learning_rate
from .schedule import learning_rate
from .snapshots import Snapshots
from .stats import GradientStats, tally_of
from .step_packs import PackBudget, Part, StepPacks, check_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGradients:
    """A step's first backward pass: its clipped gradients are in `.grad` of the fp32 master weights.

    `stats` is None if there was nothing to train on. The rest is what further iterations need: this worker's packs with their
    log-probabilities, and the constants of the loss.
    """

    stats: GradientStats | None = None
    packing: Mapping[str, float] = field(default_factory=dict)
    packs: StepPacks | None = None
    constants: StepConstants | None = None

    def metrics(self) -> dict[str, float]:
        """Of gradients and packing, by TRL's names; empty if there was nothing to train on."""
        return {} if self.stats is None else {**self.stats.metrics(), **self.packing}


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The result of a step's updates: metrics by TRL's names, and notes for the user."""

    metrics: dict[str, float]
    notes: tuple[str, ...] = ()


class Learner:
    """AdamW on the policy's fp32 master weights, with gradient clipping and guards. See the module's docstring."""

    def __init__(
        self, policy: Policy, config: GRPOConfig, *, pad_token_id: int = 0, world: World = SINGLE_PROCESS
    ) -> None:
        self.policy = policy
        self.world = world
        self.config = config
        self.pad_token_id = pad_token_id
        self.pack_budget = PackBudget.of(config.optim)
        self.objective = Objective(config)
        self.optimizer = make_optimizer(policy.master_roles, config.optim)
        self.loss_scale = LossScale(config.optim.initial_loss_scale) if config.model.dtype == "float16" else None
        self.snapshots = Snapshots(policy.masters, self.optimizer)
        self.guards = Guards(config.guards, self.snapshots)

    def update(
        self, groups: Sequence[Group], *, step: int, observed: Mapping[str, float] | None = None
    ) -> Update:
        """`backward`, the guards' decision and `apply` in one call, for a learner without a loop. Returns all metrics.

        observed: metrics of the rollouts, for the guards.
        """
        gradients = self.backward(groups)
        decision = self.guards.inspect(step, {**(observed or {}), **gradients.metrics()})
        update = self.apply(decision, gradients, step=step)
        return Update(metrics={**gradients.metrics(), **update.metrics}, notes=update.notes)

    def backward(self, groups: Sequence[Group]) -> StepGradients:
        """Forward and backward over the groups: the step's clipped gradients. Changes neither weights nor optimizer state.

        Void episodes are in no mean: a group without them is what is trained on.
        """
        groups = [group.without_void() for group in groups]
        trained = self._trained(groups)
        if not any(completion.num_tokens for group in trained for completion in group.completions):
            return StepGradients()
        local = [group for group in trained if group.is_local]
        if self.policy.routers is not None and self.policy.routers.replay:
            check_experts(local)
        packs = StepPacks(self.policy, local, self.pack_budget, pad_token_id=self.pad_token_id, world=self.world)
        with self.policy.packed():
            constants = self._constants(groups, trained, packs)
            packs.reference = self._reference_logprobs(packs)
            # The policy of the first iteration is that of the start of the step: its log-probabilities are the old ones.
            stats, packs.old = self._forward_backward(packs, constants)
        return StepGradients(stats=stats, packing=packs.metrics(), packs=packs, constants=constants)

    def apply(self, decision: Decision, gradients: StepGradients, *, step: int) -> Update:
        """Carry out the guards' decision: an update with these gradients, or none, or a restored snapshot.

        With `num_iterations` above 1, further backward passes and updates on the same groups follow the first.
        """
        rate = learning_rate(self.config.optim, step) * self.guards.learning_rate_factor
        set_learning_rate(self.optimizer, rate)
        self.guards.apply(decision)
        metrics, notes = {"learning_rate": rate}, list(decision.notes)
        if gradients.stats is not None:
            is_updated = decision.allows_update and self._optimizer_step(gradients.stats)
            metrics |= {"updates": float(is_updated), "update_skipped": float(not is_updated)}
            if is_updated:
                self._iterate_further(gradients, step, metrics, notes)
            if self.loss_scale is not None:
                metrics |= self.loss_scale.metrics()
                notes += self.loss_scale.end_step(step, is_finite=math.isfinite(gradients.stats.grad_norm))
        self.optimizer.zero_grad(set_to_none=True)  # gradients need no memory while the next step is sampled
        notes += self.pack_budget.take_notes()
        return Update(metrics={**metrics, **self.guards.metrics()}, notes=tuple(notes))

    def _iterate_further(
        self, gradients: StepGradients, step: int, metrics: dict[str, float], notes: list[str]
    ) -> None:
        """The second to last iteration; adds to `metrics` and `notes`. Ends early if the guards skip an update."""
        assert gradients.constants is not None and gradients.packs is not None
        for _ in range(1, self.config.algorithm.num_iterations):
            self.policy.write_slots()  # the forward reads the slots: they must follow the master weights
            stats, _ = self._forward_backward(gradients.packs, gradients.constants)
            metrics |= stats.off_policy_metrics()
            skip_note = self.guards.reason_to_skip_iteration(step, stats.grad_norm)
            if skip_note is not None:
                notes.append(skip_note)
                return
            metrics["updates"] += self._optimizer_step(stats)

    def _forward_backward(
        self, packs: StepPacks, constants: StepConstants
    ) -> tuple[GradientStats, tuple[torch.Tensor, ...]]:
        """One pass over all packs: gradients summed over workers and clipped. Also returns each pack's log-probabilities.

        In float16 a pass whose gradients overflow is repeated with half the loss scale; all workers decide alike, by the
        numbers of all. If the forward pass is not finite, or no scale is small enough, the guards get the gradient as it is.
        """
        stats, logprobs = self._one_pass(packs, constants)
        if self.loss_scale is not None:
            initial = self.loss_scale.value
            while math.isfinite(stats.loss) and not math.isfinite(stats.grad_norm) and self.loss_scale.halve(initial):
                stats, logprobs = self._one_pass(packs, constants)
        return stats, logprobs

    def _one_pass(self, packs: StepPacks, constants: StepConstants) -> tuple[GradientStats, tuple[torch.Tensor, ...]]:
        def backward(part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            old_N, reference_N = part.old_N, part.reference_N
            loss = self.objective.of(part.pack, constants, old_logprobs_N=old_N, reference_logprobs_N=reference_N)
            return self.policy.backward(
                part.pack,
                loss.token_loss,
                temperature=self.config.rollout.temperature,
                passes=loss.passes,
                factor=loss.factor,
                loss_scale=None if self.loss_scale is None else self.loss_scale.value,
            )

        routers = self.policy.routers

        def undo() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            if routers is not None:
                routers.take_flips()

        undo()  # what an earlier pass has left
        results = packs.each(backward, undo=undo)
        losses, logprobs, entropies = zip(*results, strict=True) if results else ((), (), ())
        self._sum_gradients()
        local = tally_of(
            self.objective,
            packs.packs,
            losses,
            logprobs,
            entropies,
            old=packs.old,
            reference=packs.reference,
            flips=None if routers is None else routers.take_flips(),
        )
        tallies = self.world.all_gather(local)
        if self.loss_scale is not None:
            self.loss_scale.unscale_(self.policy.masters)
        return GradientStats.of(tallies, grad_norm=self._clip_gradients()), logprobs

    def _sum_gradients(self) -> None:
        """Sum the workers' gradients; every worker gets the sum."""
        if self.world.size == 1:
            return
        for master in self.policy.masters:
            if master.grad is None:  # a worker whose groups all lacked variance
                master.grad = torch.zeros_like(master)
        self.world.all_reduce_([master.grad for master in self.policy.masters if master.grad is not None])

    def _clip_gradients(self) -> float:
        """Scale the gradients down to `max_grad_norm` if they exceed it; returns their norm before that."""
        masters, largest = self.policy.masters, self.config.optim.max_grad_norm
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        if norm > largest:  # torch's clip_grad_norm_ multiplies all gradients by 1 otherwise
            torch.nn.utils.clip_grads_with_norm_(masters, largest, norm)
        return norm.item()

    def _optimizer_step(self, stats: GradientStats) -> bool:
        """Step unless the gradient is not finite, which would destroy the adapter, or zero: momentum alone must not move it."""
        is_possible = math.isfinite(stats.grad_norm) and stats.grad_norm > 0
        if is_possible:
            self.optimizer.step()
        return is_possible

    def _trained(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with a gradient: those with an advantage (all with a reward, if a penalty or bonus acts), without masked
        completions."""
        algorithm = self.config.algorithm
        trained = [g for g in groups if any(g.advantages) or (algorithm.needs_every_group and not _lacks_rewards(g))]
        return [without_truncated(group) for group in trained] if algorithm.mask_truncated_completions else trained

    def _constants(self, groups: Sequence[Group], trained: Sequence[Group], packs: StepPacks) -> StepConstants:
        """The denominators of the step's means, and the entropy that a token must reach."""
        algorithm = self.config.algorithm
        sequences = sum(completion.num_tokens > 0 for group in trained for completion in group.completions)
        if not algorithm.filter_zero_variance or algorithm.loss_aggregation == "constant":
            sequences = sum(len(group.completions) for group in groups)
        counted = trained
        if not algorithm.filter_zero_variance:
            counted = [without_truncated(group) for group in groups] if algorithm.mask_truncated_completions else groups
        tokens = _num_tokens(counted)
        counts = Counts(
            sequences=sequences,
            tokens=tokens,
            local_tokens=_num_tokens([group for group in counted if group.is_local]),
            workers=self.world.size,
            max_completion_length=self.config.rollout.max_completion_length,
        )
        if algorithm.top_entropy_quantile == 1.0:
            return StepConstants(counts=counts, entropy_tokens=tokens)
        temperature = self.config.rollout.temperature
        local = packs.each(lambda part: self.policy.logprobs(part.pack, temperature=temperature)[1].cpu())
        entropies = torch.cat(self.world.gather(local)).to(self.policy.device)
        bound = entropy_bound(entropies, quantile=algorithm.top_entropy_quantile)
        return StepConstants(counts=counts, entropy_bound=bound, entropy_tokens=int((entropies >= bound).sum()))

    def _reference_logprobs(self, packs: StepPacks) -> list[torch.Tensor] | None:
        """Log-probabilities of the reference policy, if there is a KL penalty."""
        if self.config.algorithm.beta == 0:
            return None
        temperature = self.config.rollout.temperature
        with self.policy.as_reference():
            return packs.each(lambda part: self.policy.logprobs(part.pack, temperature=temperature)[0])


def _lacks_rewards(group: Group) -> bool:
    """Whether the group was scored, and no function applied: in an outage, penalties must not move the policy alone."""
    return bool(group.scores.total) and all(reward is None for reward in group.scores.total)


def without_truncated(group: Group) -> Group:
    """The group without its truncated completions."""
    return group.select([i for i, one in enumerate(group.completions) if not one.is_truncated])


def _num_tokens(groups: Sequence[Group]) -> int:
    return sum(completion.num_tokens for group in groups for completion in group.completions)
