"""GRPO with high-rank LoRA: the trainer and vLLM on one device, one copy of the adapter.

    from rankup import GRPOConfig, GRPOTrainer

    GRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=...).train()

The public names are imported on first use, so `import rankup` alone is quick and loads neither torch nor vLLM.
"""

import logging
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grpo.algorithm.losses import LossInputs
    from .grpo.common.interrupts import RunInterrupted
    from .grpo.config import GRPOConfig
    from .grpo.data.groups import Group
    from .grpo.data.prompts import Prompt
    from .grpo.trainer import GRPOTrainer
    from .rollout.types import Completion

__all__ = ["Completion", "GRPOConfig", "GRPOTrainer", "Group", "LossInputs", "Prompt", "RunInterrupted", "__version__"]

__version__ = version("rankup")

_HOMES = {
    "Completion": ".rollout.types",
    "GRPOConfig": ".grpo.config",
    "GRPOTrainer": ".grpo.trainer",
    "Group": ".grpo.data.groups",
    "LossInputs": ".grpo.algorithm.losses",
    "Prompt": ".grpo.data.prompts",
    "RunInterrupted": ".grpo.common.interrupts",
}


def __getattr__(name: str) -> Any:
    """Resolve a public name at its first use (PEP 562); later uses find it as an ordinary attribute."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    with warnings.catch_warnings():
        # tqdm warns in a notebook without ipywidgets, although none of its bars is shown.
        warnings.filterwarnings("ignore", message="IProgress not found")
        bitsandbytes.setLevel(logging.ERROR)  # PEFT imports it; it misses a package of kernels for 4 bits on CPUs
        try:
            value = getattr(import_module(_HOMES[name], __name__), name)
        finally:
            bitsandbytes.setLevel(level)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
