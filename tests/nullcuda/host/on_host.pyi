"""The compiled on_host.cpp."""

from collections.abc import Callable

from torch import Tensor

def install() -> int:
    """Let every operator of torch that has a kernel for the CPU compute with it on the null device; returns how many."""

def as_cpu(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the host; it does not keep the memory alive."""

def as_cuda(tensor: Tensor) -> Tensor:
    """A copy on the current null device; a tensor that came from `as_cpu` stays what it is."""

def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""

def record(action: Callable[[], object]) -> None:
    """Repeat `action` at each launch of the graph that is being captured."""
