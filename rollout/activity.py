"""Whether an engine samples, is idle, or is suspended: without the memory of its KV cache, while the trainer needs it.

    activity = Activity(cache)
    with activity.sampling():       # resumes
        ...
    activity.suspend()              # between two rollouts
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class KvCache(Protocol):
    """Memory that an engine does not need between two rollouts."""

    def release(self) -> None:
        """Give the memory back, and forget what is cached."""
        ...

    def restore(self) -> None:
        """Take the memory again. If this raises, the memory is still released, and it can be called again.

        Raises:
            RuntimeError: there is too little memory.
        """
        ...

    def close(self) -> None:
        """Prepare for the end of the engine, in either state."""
        ...


class KeptCache:
    """Nothing to release: a cache that stays, or none."""

    def release(self) -> None:
        """Does nothing."""

    def restore(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Activity:
    """See the module's docstring."""

    def __init__(self, cache: KvCache) -> None:
        self._cache: KvCache = cache
        self._open = 0
        self._is_suspended = False

    @property
    def is_suspended(self) -> bool:
        """Whether the memory is released."""
        return self._is_suspended

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A rollout, or requests of episodes, from the first submission to the end of the iterator. Resumes.

        Raises:
            RuntimeError: see `resume`.
        """
        self.resume()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def suspend(self) -> None:
        """Release the memory until `resume`. Does nothing if it is released already.

        Raises:
            RuntimeError: a rollout is in progress.
        """
        if not self._is_suspended:
            self.require_idle("suspend the engine")
            self._cache.release()
            self._is_suspended = True

    def resume(self) -> None:
        """Take the memory again. Does nothing if it is not released.

        Raises:
            RuntimeError: there is too little memory. The engine is still suspended.
        """
        if self._is_suspended:
            self._cache.restore()
            self._is_suspended = False

    def close(self) -> None:
        """Prepare for the end of the engine, and forget its cache."""
        self._cache.close()
        self._cache, self._is_suspended = KeptCache(), False

    def require_idle(self, purpose: str) -> None:
        """Raise RuntimeError if a rollout is in progress."""
        if self._open:
            gc.collect()  # closes an abandoned iterator, such as one that a traceback in a reference cycle holds
        if self._open:
            raise RuntimeError(f"cannot {purpose} during a rollout: exhaust or close the iterator of `rollout` first")
