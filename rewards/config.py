"""The section `rewards` of a run's configuration: reward functions, where they run, and the action on a failure.

    RewardsConfig(functions=["last_integer", {"function": "my.py:length", "weight": 0.2}], isolation="process", timeout=10)

Nothing here imports torch.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from ..section import Section

Isolation = Literal["inline", "process", "ray"]

OnError = Literal["stop", "none"] | float
"""The effect of a failed call: raise, give its rows None, or give them this reward."""


class RewardFunction(Section):
    """A reward function with options."""

    function: str = Field(min_length=1)
    """`path/to/file.py:name`, `package.module:name`, a built-in's name, or a sequence classifier's folder or Hub id."""

    kwargs: dict[str, Any] | None = None
    """Arguments of a factory, which returns the reward function. `{}` calls it without arguments."""

    name: str | None = Field(default=None, min_length=1)
    """Name in metrics and tables. None: the function's `__name__`."""

    weight: float | None = None
    """Weight in the sum. None: 1."""

    isolation: Isolation | None = None
    """Where it runs. None: `rewards.isolation`."""


def _form(value: object) -> str:
    """The form in which a function is specified, so that an error message is about that form only."""
    return "<mapping>" if isinstance(value, dict | RewardFunction) else "<name>"


NameOrMapping = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[RewardFunction, Tag("<mapping>")], Discriminator(_form)
]


class RewardsConfig(Section):
    """Reward functions, where they run, and the action on a failure."""

    functions: list[NameOrMapping] = Field(default=[])
    """Reward functions, `path/to/file.py:name`, `package.module:name` or a built-in's name; or a mapping with `function` and
    any of `kwargs`, `name`, `weight`, `isolation`. A single one needs no list."""

    eval_functions: dict[str, list[NameOrMapping]] = Field(default={})
    """The functions of evaluation sets that have their own, by the name of the set: `{gsm8k: last_number}`. The other sets have
    `functions`."""

    weights: list[float] | None = None
    """One weight per function for the sum (TRL's `reward_weights`). None: 1 each."""

    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """With several functions: advantages of the weighted sum; or each function's rewards are normalised within the group, and
    then their weighted sum over the batch (GDPO, arXiv 2601.05242), so that no function dominates by its scale."""

    isolation: Isolation = "inline"
    """`inline`: in the trainer's process. `process`: in separate processes, where a call can be killed, while further
    completions are sampled. `ray`: in such processes on the nodes of the Ray cluster at `RAY_ADDRESS`, or of one that is
    started here. Async functions always run on an event loop in the trainer's process."""

    num_workers: int | None = Field(default=None, ge=1)
    """Processes; with `ray` concurrent calls. None: one per core, at most 8; with `ray` one per CPU, at most 64."""

    timeout: float | None = Field(default=60.0, gt=0)
    """Seconds for one call, in processes and for async functions. None: no limit."""

    retries: int = Field(default=0, ge=0)
    """How often a failed call is repeated, in processes and for async functions. Calls whose Ray node is lost are repeated
    in addition."""

    memory_gib: float | None = Field(default=None, gt=0)
    """Limit on the data of each process, in GiB. None: no limit."""

    on_error: OnError = "stop"
    """The effect of a failed call: `stop` ends the run with the function's name, the rows and the traceback; `none` gives the
    rows no reward; a number is their reward. The rows are marked in the completions table."""

    rows_per_call: int | None = Field(default=None, ge=1)
    """Completions per call. None: all of a prompt. With 1 a failure costs one row, but functions do not see the group."""

    max_steps_without_reward: int | None = Field(default=20, ge=1)
    """The run stops, with a checkpoint, after this many steps in a row in which no completion had a reward: an outage of the
    reward functions, in which nothing is learned. None: it never stops."""

    @field_validator("functions", mode="before")
    @classmethod
    def _single_to_list(cls, functions: object) -> object:
        return [functions] if isinstance(functions, str | dict) else functions

    @field_validator("eval_functions", mode="before")
    @classmethod
    def _single_of_a_set_to_list(cls, functions: object) -> object:
        if not isinstance(functions, dict):
            return functions
        return {name: [one] if isinstance(one, str | dict | RewardFunction) else one for name, one in functions.items()}

    @field_validator("eval_functions")
    @classmethod
    def _a_set_has_functions(cls, functions: dict[str, list[NameOrMapping]]) -> dict[str, list[NameOrMapping]]:
        if empty := [name for name, of_set in functions.items() if not of_set]:
            raise ValueError(f"{empty[0]} has no functions: leave it out for those of the run")
        return functions

    @field_validator("on_error", mode="before")
    @classmethod
    def _word_or_number(cls, value: object) -> object:
        if value in ("stop", "none"):
            return value
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(f"must be stop, none or a number (got {value!r})") from None

    @field_validator("weights")
    @classmethod
    def _one_weight_per_function(cls, weights: list[float] | None, info: ValidationInfo) -> list[float] | None:
        functions = info.data.get("functions")  # none if they are passed to the trainer in Python
        return weights if weights is None or not functions else weights_of(weights, functions)

    def entries(self) -> list[RewardFunction]:
        """The functions, those specified by name only as a `RewardFunction` too."""
        return [RewardFunction(function=f) if isinstance(f, str) else f for f in self.functions]

    def of_eval_set(self) -> "RewardsConfig":
        """The section for an evaluation set that has its own functions, whose weights are among their own options."""
        return self.model_copy(update={"functions": [], "eval_functions": {}, "weights": None})


def weights_of(weights: list[float] | None, functions: Sequence[str | RewardFunction]) -> list[float]:
    """One weight per function: those of the list, else of the functions' options. Raises ValueError if they do not match."""
    options = [None if isinstance(function, str) else function.weight for function in functions]
    if weights is None:
        return [1.0 if weight is None else weight for weight in options]
    if len(weights) != len(functions):
        raise ValueError(f"{len(weights)} reward weights for {len(functions)} reward functions: specify one weight each")
    if any(weight is not None for weight in options):
        raise ValueError("reward weights are specified twice: in `weights` and with the functions")
    return weights
