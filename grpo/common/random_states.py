"""The global random generators of Python, NumPy and torch, as plain data.

    state = random_states()         # JSON-serializable
    set_random_states(state)        # the generators continue from there

    with preserved_random_states(seed=7):
        users_code()                # draws from generators seeded with 7; afterwards they are as they were

    with preserved_random_states(seed=7) as states:
        users_code()
        with states.paused():       # as they were; here they may go on
            others_code()
        users_code()                # from where it was

Data order and sampling have separate seeds; the global generators matter to users' reward functions.
"""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def random_states() -> dict[str, Any]:
    """States of the generators; of this process's GPU too, if CUDA is in use."""
    import torch

    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(torch.cuda.get_rng_state())] if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore what `random_states` returned, here or on a machine with another number of GPUs."""
    import torch

    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**states["numpy"], "state": {**states["numpy"]["state"], "key": key}})
    torch.set_rng_state(_decode(states["torch"]))
    if states["cuda"] and torch.cuda.is_available():
        # Earlier versions saved a state for each visible GPU.
        of_gpu = states["cuda"][min(torch.cuda.current_device(), len(states["cuda"]) - 1)]
        torch.cuda.set_rng_state(_decode(of_gpu))


class Preserved:
    """The states from before a block of `preserved_random_states`."""

    def __init__(self) -> None:
        self._torch = sys.modules.get("torch")
        self._before = self._current()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In this block the generators are those from before, and what it draws is drawn from them."""
        inside = self._current()
        self.restore()
        try:
            yield
        finally:
            self._before = self._current()
            self._set(inside)

    def restore(self) -> None:
        """The generators are as they were before."""
        self._set(self._before)

    def _current(self) -> tuple[Any, Any, Any, Any]:
        torch = self._torch
        cpu, cuda = (None, None) if torch is None else (torch.get_rng_state(), _cuda_state(torch))
        return random.getstate(), np.random.get_state(), cpu, cuda

    def _set(self, states: tuple[Any, Any, Any, Any]) -> None:
        python, numpy, cpu, cuda = states
        random.setstate(python)
        np.random.set_state(numpy)
        if self._torch is not None:
            self._torch.set_rng_state(cpu)
        if self._torch is not None and cuda is not None:
            self._torch.cuda.set_rng_state(cuda)


@contextmanager
def preserved_random_states(seed: int | None = None) -> Iterator[Preserved]:
    """Restore the generators at the end of the block, whatever it does with them. torch's only if it has been imported.

    Args:
        seed: seeds them at the start of the block; None: they continue from their current states.
    """
    preserved = Preserved()
    if seed is not None:
        _seed_all(seed, sys.modules.get("torch"))
    try:
        yield preserved
    finally:
        preserved.restore()


def _seed_all(seed: int, torch: ModuleType | None) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch is not None:
        torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed queues work for a CUDA that is not in use
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed % 2**63)


def _cuda_state(torch: ModuleType) -> torch.Tensor | None:
    """Of this process's GPU; None if CUDA is not in use."""
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
