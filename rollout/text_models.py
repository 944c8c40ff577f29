"""Models whose code in vLLM imports torchvision, where that is not installed.

    register_text_model("path/to/model")

vLLM's modules of models with a vision tower import processors of images, and these import torchvision, which has no wheel for a
CPU torch on PyPI. That of Qwen3.5 also has the class of the text model alone. Text needs none of it. The class is imported
beside an empty torchvision and registered with vLLM's public registry; whatever then wants to process an image fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from transformers import AutoConfig

from .model_classes import has_tower

BESIDE_TOWERS = frozenset({"Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"})
"""Architectures of text models whose module in vLLM imports torchvision."""

EMPTY = (
    *("torchvision", "torchvision.io", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.functional"),
    *("torchvision.transforms.v2", "torchvision.transforms.v2.functional"),
)


def register_text_model(model_path: str) -> None:
    """Register the model's class with vLLM if its module imports torchvision, unless that is installed."""
    from vllm import ModelRegistry

    config = AutoConfig.from_pretrained(model_path)
    architectures: list[str] = config.architectures or []
    wanted = [name for name in architectures if has_tower(config) or name in BESIDE_TOWERS]
    if not wanted or importlib.util.find_spec("torchvision") is not None:
        return
    for name in wanted:
        known = ModelRegistry.models.get(name)
        module_name: str | None = getattr(known, "module_name", None)  # none: it is registered already
        class_name: str = getattr(known, "class_name", name)
        if module_name is not None:
            with _empty_torchvision():
                module = importlib.import_module(module_name)
            ModelRegistry.register_model(name, getattr(module, class_name))


class _Empty(ModuleType):
    """A module of which every name can be imported, and none be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # it has submodules

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(name)


class _Placeholder:
    """A thing in such a module, and all that is in it: it may stand in annotations, and not be called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(f"{self._name}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise ImportError(f"torchvision is not installed, so there is no {self._name}: images cannot be processed")

    def __or__(self, other: object) -> _Placeholder:
        return self

    __ror__ = __or__


@contextmanager
def _empty_torchvision() -> Iterator[None]:
    for name in EMPTY:
        sys.modules[name] = _Empty(name)
    try:
        yield
    finally:
        for name in EMPTY:
            del sys.modules[name]
