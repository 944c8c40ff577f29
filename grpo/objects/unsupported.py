"""Arguments of TRL's `GRPOTrainer` that are accepted only without a value.

    check_unsupported(optimizers=(None, None))
"""

from __future__ import annotations


def check_unsupported(optimizers: tuple[object, object] | None) -> None:
    """Check that there are none.

    Raises:
        ValueError: there are.
    """
    if any(part is not None for part in optimizers or ()):
        raise ValueError(
            "optimizers: are not supported, as they hold the parameters of an object that is not trained: set optim.optimizer, "
            "optim.learning_rate and optim.lr_scheduler_type"
        )
