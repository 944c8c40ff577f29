"""The section `rewards` of a run's configuration: which functions score completions, where they run, and what a failure does.

    RewardsConfig(functions=["last_integer", {"function": "my.py:style", "weight": 0.2}], isolation="process", timeout=10)

Nothing here imports torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from ..section import Section

Isolation = Literal["inline", "process", "ray"]

OnError = Literal["stop", "none"] | float
"""What a call that failed does: raise, give its rows None, or give them this reward."""


class RewardFunction(Section):
    """One reward function with more to say than its name."""

    function: str = Field(min_length=1)
    """`path/to/file.py:name`, `package.module:name`, a built-in's name, or a sequence classifier's folder or hub id."""

    kwargs: dict[str, Any] | None = None
    """Arguments of a factory: what it returns for them is the reward function. `{}` calls it without any."""

    name: str | None = Field(default=None, min_length=1)
    """Name in metrics and tables. None: the function's own."""

    weight: float | None = None
    """Weight in the sum. None: 1."""

    isolation: Isolation | None = None
    """Where it runs. None: as `rewards.isolation` says."""


def _form(value: object) -> str:
    """Which of two forms a function is given in, so that a mistake is told in that form's words."""
    return "<mapping>" if isinstance(value, dict | RewardFunction) else "<name>"


NameOrMapping = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[RewardFunction, Tag("<mapping>")], Discriminator(_form)
]


class RewardsConfig(Section):
    """What makes a completion good."""

    functions: list[NameOrMapping] = Field(default=[])
    """Reward functions, `path/to/file.py:name`, `package.module:name` or a built-in's name; or a mapping with `function` and
    any of `kwargs`, `name`, `weight`, `isolation`. A single one will do without a list."""

    weights: list[float] | None = None
    """Weight of each function in the sum, one a function (TRL's `reward_weights`). None: 1 each."""

    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """With several functions: advantages from the weighted sum; or each function's rewards normalised within the group
    first, their weighted sum then over the batch (GDPO, arXiv 2601.05242), so that none drowns another."""

    isolation: Isolation = "inline"
    """`inline`: in the trainer's process. `process`: in processes of their own, where a call can be killed, while further
    completions are sampled. `ray`: in such processes on the nodes of the Ray cluster that `RAY_ADDRESS` names, or of one that
    is started here. Async functions run on an event loop beside the trainer in any case."""

    num_workers: int | None = Field(default=None, ge=1)
    """Processes; with `ray` calls at once in the cluster. None: one a core, at most 8; with `ray` one a CPU, at most 64."""

    timeout: float | None = Field(default=60.0, gt=0)
    """Seconds that one call may take, in processes and for async functions. None: for ever."""

    retries: int = Field(default=0, ge=0)
    """How often a call that failed is tried again, in processes and for async functions. One whose Ray node is lost is made
    again besides."""

    memory_gib: float | None = Field(default=None, gt=0)
    """Bound on the data of each process, in GiB. None: no bound."""

    on_error: OnError = "stop"
    """What a call that failed does: stop the run with the function's name, the rows and its traceback; give its rows no reward
    (`none`); or this number as their reward. The rows are marked in the completions table."""

    rows_per_call: int | None = Field(default=None, ge=1)
    """Completions a call. None: a prompt's together. With 1 a failure costs one row, but functions see no group."""

    @field_validator("functions", mode="before")
    @classmethod
    def _one_will_do(cls, functions: object) -> object:
        return [functions] if isinstance(functions, str | dict) else functions

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
    def _one_weight_a_function(cls, weights: list[float] | None, info: ValidationInfo) -> list[float] | None:
        functions = info.data.get("functions", ())  # none where Python users hand functions to the trainer
        if weights is not None and functions and len(weights) != len(functions):
            raise ValueError(f"must have one weight a function: {len(functions)} (got {len(weights)})")
        if weights is not None and any(isinstance(f, RewardFunction) and f.weight is not None for f in functions):
            raise ValueError("are given twice: here and with the functions")
        return weights

    def entries(self) -> list[RewardFunction]:
        """The functions, those that are given by their name alone as a `RewardFunction` too."""
        return [RewardFunction(function=f) if isinstance(f, str) else f for f in self.functions]
