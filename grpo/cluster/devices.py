"""What a worker does about its GPU, and about the caches of its machine, before it loads anything.

    prepare_device()        # in every worker, once the process group exists
"""

from __future__ import annotations

import ray.train
import torch
import torch.distributed as dist

from ...rollout.vllm_compat import use_separate_cache


def prepare_device() -> None:
    """Give this worker a cache for vLLM's compiled graphs, and let NCCL connect the GPUs while their memory is free.

    NCCL connects and takes its buffers at its first collective. That would be the first sum of gradients, after the engine has
    taken the memory: a GPU or network that does not work would be found out after a rollout.
    """
    use_separate_cache(ray.train.get_context().get_local_rank())
    if torch.cuda.is_available():
        ones = torch.ones(1, device="cuda")
        dist.all_reduce(ones)
        assert ones.item() == dist.get_world_size(), "the sum over all workers"
