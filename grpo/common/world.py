"""The workers of one run, as each of them sees the others: itself alone, or one of several that share a step.

    peers = ALONE                                   # one device: nothing is exchanged
    peers = Peers.of_process_group()                # inside a worker of torch.distributed
    own = prompts[peers.share(len(prompts))]        # this worker's part of a step, in the order of the ranks
    all_groups = peers.gather(own_groups)           # everybody's, concatenated in the order of the ranks
    peers.sum_(tensors)                             # in place, in one buffer

Everything that decides something is computed by every worker from the same gathered numbers, so all decide the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


class LostPeerError(ConnectionError):
    """Another worker has not taken part in an exchange: its process, its node, or the network between them is gone."""


class Peers:
    """`rank` of `size` workers; those of a size above 1 are the default process group of `torch.distributed`.

    `on_exchange` is called after everything that the workers exchange: a sign of life. Every exchange raises LostPeerError
    where another worker is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, on_exchange: Callable[[], None] | None = None) -> None:
        self.rank = rank
        self.size = size
        self._on_exchange = on_exchange or (lambda: None)

    @staticmethod
    def of_process_group(*, on_exchange: Callable[[], None] | None = None) -> Peers:
        """The default process group's."""
        return Peers(dist.get_rank(), dist.get_world_size(), on_exchange=on_exchange)

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what a run leaves behind."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This worker's part of `count` things: parts follow each other by rank, and differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, own: Sequence[T]) -> list[T]:
        """Everybody's things in the order of the ranks. They travel pickled: small ones only."""
        if self.size == 1:
            return list(own)
        return [one for part in self.gather_each(own) for one in part]

    def gather_each(self, own: T) -> list[T]:
        """One thing of each worker, in the order of the ranks."""
        if self.size == 1:
            return [own]
        parts: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(parts, own)
        return cast(list[T], parts)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first worker makes, for all of them."""
        return self.gather_each(make() if self.is_first else cast(T, None))[0]

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the workers, by one exchange of one flat buffer.

        The sum is the same to the bit for every worker.
        """
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._exchange():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])  # type: ignore[attr-defined]

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # what torch.distributed raises where the other side is gone
            raise LostPeerError(f"another worker is gone: {error}") from error
        self._on_exchange()


ALONE = Peers()
