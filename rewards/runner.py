"""Call reward functions by TRL's contract and combine what they return.

    scorer = Scorer(["rankup.rewards.answers:last_integer", style], weights=[1.0, 0.1])
    scores = scorer.score(prompts=p, completions=c, completion_ids=i, columns={"answer": a}, trainer_state={})
    scores.total        # [1.1, 0.0, None, ...], one per completion

A reward function is any callable. It is called with keyword arguments only,

    f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=, log_metric=) -> list[float | None]

and one that has no `**kwargs` gets only the arguments that it names. `async def` functions (and objects with an async
`__call__`, and partials of either) run together, after the others. `None` says that the function does not apply to the
row. Everything here runs inline: sync functions on the caller's thread, async ones on one event loop that lives as
long as the scorer, so that a client with open connections can be kept from call to call.
"""

import asyncio
import functools
import inspect
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from .loading import RewardSpec, load_reward, reward_name

T = TypeVar("T")

RESERVED_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


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


class Scorer:
    """Loads reward functions once, and scores completions with them.

    `weights` has one finite number per function (default: all 1). `base_dir` is the folder that relative paths in
    `functions` are also looked up in. `names` holds one distinct name per function.

    Raises ValueError for no functions or a wrong number of weights, and what `load_reward` raises.
    """

    def __init__(
        self,
        functions: RewardSpec | Sequence[RewardSpec],
        *,
        weights: Sequence[float] | None = None,
        base_dir: Path | None = None,
    ):
        specs = [functions] if isinstance(functions, str) or callable(functions) else list(functions)
        if not specs:
            raise ValueError("no reward functions: give at least one")
        weights = [1.0] * len(specs) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(specs):
            raise ValueError(f"{len(weights)} reward weights for {len(specs)} reward functions: give one weight each")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"reward weights must be finite numbers, not {weights}")
        self.weights = weights
        self.functions = [load_reward(spec, base_dir=base_dir) for spec in specs]
        self.names = _distinct([reward_name(function) for function in self.functions])
        self._loop: _BackgroundLoop | None = None

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise now what `score` would raise about the data set's columns (the prompt's is not among them)."""
        columns = list(columns)
        check_column_names(columns)
        for name, function in zip(self.names, self.functions, strict=True):
            _accepted(name, function, dict.fromkeys([*RESERVED_ARGUMENTS, *columns]))

    def score(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: Mapping[str, Any],
    ) -> Scores:
        """Score n completions.

        prompts, completions: n strings, or n conversations (lists of messages).
        completion_ids: n unpadded lists of token ids. columns: the data set's other columns, n values each.
        trainer_state: the functions see it as an object with attributes (`trainer_state.global_step`), as TRL's.

        Raises ValueError where a function returns something other than n finite numbers or None, or asks for an
        argument that does not exist; RuntimeError, with the original as its cause, where it raises.
        """
        check_column_names(columns)
        inputs = dict(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        for name, values in inputs.items():
            if len(values) != len(completions):
                raise ValueError(f"{name} has {len(values)} values for {len(completions)} completions")
        log = _Log(num_rows=len(completions))
        calls = [
            _Call(name, function, inputs, SimpleNamespace(**trainer_state), log)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        returned = {call.name: call.run() for call in calls if not call.is_async}
        pending = [call for call in calls if call.is_async]
        if pending:
            self._loop = self._loop or _BackgroundLoop()
            results = self._loop.run(_gather(pending))
            returned.update(zip((call.name for call in pending), results, strict=True))
        by_function = {name: _as_rewards(name, returned[name], num_rows=len(completions)) for name in self.names}
        return Scores(
            total=[self._weighted_sum(row) for row in zip(*by_function.values(), strict=True)],
            by_function=by_function,
            extras=log.extras,
            metrics={name: sum(values) / len(values) for name, values in log.metrics.items()},
        )

    def _weighted_sum(self, row: Sequence[float | None]) -> float | None:
        terms = [weight * reward for weight, reward in zip(self.weights, row, strict=True) if reward is not None]
        return sum(terms) if terms else None


def check_column_names(columns: Iterable[str]) -> None:
    """ValueError where a data column has the name of an argument that every reward function gets anyway."""
    clashes = [name for name in columns if name in RESERVED_ARGUMENTS]
    if clashes:
        raise ValueError(f"data column {clashes[0]!r} has the name of a reward function's argument: rename the column")


class _Call:
    """One function together with the arguments of one `score`."""

    def __init__(
        self, name: str, function: Callable[..., Any], inputs: dict[str, Any], state: SimpleNamespace, log: "_Log"
    ):
        self.name = name
        self.function = function
        self.is_async = _is_async(function)
        self.prompts = inputs["prompts"]
        self.arguments = _accepted(
            name,
            function,
            {
                **inputs,
                "trainer_state": state,
                "log_extra": functools.partial(log.extra, name),
                "log_metric": log.metric,
            },
        )

    def run(self) -> Any:
        try:
            return self.function(**self.arguments)
        except Exception as error:  # a user's function may raise anything; whatever it is goes on as the cause
            raise self._failed(error) from error

    async def run_async(self) -> Any:
        try:
            return await self.function(**self.arguments)
        except Exception as error:  # as above
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RuntimeError:
        first_prompt = repr(self.prompts[0])
        first_prompt = first_prompt if len(first_prompt) <= 100 else first_prompt[:97] + "..."
        return RuntimeError(
            f"reward function {self.name!r} failed on rows 0 to {len(self.prompts) - 1} (first prompt: {first_prompt})"
            f": {type(error).__name__}: {error}"
        )


async def _gather(calls: Sequence[_Call]) -> list[Any]:
    # Exceptions are collected first: no task is left running, and which failure is reported does not hang on timing.
    results = await asyncio.gather(*(call.run_async() for call in calls), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class _BackgroundLoop:
    """An event loop on its own daemon thread; works where the caller's thread runs a loop already (a notebook)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # only has an effect where the wait was interrupted (Ctrl-C)


