"""The update: groups with advantages in, one (or `num_iterations`) optimizer steps out.

    learner = Learner(policy, config)
    update = learner.update(groups, step=0, observed={"reward": 0.3})
    update.metrics["grad_norm"], update.notes

Guards look at every update between its backward and the optimizer: they can skip it, or put back the last healthy adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..algorithm.corrections import gap_metrics, gap_tally
from ..algorithm.losses import Counts, entropy_bound, kl_k3
from ..algorithm.tally import Tally
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..guards.evaluations import Rewards
from ..guards.guards import Guards, Verdict, Witness
from ..model.packing import Pack, WeightedGroup, pack, pad
from ..model.policy import Policy
from .objective import Objective, StepConstants
from .optimizer import learning_rate, make_optimizer, set_learning_rate
from .snapshots import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What came of one update: metrics (TRL's names), and what the guards have to say to a person.

    `give_up`: why the run should stop, None to go on.
    """

    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    give_up: str | None = None


class Learner:
    """AdamW on the policy's masters, with gradient clipping and guards. See the module's docstring.

    Attributes:
        is_between_steps: whether masters, optimizer and guards are still those of the last whole step. An update clears it as
            soon as it changes one of them; whoever has finished the step sets it.
    """

    def __init__(self, policy: Policy, config: GRPOConfig, *, pad_token_id: int = 0, world: World = SINGLE_PROCESS) -> None:
        self.policy = policy
        self.world = world
        self.config = config
        self.pad_token_id = pad_token_id
        self.is_between_steps = True
        self.objective = Objective(config)
        self.optimizer = make_optimizer(policy.master_roles, config.optim)
        self.guards = Guards(config.guards)
        self.snapshots: dict[Witness, Snapshot] = {
            "step": Snapshot(policy.masters, self.optimizer),
            "evaluation": Snapshot(policy.masters, self.optimizer),
        }

    def update(
        self, groups: Sequence[WeightedGroup], *, step: int, observed: Mapping[str, float] | None = None
    ) -> Update:
        """Train on the groups. `observed`: what the rollouts have shown (reward, lengths), for the guards.

        Where there is nothing to train on nothing changes, and the metrics say only what the guards know.
        """
        kept = self._kept(groups)
        if not any(c.num_tokens for w in kept for c in w.group.completions):
            return self._judged(step, observed or {}, {}, can_update=False)
        own = [w for w in kept if w.is_own]
        packs = self._packs(own)
        constants = self._constants(groups, kept, packs)
        base = self._base_logprobs(packs)
        # The first iteration's policy is the one that the step began with: its log-probabilities are the old ones.
        metrics, old = self._gradients(packs, constants, [None] * len(packs), base)
        metrics |= _packing_metrics(self.world.all_gather(_packing_counts(packs, own)))
        update = self._judged(step, observed or {}, metrics, can_update=True)
        for _ in range(1, self.config.algorithm.num_iterations):
            if update.metrics["update_skipped"]:
                break
            self.policy.write_slots()  # the forward reads the slots: they must follow the masters
            measured, _ = self._gradients(packs, constants, old, base)
            # All else stays that of the first, which is on-policy: it compares with the sampler.
            update.metrics.update({name: measured[name] for name in measured if name in OFF_POLICY_METRICS})
            objection = self.guards.allows(step + 1, measured["grad_norm"])
            if objection:
                update = replace(
                    update, metrics={**update.metrics, **self.guards.metrics()}, notes=(*update.notes, objection)
                )
                break
            update.metrics["updates"] += self._step_if_possible(measured["grad_norm"])
        self.optimizer.zero_grad(set_to_none=True)  # gradients need no memory while the next step is sampled
        return update

    def evaluated(self, step: int, rewards: Rewards) -> Verdict:
        """The guards' verdict on an evaluation after `step` updates, carried out. After a restore, publish the adapter."""
        self.is_between_steps = False
        verdict = self.guards.judge_evaluation(step, rewards)
        if verdict.restore:
            self.restore(verdict.restore)
        elif verdict.healthy:
            self.snapshots["evaluation"].take(step)
        return verdict

    def restore(self, witness: Witness) -> int:
        """Put back a snapshot of adapter and optimizer state, as the guards have said; returns the step it is of."""
        self.is_between_steps = False
        step = self.snapshots[witness].restore()
        if witness == "evaluation":  # steps since then found something healthy that the evaluation did not
            self.snapshots["step"].take(step + 1)
        self.guards.restored(witness)
        return step

    def _judged(
        self, step: int, observed: Mapping[str, float], metrics: dict[str, float], *, can_update: bool
    ) -> Update:
        """The guards' verdict on the gradients that stand in the masters, carried out."""
        self.is_between_steps = False
        verdict = self.guards.judge(step + 1, {**observed, **metrics})  # people count from 1
        rate = learning_rate(self.config.optim, step) * self.guards.learning_rate_factor
        set_learning_rate(self.optimizer, rate)
        stepped = False
        if verdict.restore:  # these gradients are of the policy that is just left
            self.restore(verdict.restore)
        else:
            if verdict.healthy:  # also where there is nothing to train on: the guards go by it
                self.snapshots["step"].take(step + 1)
            stepped = can_update and not verdict.skip and self._step_if_possible(metrics["grad_norm"])
        self.optimizer.zero_grad(set_to_none=True)
        updates = {"updates": float(stepped), "update_skipped": float(not stepped)} if can_update else {}
        texts = (*(alarm.text for alarm in verdict.alarms), "" if verdict.give_up else verdict.text)
        return Update(
            metrics={**metrics, "learning_rate": rate, **updates, **self.guards.metrics()},
            notes=tuple(text for text in texts if text),
            give_up=verdict.text if verdict.give_up else None,
        )

    def _gradients(
        self,
        packs: list[Pack],
        constants: StepConstants,
        old: Sequence[torch.Tensor | None],
        base: Sequence[torch.Tensor | None],
    ) -> tuple[dict[str, float], tuple[torch.Tensor, ...]]:
        """One forward and backward over all packs: clipped gradients in the masters. Returns metrics, each pack's logprobs."""
        self.optimizer.zero_grad(set_to_none=True)
        results = []
        for one, old_N, base_N in zip(packs, old, base, strict=True):
            loss = self.objective.of(one, constants, old_logprobs_N=old_N, base_logprobs_N=base_N)
            results.append(
                self.policy.backward(
                    one,
                    loss.token_loss,
                    temperature=self.config.rollout.temperature,
                    visits=loss.visits,
                    factor=loss.factor,
                )
            )
        losses, logprobs, entropies = zip(*results, strict=True) if results else ((), (), ())
        self._sum_gradients()
        tally = Tally()
        if packs:
            tally = self._tally(packs, losses, logprobs, entropies, old=old, base=base)
        tally = Tally.together(self.world.all_gather(tally))
        metrics = {
            "loss": tally.sums["loss"],
            "grad_norm": self._clip_gradients(),
            "entropy": tally.mean("entropy"),
            **gap_metrics(tally),
            "sampling/left_out_ratio": 1.0 - tally.mean("kept"),
        }
        if "kl_to_base" in tally.sums:
            metrics["kl"] = tally.mean("kl_to_base")
        if "clip_low" in tally.sums:
            low, high = tally.mean("clip_low"), tally.mean("clip_high")
            metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        return metrics, logprobs

    def _tally(
        self,
        packs: list[Pack],
        losses: Sequence[torch.Tensor],
        logprobs: Sequence[torch.Tensor],
        entropies: Sequence[torch.Tensor],
        *,
        old: Sequence[torch.Tensor | None],
        base: Sequence[torch.Tensor | None],
    ) -> Tally:
        """What the metrics of these packs are made of."""
        pairs = list(zip(packs, logprobs, strict=True))
        logprobs_all = torch.cat(list(logprobs))
        sums = {
            "entropy": torch.cat(list(entropies)),
            "loss": torch.stack(list(losses)),
            "kept": torch.cat([self.objective.keeps(one, logprobs_N) for one, logprobs_N in pairs]),
        }
        if self.config.algorithm.beta > 0:
            sums["kl_to_base"] = kl_k3(logprobs_all, torch.cat([b for b in base if b is not None]))
        if old[0] is not None:
            counts = [self.objective.clip_counts(*one) for one in zip(packs, logprobs, old, strict=True)]  # type: ignore[arg-type]
            sums["clip_low"], sums["clip_high"] = torch.stack(counts).unbind(1)
        gap = gap_tally(
            logprobs_all,
            torch.cat([one.sampler_logprobs_N for one in packs]),
            torch.cat([self.objective.weights(one, logprobs_N) for one, logprobs_N in pairs]),
        )
        return Tally.of(sums=sums, extremes={}).beside(gap)

    def _sum_gradients(self) -> None:
        """Every worker has a part of the step's gradient; each gets the whole."""
        if self.world.size == 1:
            return
        for master in self.policy.masters:
            if master.grad is None:  # a worker whose groups all lacked variance
                master.grad = torch.zeros_like(master)
        self.world.all_reduce_([master.grad for master in self.policy.masters if master.grad is not None])

    def _step_if_possible(self, grad_norm: float) -> bool:
        """An optimizer step. A gradient that is not finite would destroy the adapter; of none only old momentum would move."""
        possible = math.isfinite(grad_norm) and grad_norm > 0
        if possible:
            self.optimizer.step()
        return possible

    def _clip_gradients(self) -> float:
        """Scale the gradients down to `max_grad_norm` where they exceed it; returns their norm before."""
        masters, largest = self.policy.masters, self.config.optim.max_grad_norm
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        if norm > largest:  # torch's clip_grad_norm_ multiplies all gradients by 1 otherwise
            torch.nn.utils.clip_grads_with_norm_(masters, largest, norm)
        return norm.item()

    def _kept(self, groups: Sequence[WeightedGroup]) -> list[WeightedGroup]:
        """What has a gradient: groups with an advantage (all, where a penalty or bonus acts), completions that count."""
        algorithm = self.config.algorithm
        kept = [w for w in groups if algorithm.needs_every_group or any(w.advantages)]
        return [without_truncated(w) for w in kept] if algorithm.mask_truncated_completions else kept

    def _packs(self, groups: Sequence[WeightedGroup]) -> list[Pack]:
        budget, device = self.config.optim.tokens_per_pack, self.policy.device
        if self.policy.shares_prompts:
            return pack(groups, tokens_per_pack=budget, device=device)
        return pad(groups, tokens_per_pack=budget, pad_token_id=self.pad_token_id, device=device)

    def _constants(
        self, groups: Sequence[WeightedGroup], kept: Sequence[WeightedGroup], packs: list[Pack]
    ) -> StepConstants:
        """The denominators of the step's means, and the entropy that a token must reach."""
        algorithm = self.config.algorithm
        lengths = [c.num_tokens for w in kept for c in w.group.completions]
        tokens, sequences = sum(lengths), len([length for length in lengths if length])
        if not algorithm.filter_zero_variance or algorithm.loss_aggregation == "constant":
            sequences = sum(len(w.group.completions) for w in groups)
        if not algorithm.filter_zero_variance:
            counted = [without_truncated(w) for w in groups] if algorithm.mask_truncated_completions else groups
            tokens = sum(c.num_tokens for w in counted for c in w.group.completions)
        counts = Counts(
            sequences=sequences,
            tokens=tokens,
            local_tokens=tokens,
            max_completion_length=self.config.rollout.max_completion_length,
        )
        if algorithm.top_entropy_quantile == 1.0:
            return StepConstants(counts=counts, entropy_tokens=tokens)
        temperature = self.config.rollout.temperature
        own = [self.policy.logprobs(one, temperature=temperature)[1].cpu() for one in packs]
        entropies = torch.cat(self.world.gather(own)).to(self.policy.device)
        bound = entropy_bound(entropies, quantile=algorithm.top_entropy_quantile)
        return StepConstants(counts=counts, entropy_bound=bound, entropy_tokens=int((entropies >= bound).sum()))

    def _base_logprobs(self, packs: list[Pack]) -> list[torch.Tensor | None]:
        """Log-probabilities of the model without its adapter, where a KL penalty asks for them."""
        if self.config.algorithm.beta == 0:
            return [None] * len(packs)
        temperature = self.config.rollout.temperature
        return [self.policy.logprobs(one, temperature=temperature, use_adapter=False)[0] for one in packs]


