"""A step in packs, and in smaller ones once memory has run out.

    budget = PackBudget(tokens=16384)                   # of the run
    packs = StepPacks(policy, groups, budget)
    results = packs.each(lambda one: policy.backward(one.pack, ...), undo=zero_grad)

If memory runs out in any worker's pack, all workers halve the budget, undo what they have computed of this pass, and repeat it
in smaller packs: the same update, a little slower. What is known of each token follows it into its new pack.

Legend: N targets of a pack.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from ..common.errors import first_line, is_out_of_memory
from ..common.log import logger
from ..common.world import SINGLE_PROCESS, World
from ..config.optim import USUAL_TOKENS_PER_PACK, OptimConfig
from ..data.groups import Group
from ..model.packing import Pack, by_origin, has_targets, pack, pad
from ..model.policy import Policy
from .stats import packing_counts, packing_metrics

T = TypeVar("T")


@dataclass(slots=True)
class PackBudget:
    """Token budget of a pack, for the rest of the run.

    Attributes:
        first: the one that the run began with.
        notes: of the halvings since they were last taken.
    """

    tokens: int
    first: int = 0
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def of(optim: OptimConfig) -> PackBudget:
        """The configured one, or the usual one."""
        tokens = optim.tokens_per_pack or USUAL_TOKENS_PER_PACK
        return PackBudget(tokens, first=tokens)

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint: a run that resumes makes the same packs."""
        return {"first": self.first, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take the budget of a checkpoint, unless this run begins with another one than that run did."""
        if state.get("first") == self.first:
            self.tokens = state["tokens"]

    def take_notes(self) -> list[str]:
        """The notes, which are then forgotten."""
        notes, self.notes = self.notes, []
        return notes


class Part(NamedTuple):
    """A pack, and what is known of its targets: log-probabilities [N] of the step's initial policy and of the reference."""

    pack: Pack
    old_N: torch.Tensor | None
    reference_N: torch.Tensor | None


class _Shortage(NamedTuple):
    """A pack in which memory ran out: its tokens, how many completions it holds, and the first line of the error."""

    tokens: int
    sequences: int
    reason: str


class StepPacks:
    """This worker's packs of a step.

    Attributes:
        packs: the current ones.
        old, reference: per pack, see `Part`; None until known, or not needed.
    """

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[Group],
        budget: PackBudget,
        *,
        pad_token_id: int = 0,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self._policy = policy
        self._groups = groups
        self._budget = budget
        self._pad_token_id = pad_token_id
        self._world = world
        self.packs = self._make()
        self.old: Sequence[torch.Tensor] | None = None
        self.reference: Sequence[torch.Tensor] | None = None

    def each(self, compute: Callable[[Part], T], *, undo: Callable[[], None] = lambda: None) -> list[T]:
        """One result for each pack, of whatever size they are in the end. `compute` must not exchange anything with workers.

        Args:
            undo: what `compute` has changed, before the pass is repeated.

        Raises:
            ValueError: memory ran out in a pack of a single completion, on any worker.
        """
        while True:
            results, shortage = self._try(compute)
            shortages = [one for one in self._world.all_gather(shortage) if one is not None]
            if not shortages:
                return results
            del results
            undo()
            _free_memory()
            self._halve(shortages)

    def metrics(self) -> dict[str, float]:
        """Packs and tokens of all workers, the share of padding, and the ratio to one prompt for each completion."""
        counts = self._world.all_gather(packing_counts(self.packs, self._groups))
        return {**packing_metrics(counts), "packing/tokens_per_pack": float(self._budget.tokens)}

    def _make(self) -> list[Pack]:
        return make_packs(self._policy, self._groups, self._budget.tokens, pad_token_id=self._pad_token_id)

    def _try(self, compute: Callable[[Part], T]) -> tuple[list[T], _Shortage | None]:
        results: list[T] = []
        for part in self._parts():
            try:
                results.append(compute(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                one = part.pack
                # Only text leaves this block: the error's traceback holds the pass's activations.
                return [], _Shortage(one.num_input_tokens + one.num_padding_tokens, len(one.origins), first_line(error))
        return results, None

    def _parts(self) -> Iterator[Part]:
        nothing: list[None] = [None] * len(self.packs)
        return map(Part, self.packs, self.old or nothing, self.reference or nothing)

    def _halve(self, shortages: Sequence[_Shortage]) -> None:
        """Smaller packs on all workers: half of the smallest in which memory ran out."""
        smallest = min(shortages, key=lambda one: one.tokens)
        for one in shortages:
            if one.sequences == 1:
                raise ValueError(
                    f"out of memory in training: a prompt and a single completion, {one.tokens:,} tokens, do not fit "
                    f"({one.reason}). Lower rollout.max_completion_length, optim.logits_mib or rollout.gpu_memory_utilization, "
                    "or set optim.gradient_checkpointing=true; `rankup plan` shows what fits"
                )
        self._budget.tokens = max(1, min(self._budget.tokens, smallest.tokens) // 2)
        note = (
            f"memory ran out in a pack of {smallest.tokens:,} tokens ({smallest.reason}): from now on a pack has at most "
            f"{self._budget.tokens:,}; the update is the same"
        )
        logger.info(note)
        self._budget.notes.append(note)
        before, self.packs = self.packs, self._make()
        self.old = _moved(self.old, before, self.packs)
        self.reference = _moved(self.reference, before, self.packs)


def make_packs(policy: Policy, groups: Sequence[Group], tokens: int, *, pad_token_id: int = 0) -> list[Pack]:
    """Packs of at most `tokens`, in the layout that the policy computes."""
    if policy.shares_prompts:
        return pack(groups, tokens_per_pack=tokens, device=policy.device)
    return pad(groups, tokens_per_pack=tokens, pad_token_id=pad_token_id, device=policy.device)


def check_experts(groups: Sequence[Group]) -> None:
    """Whether the sampler's choice of experts is known of all completions that are trained on.

    Raises:
        ValueError: it is not, such as of completions that a user's function has made.
    """
    if any(has_targets(one) and one.routed_experts is None for group in groups for one in group.completions):
        raise ValueError(
            "rollout.routed_experts=replay: completions without the experts that vLLM chose, such as those of a rollout_func, "
            "cannot be replayed: set compare or ignore"
        )


def _moved(
    values: Sequence[torch.Tensor] | None, before: Sequence[Pack], after: Sequence[Pack]
) -> Sequence[torch.Tensor] | None:
    """Values of targets [N] by pack, for other packs of the same groups."""
    if values is None:
        return None
    pieces = by_origin(before, values)
    return [torch.cat([pieces[origin] for origin in one.origins]) for one in after]


def _free_memory() -> None:
    """Give back what the failed pass has left: first what Python keeps in cycles, then what torch keeps of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