class _Log:
    """Collects what the functions of one `score` log."""

    def __init__(self, *, num_rows: int):
        self.num_rows = num_rows
        self.extras: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = defaultdict(list)

    def extra(self, function: str, column: str, values: Iterable[Any]) -> None:
        """Set a column of the completions table; the last call for a column counts."""
        values = list(values)
        if len(values) != self.num_rows:
            raise ValueError(
                f"log_extra({column!r}) in reward function {function!r} got {len(values)} values for "
                f"{self.num_rows} completions"
            )
        self.extras[column] = values

    def metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _accepted(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `function` takes: all of them with `**kwargs`, else those that it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables written in C tell nothing about themselves
        return arguments
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    missing = [parameter for parameter in required if parameter not in arguments]
    if missing:
        columns = [column for column in arguments if column not in RESERVED_ARGUMENTS]
        raise ValueError(
            f"reward function {name!r} asks for {missing[0]!r}, which is no column of the data "
            f"(columns: {', '.join(columns) or 'none'})"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    names = {p.name for p in parameters}
    return {key: value for key, value in arguments.items() if key in names}


def _as_rewards(name: str, returned: Any, *, num_rows: int) -> list[float | None]:
    if isinstance(returned, (str, bytes, Mapping)) or not isinstance(returned, Iterable):
        raise ValueError(
            f"reward function {name!r} returned {_short(returned)}: return a list with one number or None for each of "
            f"the {num_rows} completions"
        )
    rewards = list(returned)
    if len(rewards) != num_rows:
        raise ValueError(f"reward function {name!r} returned {len(rewards)} rewards for {num_rows} completions")
    return [_as_number(name, row, reward) for row, reward in enumerate(rewards)]


def _as_number(name: str, row: int, reward: Any) -> float | None:
    if reward is None:
        return None
    number = math.nan
    if not isinstance(reward, (str, bytes)):  # float("1") would pass, and hide a mistake
        try:
            number = float(reward)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a torch tensor of many elements
            pass
    if not math.isfinite(number):
        raise ValueError(
            f"reward function {name!r} returned {_short(reward)} for row {row}: return a finite number, or None where "
            "the function does not apply"
        )
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _distinct(names: Sequence[str]) -> list[str]:
    """Give a name's second holder the suffix _2, its third _3, and so on, past names that are taken."""
    distinct: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in distinct or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}_{number}"
        distinct.append(candidate)
    return distinct
