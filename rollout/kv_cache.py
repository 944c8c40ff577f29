"""vLLM's KV cache, whose memory is released while the trainer computes gradients (`activity.py`).

    activity = activity_of(llm_engine, config.rollout, "cuda")
    activity.suspend()
    activity.resume()

On CUDA the cache is in a memory pool of vLLM's own (`enable_cumem_allocator`), whose physical pages are unmapped and mapped
again at the same addresses, which captured graphs have. Weights and LoRA buffers stay: only pages with the tag `kv_cache` go.
vLLM's sleep levels 1 and 2 would release the weights too, of which the trainer has views. On CPU the pages of the cache are
returned to the kernel, and are zero when they are used next. What is cached is forgotten in both cases.

Between release and restore vLLM must not step: `activity.py` and `vllm_requests.py` see to that.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import mmap
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .activity import Activity, KeptCache
from .config import RolloutConfig
from .vllm_compat import require, usage_counted_anew

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

TAG = "kv_cache"
MADV_DONTNEED = 4  # of Linux
MAX_DRAINING_STEPS = 16
_NEVER_FREED: list[torch.Tensor] = []
"""Caches whose memory is released for ever: only their addresses are in use."""

logger = logging.getLogger("rankup")


def activity_of(engine: LLMEngine, rollout: RolloutConfig, device: str) -> Activity:
    """The states of an engine on `cpu` or `cuda` that was built with `uses_pool`.

    Raises:
        ValueError: the installed vLLM lacks something that rankup needs.
    """
    if device == "cpu":
        return Activity(KeptCache() if rollout.release_kv_cache is False else _CpuCache(engine))
    return Activity(_CudaCache(engine) if engine.vllm_config.model_config.enable_cumem_allocator else KeptCache())


def uses_pool(rollout: RolloutConfig, device: str) -> bool:
    """Whether the engine needs a memory pool of its own, so that its cache can be released.

    Raises:
        ValueError: it does, and this vLLM has none.
    """
    from vllm.platforms import current_platform

    if device == "cpu" or rollout.release_kv_cache is False:
        return False
    purpose = "release the KV cache"
    if require(current_platform, "is_cumem_allocator_available", purpose=purpose)():
        return True
    if rollout.release_kv_cache:
        raise ValueError("rollout.release_kv_cache: the installed vLLM has no memory pool on this platform: set it to false")
    logger.warning("the KV cache stays in memory while training: the installed vLLM has no memory pool on this platform")
    return False


@contextmanager
def beside_earlier_pools() -> Iterator[None]:
    """Start an engine with a memory pool although tensors of an earlier one are still in use.

    vLLM forbids it, as its sleep mode would then also release those. Here only KV caches are released, and views of weights
    remain wherever a trainer's model is kept, or as tables that modules of vLLM make when they are imported.

    Raises:
        ValueError: the earlier engine is open.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    earlier = _allocations()
    if any(data.tag == TAG for data in earlier.values()):
        gc.collect()  # an engine is full of reference cycles
    if any(data.tag == TAG for data in earlier.values()):
        raise ValueError(
            "another engine of this process is open, and vLLM has one memory pool in a process: close it, or set "
            "rollout.release_kv_cache: false for both"
        )
    with usage_counted_anew(CuMemAllocator.get_instance()):
        yield


