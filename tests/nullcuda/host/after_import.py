"""Runs a function as soon as a module was imported, so that a process that does not need torch does not load it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.functions: dict[str, Callable[[], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.functions:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.functions.pop(fullname)()

        spec.loader.exec_module = exec_module
        return spec


_FINDER = _Finder()


def run(module: str, function: Callable[[], None]) -> None:
    """Call `function` once, after `module` was imported for the first time."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.functions[module] = function
