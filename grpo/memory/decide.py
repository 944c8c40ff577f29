"""What a run decides from its memory plan before the engine starts: vLLM's share of the GPU, and the size of a pass.

    config, plan = decide_memory(config, model_path)    # in a run; says in one line what was decided
    config, budget = decide_budget(shape, config, device="cuda", vram=24 * GIB)     # the same for a device that is not here

User-supplied values (`rollout.gpu_memory_utilization`, `optim.tokens_per_pack`) are kept.
"""

from __future__ import annotations

import math

from ..common.errors import first_line
from ..common.log import logger
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..config.optim import USUAL_TOKENS_PER_PACK
from .budget import MIN_TOKENS_PER_PACK, Budget, plan_budget, sized
from .parts import Device, changed, gib, tokens_per_pack
from .shapes import ModelShape, read_shape

PACK_SIZES = (16384, 8192, USUAL_TOKENS_PER_PACK, MIN_TOKENS_PER_PACK)
CONTEXT_BYTES = 384 * 2**20  # of `RUNTIME_BYTES`, what is taken as soon as CUDA is in use, assumed


def decide_memory(
    config: GRPOConfig, model_path: str, *, world: World = SINGLE_PROCESS
) -> tuple[GRPOConfig, Budget | None]:
    """The configuration with vLLM's share and the size of a pass, and the plan that they come from; on CPU nothing is decided.

    All workers take the smallest of their packs, so that a step takes all of them the same time. A model that cannot be planned
    keeps the usual values, with a note.

    Raises:
        ValueError: the device cannot hold the base weights.
    """
    import torch

    from ...kernels.cuda_memory import use_expandable_segments

    if not torch.cuda.is_available():
        return config, None
    use_expandable_segments()
    vram, in_use = device_memory()
    try:
        shape = read_shape(model_path)
    except ValueError as error:
        logger.info(f"the memory of this model cannot be planned, vLLM takes its usual share: {first_line(error)}")
        return config, None
    decided, budget = decide_budget(shape, config, device="cuda", vram=vram, in_use=in_use)
    if config.optim.tokens_per_pack is None:
        smallest = min(world.all_gather(tokens_per_pack(decided)))
        decided = changed(decided, {"optim.tokens_per_pack": smallest})
    logger.info(decision_note(budget, decided))
    if not budget.fits:
        logger.info(shortage_note(budget))
    share = budget.gpu_memory_utilization
    return changed(decided, {"rollout.gpu_memory_utilization": share}), budget


def device_memory() -> tuple[int, int]:
    """Total memory of the current GPU, and what others have in use of it, in bytes."""
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total, max(0, total - free - CONTEXT_BYTES)


def decide_budget(
    shape: ModelShape, config: GRPOConfig, *, device: Device, vram: int | None, in_use: int = 0
) -> tuple[GRPOConfig, Budget]:
    """The configuration with the size of a pass, and the budget with it.

    The largest size is taken with which the run fits and the KV cache holds all sequences. Where it cannot hold them, larger
    passes than usual take nothing more from it: with `releases_kv` no pass does.

    Raises:
        ValueError: the device cannot hold the base weights.
    """
    fixed = config.optim.tokens_per_pack or (USUAL_TOKENS_PER_PACK if device == "cpu" or vram is None else None)

    def planned(tokens: int) -> tuple[GRPOConfig, Budget]:
        of_step = sized(config, min(tokens, _tokens_of_a_step(config)))
        return sized(config, tokens), plan_budget(shape, of_step, device=device, vram=vram, in_use=in_use)

    if fixed is not None:
        return planned(fixed)
    plans = [planned(tokens) for tokens in PACK_SIZES]
    complete = [one for one in plans if one[1].fits and one[1].kv_bytes >= one[1].kv_wanted]
    modest = [one for one in plans if one[1].fits and (one[1].releases_kv or tokens_per_pack(one[0]) <= USUAL_TOKENS_PER_PACK)]
    return [*complete, *modest, plans[-1]][0]


def _tokens_of_a_step(config: GRPOConfig) -> int:
    """The most input tokens that a worker trains on in a step, each prompt once."""
    rollout, prompts = config.rollout, math.ceil(config.optim.prompts_per_step / config.cluster.workers)
    return prompts * (rollout.max_prompt_length + rollout.num_generations * (rollout.max_completion_length - 1))


def decision_note(budget: Budget, config: GRPOConfig) -> str:
    """One line: what vLLM takes and for what, and what training takes."""
    assert budget.vram is not None, "the memory of the device is known"
    training = f"training takes up to {gib(budget.training_peak)} in packs of {tokens_per_pack(config):,} tokens"
    others = f"; others have {gib(budget.in_use)} in use" if budget.in_use else ""
    if not budget.has_vllm:
        return f"of {gib(budget.vram)}, {training}{others}"
    cache = f"a KV cache of {budget.kv_tokens:,} tokens ({budget.concurrent_sequences:,} sequences of full length)"
    given = " as configured" if budget.share is not None else ""
    after = ", with the cache released" if budget.releases_kv else f" beside the cache of {gib(budget.kv_bytes)}"
    return (
        f"vLLM takes {budget.gpu_memory_utilization:.3g} of {gib(budget.vram)}{given}: {gib(budget.kv_bytes)} for {cache}, "
        f"{gib(budget.of_vllm)} for weights, buffers and a step; {training}{after}{others}"
    )


def shortage_note(budget: Budget) -> str:
    """What the plan expects to go wrong."""
    cache = f"a KV cache for one group takes {gib(budget.kv_of_a_group)}, {gib(budget.kv_bytes)} are left for it"
    return (
        f"memory may be too small: sampling takes {gib(budget.sampling)} and {cache}, training {gib(budget.training_peak)} of "
        f"{gib(budget.usable)}; `rankup plan` shows what needs less"
    )
