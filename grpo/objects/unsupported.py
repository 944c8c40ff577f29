"""Arguments of TRL's `GRPOTrainer` that are accepted only without a value.

    check_unsupported(optimizers=(None, None), tools=None, rollout_func=None, environment_factory=None)
"""

from __future__ import annotations

from ..config.trl.trainer_arguments import ONE_ANSWER


def check_unsupported(
    *,
    optimizers: tuple[object, object] | None = (None, None),
    tools: object = None,
    rollout_func: object = None,
    environment_factory: object = None,
) -> None:
    """Check that none of them is set. An empty list of tools is none.

    Raises:
        ValueError: one is; one line each.
    """
    problems = []
    if any(part is not None for part in optimizers or ()):
        problems.append(
            "optimizers: are not supported, as they hold the parameters of an object that is not trained: set optim.optimizer, "
            "optim.learning_rate and optim.lr_scheduler_type"
        )
    for name, value in (("tools", tools), ("rollout_func", rollout_func), ("environment_factory", environment_factory)):
        if value is not None and value != []:
            problems.append(f"{name}: is {ONE_ANSWER}")
    if problems:
        raise ValueError("\n".join(problems))
