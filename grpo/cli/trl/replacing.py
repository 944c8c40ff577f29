"""Names of TRL's modules are replaced, also in modules that are imported later.

    with names_replaced({"GRPOConfig": config, "GRPOTrainer": trainer}) as version:
        from trl import GRPOTrainer                         # trainer
        from trl.trainer.grpo_trainer import GRPOTrainer    # trainer

TRL imports its trainers at their first use, which takes seconds: that stays so.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import version
from types import ModuleType

LAZY = ("trl", "trl.trainer")
"""Modules whose attributes import others."""

DEFINING = {"trl.trainer.grpo_config": ("GRPOConfig",), "trl.trainer.grpo_trainer": ("GRPOConfig", "GRPOTrainer")}
"""Modules that define the replaced names, or import them."""


@contextmanager
def names_replaced(replacements: Mapping[str, type]) -> Iterator[str]:
    """Replace the names inside the block; gives TRL's version.

    Raises:
        ValueError: TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise ValueError("trl is not installed: change the script's import to `from rankup import ...`, or pip install trl")
    with ExitStack() as stack:
        finder = _Finder(replacements, stack)
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
        for name in LAZY:
            _replace(importlib.import_module(name), replacements, stack)
        for name, names in DEFINING.items():
            if name in sys.modules:
                _replace(sys.modules[name], {each: replacements[each] for each in names}, stack)
        yield version("trl")


def _replace(module: ModuleType, replacements: Mapping[str, type], stack: ExitStack) -> None:
    """Set the attributes of a module until the stack is closed."""
    for name, replacement in replacements.items():
        stack.callback(_restore, module, name, vars(module).get(name))
        setattr(module, name, replacement)


def _restore(module: ModuleType, name: str, value: object) -> None:
    if value is None:  # the module had not yet imported it
        delattr(module, name)
    else:
        setattr(module, name, value)


class _Finder(MetaPathFinder):
    """Finds the modules in `DEFINING`, with a loader that replaces their names."""

    def __init__(self, replacements: Mapping[str, type], stack: ExitStack) -> None:
        self._replacements = replacements
        self._stack = stack

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in DEFINING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            replacements = {name: self._replacements[name] for name in DEFINING[fullname]}
            spec.loader = _Loader(spec.loader, replacements, self._stack)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, loader: SourceFileLoader, replacements: Mapping[str, type], stack: ExitStack) -> None:
        super().__init__(loader.name, loader.path)
        self._replacements = replacements
        self._stack = stack

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _replace(module, self._replacements, self._stack)
