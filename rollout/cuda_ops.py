"""Faster replacements for parts of vLLM on CUDA. `vllm_compat.py` installs them.

vLLM draws the noise of a request with a seed in a kernel launch of its own, one for each sequence and token. Here one kernel
samples the whole batch (`kernels/triton/sample.py`), from random numbers that depend on a request's seed and position only.

Shapes: N rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

OFFSETS = 4
"""vLLM moves a request's generator by this much for a token, and back if it discards the token (after a chunk of a prompt)."""


def draws(generators: Mapping[int, torch.Generator], rows: int) -> torch.Tensor:
    """Seed and position of each row, [2, N] int64 on the host. Moves the generators on by one token.

    A request's generator has both, so that they are the same after vLLM has preempted and resumed it. Rows without a generator
    take a random seed from torch's generator of the CPU.
    """
    if len(generators) == rows:
        seeds, positions = [0] * rows, [0] * rows
    else:
        seeds, positions = torch.randint(-(2**63), 2**63 - 1, (rows,)).tolist(), [0] * rows
    for row, generator in generators.items():
        offset = generator.get_offset()
        seeds[row], positions[row] = _signed(generator.initial_seed()), offset // OFFSETS
        generator.set_offset(offset + OFFSETS)
    return torch.tensor([seeds, positions], dtype=torch.int64)


def sample(
    logits_NV: torch.Tensor, generators: Mapping[int, torch.Generator], k: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replacement for the forward of vLLM's `TopKTopPSampler`: tokens [N] and the log-probabilities [N, V] they come from.

    Does not wait for the device, so it cannot raise for logits that are not finite. Such a row has token 0 and
    log-probabilities of NaN, which are an error once the request has ended (`vllm_requests.py`).
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    from ..kernels.triton.sample import sample_in_place  # a machine without such a device needs no Triton

    logprobs_NV = apply_top_k_top_p(logits_NV, k, p).float()
    seeds_N, positions_N = draws(generators, len(logprobs_NV)).to(logprobs_NV.device, non_blocking=True)
    return sample_in_place(logprobs_NV, seeds_N, positions_N), logprobs_NV


def _signed(seed: int) -> int:
    """A seed of 64 bits as int64."""
    return seed - 2**64 if seed >= 2**63 else seed