class _CudaCache:
    def __init__(self, engine: LLMEngine) -> None:
        for name in ("sleep", "wake_up", "release_kv_cache_memory"):
            require(engine, name, purpose="release the KV cache")
        _check_core(engine)
        self._engine = engine
        close = weakref.WeakMethod(self.close)
        atexit.register(lambda: (found := close()) and found())  # before vLLM's own, which frees what is mapped

    def release(self) -> None:
        """See `activity.KvCache`."""
        _drain(self._engine)
        self._engine.sleep(level=0)  # no memory: it only pauses the scheduler, without which vLLM refuses the next line
        try:
            self._engine.release_kv_cache_memory()
        except BaseException:
            self._engine.wake_up(tags=["scheduling"])
            raise

    def restore(self) -> None:
        """See `activity.KvCache`."""
        needed = sum(data.handle[1] for data in _released())
        torch.cuda.empty_cache()
        if needed > torch.cuda.mem_get_info()[0]:
            gc.collect()
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        if needed > free:
            raise RuntimeError(_too_little(needed, free, total))
        try:
            self._engine.wake_up(tags=[TAG])
        except RuntimeError as error:  # memory that another process took meanwhile
            raise RuntimeError(_too_little(needed, torch.cuda.mem_get_info()[0], total)) from error

    def close(self) -> None:
        """See `activity.KvCache`. vLLM's allocator cannot free memory that is not mapped, so it is mapped again."""
        if not _released():
            return
        try:
            self.restore()
        except RuntimeError:  # such as after an error in training, whose traceback holds the memory
            _NEVER_FREED.extend(_caches(self._engine))
            for data in _released():
                data.tag = "weights"  # a later engine does not take it again


def _too_little(needed: int, free: int, total: int) -> str:
    """The message for a cache that does not fit any more."""
    return (
        f"the KV cache of {needed / 2**30:.3g} GiB was released for training and does not fit any more: {free / 2**30:.3g} of "
        f"{total / 2**30:.3g} GiB are free. Lower rollout.gpu_memory_utilization, set optim.optimizer=adamw_8bit, or end what "
        "else uses the GPU; `rankup plan` shows what fits"
    )


class _CpuCache:
    def __init__(self, engine: LLMEngine) -> None:
        _check_core(engine)
        self._engine = engine
        _caches(engine)

    def release(self) -> None:
        """See `activity.KvCache`."""
        _drain(self._engine)
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache, whose memory is about to be released")
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _caches(self._engine)}
        for address, size in storages.items():
            return_pages(address, size)

    def restore(self) -> None:
        """See `activity.KvCache`. The kernel gives pages again when they are written."""

    def close(self) -> None:
        """See `activity.KvCache`."""


def return_pages(address: int, size: int) -> bool:
    """Return the whole pages of this memory to the kernel; they read as zeros. Returns whether it worked (Linux only)."""
    if not sys.platform.startswith("linux"):
        return False
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= start:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED) == 0:
        return True
    logger.warning("the kernel keeps the KV cache's memory while training (errno %d)", ctypes.get_errno())
    return False


def _allocations() -> dict[int, Any]:
    """What is allocated in vLLM's memory pool, by address: `handle` (device, bytes, ...), `tag`, `is_asleep`."""
    from vllm.device_allocator import cumem

    purpose = "release the KV cache"
    allocator = require(cumem, "CuMemAllocator", purpose=purpose)
    return require(allocator.get_instance(), "pointer_to_data", purpose=purpose)


def _released() -> list[Any]:
    """What is released of the KV cache."""
    return [data for data in _allocations().values() if data.tag == TAG and data.is_asleep]


def _caches(engine: LLMEngine) -> list[torch.Tensor]:
    """The KV cache of each layer: views of one or several blocks of memory."""
    owner: Any = engine
    for name in ("model_executor", "driver_worker", "worker", "model_runner", "kv_caches"):
        owner = require(owner, name, purpose="release the KV cache")
    return owner


def _check_core(engine: LLMEngine) -> None:
    core: Any = engine
    for name in ("engine_core", "engine_core"):  # the client, and the core in this process
        core = require(core, name, purpose="release the KV cache")
    require(core, "batch_queue", purpose="finish what is scheduled before the KV cache is released")
    require(core.scheduler, "has_requests", purpose="finish what is scheduled before the KV cache is released")


def _drain(engine: Any) -> None:
    """Finish the steps that asynchronous scheduling has begun for requests that have ended."""
    core = engine.engine_core.engine_core
    for _ in range(MAX_DRAINING_STEPS):
        if not core.batch_queue and not core.scheduler.has_requests():
            return
        engine.step()
    raise RuntimeError("vLLM still has requests although none is open: please report this")
