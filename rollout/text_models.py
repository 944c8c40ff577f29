"""Text models whose code in vLLM imports torchvision, where that is not installed.

    register_text_model("path/to/model")

vLLM's module of Qwen3.5 has the model with a vision tower too, so it imports processors of images, and they import torchvision,
which has no wheel for a CPU torch on PyPI. The text model needs none of it. Its class is imported beside an empty torchvision
and registered with vLLM's public registry; whatever then wants to process an image fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from transformers import AutoConfig

MODULES = {
    "Qwen3_5ForCausalLM": "vllm.model_executor.models.qwen3_5",
    "Qwen3_5MoeForCausalLM": "vllm.model_executor.models.qwen3_5",
}
"""Modules of vLLM that import torchvision, by the architectures of text models in them."""

EMPTY = (
    *("torchvision", "torchvision.io", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.functional"),
    *("torchvision.transforms.v2", "torchvision.transforms.v2.functional"),
)


def register_text_model(model_path: str) -> None:
    """Register the model's class with vLLM if it is one of `MODULES`, unless torchvision is installed."""
    from vllm import ModelRegistry

    architectures: list[str] = AutoConfig.from_pretrained(model_path).architectures or []
    wanted = [name for name in architectures if name in MODULES]
    if not wanted or importlib.util.find_spec("torchvision") is not None:
        return
    for name in wanted:
        with _empty_torchvision():
            module = importlib.import_module(MODULES[name])
        ModelRegistry.register_model(name, getattr(module, name))


class _Empty(ModuleType):
    """A module of which every name can be imported, and none be used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # it has submodules

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__getattr__": lambda self, attribute: _refuse(f"{name}.{attribute}")})()


def _refuse(name: str) -> object:
    raise ImportError(f"torchvision is not installed, so there is no {name}: images cannot be processed")


@contextmanager
def _empty_torchvision() -> Iterator[None]:
    for name in EMPTY:
        sys.modules[name] = _Empty(name)
    try:
        yield
    finally:
        for name in EMPTY:
            del sys.modules[name]
