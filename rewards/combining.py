"""What several reward functions gave, put together: weighted sums, columns, metrics, and what failures do.

    pending = Pending(calls={"length": [(inputs, future)]}, weights={"length": 1.0}, on_error="stop")
    pending.result().total
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from .config import OnError
from .contract import CallResult, Failure, Inputs, Returned, RewardError


@dataclass(frozen=True)
class Scores:
    """The rewards of n completions."""

    total: list[float | None]
    """Weighted sum over the functions that apply to the row, length n; None where none applies."""
    by_function: dict[str, list[float | None]]
    """Unweighted rewards, one list of length n for every function, by its name in `Scorer.names`."""
    extras: dict[str, list[Any]]
    """Columns for the completions table, from `log_extra`, each of length n."""
    metrics: dict[str, float]
    """From `log_metric`; the mean where one name was logged several times."""
    weights: list[float]
    """Of the functions, in their order."""
    errors: dict[str, list[str | None]] = field(default_factory=dict)
    """Why a function gave a row no reward, by its name; only functions that failed, None for rows that they scored."""

    def select(self, rows: Sequence[int]) -> Scores:
        """The scores of some rows. Metrics and weights stay those of all."""

        def of_rows(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {name: [values[row] for row in rows] for name, values in columns.items()}

        return replace(
            self,
            total=[self.total[row] for row in rows],
            by_function=of_rows(self.by_function),
            extras=of_rows(self.extras),
            errors=of_rows(self.errors),
        )


@dataclass(frozen=True)
class Pending:
    """Scores that are being made. `calls` holds for each function, in order, its inputs and what will come of them."""

    calls: dict[str, list[tuple[Inputs, Future[CallResult]]]]
    weights: dict[str, float]
    on_error: OnError

    def is_finished(self) -> bool:
        """Whether `result` would not wait."""
        return all(future.done() for calls in self.calls.values() for _, future in calls)

    def result(self) -> Scores:
        """Wait for the scores.

        Raises, where failures stop the run, ValueError if a function returned something other than n finite numbers or None,
        and RewardError, with the original as its cause where it was raised in this process, if it failed otherwise.
        """
        outcomes = {name: [(inputs, future.result()) for inputs, future in calls] for name, calls in self.calls.items()}
        if self.on_error == "stop":
            for name, calls in outcomes.items():
                _raise_first_failure(name, calls)
        given = None if self.on_error in ("stop", "none") else float(self.on_error)
        by_function, errors = {}, {}
        for name, calls in outcomes.items():
            by_function[name] = [r for call in calls for r in _rewards_of(*call, given=given)]
            reasons = [reason for inputs, outcome in calls for reason in [_reason(outcome)] * len(inputs)]
            if any(reason is not None for reason in reasons):
                errors[name] = reasons
        return Scores(
            total=[self._weighted_sum(row) for row in zip(*by_function.values(), strict=True)],
            by_function=by_function,
            extras=_extras(outcomes.values()),
            metrics=_metrics(outcomes.values()),
            weights=list(self.weights.values()),
            errors=errors,
        )

    def cancel(self) -> None:
        """Do without the result: async calls are cancelled, others are left to end."""
        for calls in self.calls.values():
            for _, future in calls:
                future.cancel()

    def _weighted_sum(self, row: Sequence[float | None]) -> float | None:
        weights = self.weights.values()
        terms = [weight * reward for weight, reward in zip(weights, row, strict=True) if reward is not None]
        return sum(terms) if terms else None


Calls = Sequence[tuple[Inputs, CallResult]]


def _raise_first_failure(name: str, calls: Calls) -> None:
    first_row = 0
    for inputs, outcome in calls:
        if isinstance(outcome, Failure) and outcome.is_bad_value:
            raise ValueError(outcome.reason + (f" (counted from row {first_row} of the prompt's)" if first_row else ""))
        if isinstance(outcome, Failure):
            prompt = repr(inputs.prompts[0])
            prompt = prompt if len(prompt) <= 100 else prompt[:97] + "..."
            rows = f"row {first_row}" if len(inputs) == 1 else f"rows {first_row} to {first_row + len(inputs) - 1}"
            message = f"reward function {name!r} failed on {rows} (first prompt: {prompt}): {outcome.reason}"
            raise RewardError(f"{message}\n\n{outcome.details}" if outcome.details else message) from outcome.cause
        first_row += len(inputs)


def _rewards_of(inputs: Inputs, outcome: CallResult, *, given: float | None) -> Sequence[float | None]:
    return [given] * len(inputs) if isinstance(outcome, Failure) else outcome.rewards


def _reason(outcome: CallResult) -> str | None:
    return outcome.reason if isinstance(outcome, Failure) else None


def _extras(functions: Iterable[Calls]) -> dict[str, list[Any]]:
    """Columns over all rows; None where a call logged nothing. The last function that logs a column has it."""
    extras: dict[str, list[Any]] = {}
    for calls in functions:
        columns = dict.fromkeys(c for _, outcome in calls if isinstance(outcome, Returned) for c in outcome.extras)
        for column in columns:
            extras[column] = [
                value
                for inputs, outcome in calls
                for value in (outcome.extras.get(column) if isinstance(outcome, Returned) else None) or [None] * len(inputs)
            ]
    return extras


def _metrics(functions: Iterable[Calls]) -> dict[str, float]:
    logged: defaultdict[str, list[float]] = defaultdict(list)
    for calls in functions:
        for _, outcome in calls:
            for name, values in outcome.metrics.items() if isinstance(outcome, Returned) else ():
                logged[name] += values
    return {name: sum(values) / len(values) for name, values in logged.items()}
