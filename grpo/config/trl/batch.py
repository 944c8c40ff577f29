"""TRL's batch in terms of ours: how many prompts a step has, and how many optimizer steps its completions serve.

    batch = batch_of(per_device=8, accumulation=4, per_generation=None, generation=None, generations=8, iterations=1, workers=1)
    batch.prompts_per_step, batch.num_iterations        # 4, 1

TRL samples a generation of `per_device * workers * steps_per_generation` completions at once, goes over it `num_iterations`
times in passes of `per_device` completions, and updates the policy after every `accumulation` passes. A step here samples, and
updates the policy `num_iterations` times on all of its completions. Both are the same in two cases: an update has passed over
one complete generation, or over several complete ones, between which the policy did not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts of a step, and optimizer steps on its completions (`algorithm.num_iterations`)."""

    prompts_per_step: int
    num_iterations: int

    def steps(self, updates: float) -> int:
        """The steps in which so many of TRL's optimizer steps are made; the last step is a complete one."""
        return math.ceil(updates / self.num_iterations)


def batch_of(
    *,
    per_device: int,
    accumulation: int,
    per_generation: int | None,
    generation: int | None,
    generations: int,
    iterations: int,
    workers: int,
) -> Batch:
    """The batch of these values of TRL: `per_generation` is its `steps_per_generation`, `generation` its
    `generation_batch_size`, `generations` its `num_generations`, and `workers` the number of its processes.

    Raises:
        ValueError: TRL refuses the values too, or updates the policy on a part of a generation.
    """
    if generation is not None and per_generation is not None:
        raise ValueError("generation_batch_size: steps_per_generation is set too, and each follows from the other: keep one")
    in_one_pass = per_device * workers
    if generation is not None:
        if generation % in_one_pass:
            raise ValueError(
                f"generation_batch_size: must be divisible by per_device_train_batch_size times cluster.workers, which is "
                f"{in_one_pass} (got {generation})"
            )
        passes = generation // in_one_pass
    else:
        passes = per_generation or accumulation
    completions = in_one_pass * passes
    if completions % generations:
        raise ValueError(
            f"num_generations: must divide the completions of a generation, which are {in_one_pass} a pass x {passes} passes = "
            f"{completions} (got {generations}): change per_device_train_batch_size or gradient_accumulation_steps"
        )
    prompts, all_passes = completions // generations, passes * iterations
    if accumulation % all_passes == 0:  # whole generations, all sampled from the same policy
        return Batch(prompts_per_step=prompts * (accumulation // all_passes), num_iterations=1)
    if accumulation % passes == 0 and all_passes % accumulation == 0:
        return Batch(prompts_per_step=prompts, num_iterations=all_passes // accumulation)
    raise ValueError(
        f"steps_per_generation: a generation has {passes} passes, and the policy would be updated after every {accumulation} "
        "(gradient_accumulation_steps): an update here is made on complete generations. Set "
        f"gradient_accumulation_steps={passes} for one update on each, and num_iterations for several"
    )


def effective_step(*, prompts: int, generations: int, iterations: int, max_steps: int) -> str:
    """One line: what a step is, and how many there are."""
    updates = "1 optimizer step" if iterations == 1 else f"{iterations} optimizer steps"
    total = f"{max_steps} steps in all" + ("" if iterations == 1 else f" ({max_steps * iterations} optimizer steps)")
    return f"a step: {prompts} prompts x {generations} completions = {prompts * generations}, {updates} on them; {total}"
