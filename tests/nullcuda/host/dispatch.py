"""Kernels of operators for tensors of the null device, whose memory is the host's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import on_host  # pyright: ignore[reportMissingModuleSource]  # compiled
import torch

_libraries: list[torch.library.Library] = []  # its kernels go with a library


def replace(namespace: str, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Make functions the CUDA kernels of operators in a namespace, by the operators' names."""
    library = torch.library.Library(namespace, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for name, function in functions.items():
            library.impl(name, function, "CUDA", allow_override=True)
    _libraries.append(library)


def computed_on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for tensors of the device: it is given the same memory as tensors of the host.

    New tensors that it returns are copied to the device. Within a capture the call is recorded: each launch of the graph
    repeats it, and writes into the tensors that the first call returned.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: the host's tensor, kept alive, and the device's

        def to_host(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_cuda:
                host = on_host.as_cpu(value)
                originals[id(host)] = (host, value)
                return host
            if isinstance(value, list | tuple):
                return type(value)(to_host(item) for item in value)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        def to_device(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return originals[id(value)][1] if id(value) in originals else on_host.as_cuda(value)
            return type(value)(to_device(item) for item in value) if isinstance(value, list | tuple) else value

        host_args = tuple(to_host(value) for value in args)
        host_kwargs = {name: to_host(value) for name, value in kwargs.items()}
        result = to_device(function(*host_args, **host_kwargs))

        def again() -> None:
            new = function(*host_args, **host_kwargs)
            for target, value in zip(_listed(result), _listed(new), strict=True):
                if isinstance(value, torch.Tensor) and id(value) not in originals and value.numel():
                    on_host.as_cpu(target).copy_(value)

        if on_host.capturing():
            on_host.record(again)
        return result

    return call


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
