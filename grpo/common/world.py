"""The processes that share every step of a run.

    world = SINGLE_PROCESS                          # one device: nothing is exchanged
    world = World.from_process_group()              # inside a worker of torch.distributed
    local = prompts[world.shard(len(prompts))]      # this worker's part of a step, in rank order
    groups = world.gather(local_groups)             # the parts of all workers, concatenated in rank order
    world.all_reduce_(tensors)                      # sum in place, through one flat buffer

Decisions are computed by every worker from the same gathered numbers, so all workers decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class WorkerLostError(ConnectionError):
    """Another worker did not take part in a collective: its process, its node, or the network is gone."""


class World:
    """This process's `rank` among `size` workers. A size above 1 is the default process group of `torch.distributed`.

    `on_collective` is called after every collective: a sign of life. Every collective raises WorkerLostError where another
    worker is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, on_collective: Callable[[], None] | None = None) -> None:
        self.rank = rank
        self.size = size
        self._on_collective = on_collective or (lambda: None)

    @staticmethod
    def from_process_group(*, on_collective: Callable[[], None] | None = None) -> World:
        """The world of the default process group."""
        import torch.distributed as dist  # one process needs no torch

        return World(dist.get_rank(), dist.get_world_size(), on_collective=on_collective)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process: the one that records and saves."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """This worker's part of `count` items. Parts are contiguous in rank order; their sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, local: Sequence[T]) -> list[T]:
        """The items of all workers, concatenated in rank order. They are pickled: keep them small."""
        if self.size == 1:
            return list(local)
        return [item for part in self.all_gather(local) for item in part]

    def all_gather(self, local: T) -> list[T]:
        """One object of each worker, in rank order. Pickled."""
        if self.size == 1:
            return [local]
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        with self._collective():
            dist.all_gather_object(parts, local)
        return cast(list[T], parts)

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """The result of `make` on the main process, on every worker. The others do not call `make`."""
        return self.all_gather(make() if self.is_main else cast(T, None))[0]

    def all_reduce_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the workers, in one collective. The sum is bit-identical on every worker."""
        if self.size == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._collective():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])  # type: ignore[attr-defined]

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # what torch.distributed raises when the other side is gone
            raise WorkerLostError(f"another worker is gone: {error}") from error
        self._on_collective()


SINGLE_PROCESS = World()