OFF_POLICY_METRICS = ("loss", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def without_truncated(weighted: WeightedGroup) -> WeightedGroup:
    """The group without the completions that were cut off."""
    whole = [i for i, completion in enumerate(weighted.group.completions) if completion.finish_reason != "length"]
    return dataclasses.replace(
        weighted,
        group=dataclasses.replace(weighted.group, completions=tuple(weighted.group.completions[i] for i in whole)),
        advantages=tuple(weighted.advantages[i] for i in whole),
    )


def _packing_counts(packs: list[Pack], groups: Sequence[WeightedGroup]) -> dict[str, int]:
    """Packs and tokens of this worker, and the tokens that one prompt a completion would have been."""
    lengths = [(len(w.group.prompt_token_ids), c.num_tokens) for w in groups for c in w.group.completions if c.token_ids]
    return {
        "packs": len(packs),
        "computed": sum(one.num_input_tokens for one in packs),
        "padding": sum(one.num_padding_tokens for one in packs),
        "completion": sum(length for _, length in lengths),
        "plain": sum(map(sum, lengths)),
    }


def _packing_metrics(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Packs and tokens that went through the model, the share that was padding, and their ratio to one prompt a completion."""
    total = {name: sum(one[name] for one in counts) for name in counts[0]}
    return {
        "packing/packs": float(total["packs"]),
        "packing/tokens": float(total["computed"]),
        "packing/completion_tokens": float(total["completion"]),
        "packing/padding_ratio": total["padding"] / (total["computed"] + total["padding"]),
        "packing/token_ratio": total["computed"] / total["plain"],
    }
