"""The learning rate of each step: a pure function of the configuration and the step.

    learning_rate(config.optim, step=0)

Names, parameters and formulas of the schedules are those of transformers, with one difference: the warm-up starts at one step's
share of the rate, not at 0, so that no step is wasted; and every schedule has it.
"""

from __future__ import annotations

import math

from ..config import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """The learning rate of a step (from 0): warm-up, then the schedule, which ends at `max_steps`."""
    warmup = optim.num_warmup_steps
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    return optim.learning_rate * _factor(optim, step, warmup)


def _factor(optim: OptimConfig, step: int, warmup: int) -> float:
    """The share of the peak rate after the warm-up."""
    kind, progress = optim.lr_scheduler_type, (step - warmup) / (optim.max_steps - warmup)
    numbers = {name: value for name, value in optim.lr_scheduler_kwargs.items() if isinstance(value, float)}
    match kind:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return _cosine(progress, numbers.get("num_cycles", 0.5))
        case "cosine_with_restarts":
            return 0.5 * (1.0 + math.cos(math.pi * (numbers.get("num_cycles", 1.0) * progress % 1.0)))
        case "cosine_with_min_lr":
            floor = numbers.get("min_lr_rate", numbers.get("min_lr", 0.0) / optim.learning_rate)
            return floor + (1.0 - floor) * _cosine(progress, numbers.get("num_cycles", 0.5))
        case "polynomial":
            floor = numbers.get("lr_end", 1e-7) / optim.learning_rate
            return floor + (1.0 - floor) * (1.0 - progress) ** numbers.get("power", 1.0)
        case "inverse_sqrt":
            timescale = numbers.get("timescale") or warmup or 10_000
            return 1.0 / math.sqrt((step - warmup + timescale) / timescale)
        case "warmup_stable_decay":
            return _stable_then_decay(optim, step, numbers)
    return 1.0  # constant


def _cosine(progress: float, num_cycles: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress)))


def _stable_then_decay(optim: OptimConfig, step: int, numbers: dict[str, float]) -> float:
    """Constant, then down over the last `num_decay_steps` steps."""
    decay_steps = numbers["num_decay_steps"]
    progress = max(0.0, (step - (optim.max_steps - decay_steps)) / decay_steps)
    shapes = {
        "linear": 1.0 - progress,
        "cosine": _cosine(progress, numbers.get("num_cycles", 0.5)),
        "1-sqrt": 1.0 - math.sqrt(progress),
    }
    floor = numbers.get("min_lr_ratio", 0.0)
    return floor + (1.0 - floor) * shapes[str(optim.lr_scheduler_kwargs.get("decay_type", "cosine"))]
