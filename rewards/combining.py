"""The results of several reward functions combined: weighted sums, columns, metrics, and the effect of failures.

    future = Future()
    pending = Pending(calls={"length": [(inputs, future)]}, weights={"length": 0.5}, on_error="stop")
    future.set_result(Returned(rewards=[2.0, None]))
    pending.result().total      # [1.0, None]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from .config import OnError
from .contract import CallResult, Failure, Inputs, Returned, RewardError
from .texts import shorten


@dataclass(frozen=True)
class Scores:
    """The rewards of n completions."""

    total: list[float | None]
    """Weighted sum over the functions that apply to the row, length n; None for rows to which none applies."""
    by_function: dict[str, list[float | None]]
    """Unweighted rewards, one list of length n for every function, by its name in `Scorer.names`."""
    extras: dict[str, list[Any]]
    """Columns for the completions table, from `log_extra`, each of length n; `<function>/<column>` if an earlier function logs
    a column of that name too."""
    metrics: dict[str, float]
    """From `log_metric`; the mean if a name was logged several times. Names of the run have a prefix (`logged.py`)."""
    weights: list[float]
    """One per function, in their order."""
    errors: dict[str, list[str | None]] = field(default_factory=dict)
    """Reasons of failures, one list of length n for every function that failed; None for rows that it scored."""

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
    """Scores that are being computed. `calls` holds each function's inputs and the future results, in order."""

    calls: dict[str, list[tuple[Inputs, Future[CallResult]]]]
    weights: dict[str, float]
    on_error: OnError

    def is_finished(self) -> bool:
        """Whether `result` would not wait."""
        return all(future.done() for calls in self.calls.values() for _, future in calls)

    def result(self) -> Scores:
        """Wait for the scores.

        Raises, if failures stop the run, ValueError if a function returned something other than n finite numbers or None, and
        RewardError for any other failure, with the original exception as its cause if it was raised in this process.
        """
        results = {name: [(inputs, future.result()) for inputs, future in calls] for name, calls in self.calls.items()}
        if self.on_error == "stop":
            for name, calls in results.items():
                _raise_first_failure(name, calls)
        reward_of_failure = None if self.on_error in ("stop", "none") else float(self.on_error)
        by_function: dict[str, list[float | None]] = {}
        extras: dict[str, list[Any]] = {}
        errors: dict[str, list[str | None]] = {}
        logged: defaultdict[str, list[float]] = defaultdict(list)
        for name, calls in results.items():
            reasons = [result.reason if isinstance(result, Failure) else None for _, result in calls]
            if any(reasons):
                errors[name] = [reason for reason, (inputs, _) in zip(reasons, calls, strict=True) for _ in inputs.prompts]
            returned = [
                Returned(rewards=[reward_of_failure] * len(inputs)) if isinstance(result, Failure) else result
                for inputs, result in calls
            ]
            by_function[name] = [reward for one in returned for reward in one.rewards]
            for column, values in _columns(returned).items():
                extras[f"{name}/{column}" if column in extras else column] = values
            for one in returned:
                for metric, values in one.metrics.items():
                    logged[metric] += values
        return Scores(
            total=[self._weighted_sum(row) for row in zip(*by_function.values(), strict=True)],
            by_function=by_function,
            extras=extras,
            metrics={metric: sum(values) / len(values) for metric, values in logged.items()},
            weights=list(self.weights.values()),
            errors=errors,
        )

    def cancel(self) -> None:
        """Give up on the result, and cancel all calls."""
        for calls in self.calls.values():
            for _, future in calls:
                future.cancel()

    def _weighted_sum(self, row: Sequence[float | None]) -> float | None:
        weights = self.weights.values()
        terms = [weight * reward for weight, reward in zip(weights, row, strict=True) if reward is not None]
        return sum(terms) if terms else None


def _raise_first_failure(name: str, calls: Sequence[tuple[Inputs, CallResult]]) -> None:
    first_row = 0
    for inputs, result in calls:
        if isinstance(result, Failure) and result.is_bad_value:
            raise ValueError(result.reason + (f" (counted from row {first_row} of the prompt's)" if first_row else ""))
        if isinstance(result, Failure):
            prompt = shorten(repr(inputs.prompts[0]), 100)
            rows = f"row {first_row}" if len(inputs) == 1 else f"rows {first_row} to {first_row + len(inputs) - 1}"
            message = f"reward function {name!r} failed on {rows} (first prompt: {prompt}): {result.reason}"
            raise RewardError(f"{message}\n\n{result.details}" if result.details else message) from result.cause
        first_row += len(inputs)


def _columns(calls: Sequence[Returned]) -> dict[str, list[Any]]:
    """One function's logged columns over the rows of all its calls; None where a call did not log a column."""
    names = dict.fromkeys(name for returned in calls for name in returned.extras)
    return {
        name: [value for one in calls for value in one.extras.get(name) or [None] * len(one.rewards)] for name in names
    }
