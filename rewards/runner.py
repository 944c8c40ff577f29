"""Call reward functions by TRL's contract (`contract.py`) and combine their results.

    config = RewardsConfig(weights=[1.0, 0.5], isolation="process", num_workers=2, timeout=10)
    scorer = Scorer(config, functions=["last_integer", "my.py:length"])
    inputs = Inputs(prompts=["?"] * 2, completions=["It is 42", "42?"], completion_ids=[[1]] * 2, columns={"answer": [42, 41]})
    pending = scorer.submit(inputs)
    scores = pending.result()
    scores.total        # [5.0, 1.5]
    scorer.close()      # ends the processes and the event loop

Async functions (also partials of them, and objects with an async `__call__`) run on one event loop that lives until
`close`, so a client can keep its connections between calls. Other functions run on the caller's thread, or in processes on this
machine or in a Ray cluster. Processes and the event loop score while the caller samples further completions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from .combining import Pending, Scores
from .config import Isolation, RewardFunction, RewardsConfig, weights_of
from .contract import (
    ENVIRONMENTS,
    RESERVED_ARGUMENTS,
    CallResult,
    Failure,
    Function,
    Inputs,
    accepted,
    call,
    call_async,
    check_column_names,
    failure_of,
    is_async,
    is_interruption,
    names_environments,
    row_check_of,
)
from .loading import RewardSpec, load_reward, reward_name
from .own_code import code_of
from .pool import BackgroundLoop, Pool, attempts
from .portable import Portable, portable_of
from .processes import WorkerPool
from .ray_pool import RayPool
from .texts import describe

POOLS = {"process": WorkerPool, "ray": RayPool}
"""The pools for functions that are not inline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reward:
    """A function, its reported name, and where it runs. `portable` is what a pool loads."""

    name: str
    function: Function
    isolation: Isolation | Literal["async"]
    portable: Portable | None


class Scorer:
    """Loads reward functions once, and scores completions with them.

    Args:
        config: which functions, their weights, where they run and the action on a failure.
        functions: one or several user-supplied functions instead of `config.functions`: callables, specs as `load_reward` takes
            them, or `RewardFunction`s. A callable's attribute `isolation` replaces `config.isolation`; `config.timeout` does
            not apply to an async one whose attribute `has_own_timeout` is true.

        needs_functions: whether a run needs any. Not if an environment gives the rewards.

    `names` holds one distinct name per function, `code` the hashes of those in a user's own files (`own_code.py`). Raises
    ValueError without functions, with a wrong number of weights, or for a function that names `environments` and does not run
    inline, and the errors of `load_reward`.
    """

    def __init__(
        self,
        config: RewardsConfig,
        functions: RewardSpec | RewardFunction | Iterable[RewardSpec | RewardFunction] | None = None,
        *,
        needs_functions: bool = True,
    ) -> None:
        if functions is None:
            functions = config.entries()
        if isinstance(functions, str | RewardFunction) or callable(functions) or not isinstance(functions, Iterable):
            functions = [functions]
        entries = [_with_options(function) for function in functions]
        if not entries and needs_functions:
            raise ValueError("no reward functions: specify at least one, or an environment with get_reward")
        self.config = config
        self.weights = weights_of(config.weights, [options for _, options in entries])
        self._rewards = _load(entries, config.isolation)
        self.code = {path: digest for spec, _ in entries for path, digest in code_of(spec).items()}
        self.names = [reward.name for reward in self._rewards]
        self._loop: BackgroundLoop | None = None
        self._pools: dict[str, Pool] = {}

    def check_columns(self, columns: Iterable[str], *, has_environments: bool = False) -> None:
        """Raise the error that `submit` would raise for these columns of the data set (without the prompt's), and with or
        without environments."""
        columns = list(columns)
        check_column_names(columns)
        arguments = [name for name in RESERVED_ARGUMENTS if has_environments or name != ENVIRONMENTS]
        for reward in self._rewards:
            accepted(reward.name, reward.function, dict.fromkeys([*arguments, *columns]))

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Raise ValueError if a function cannot use a row with these columns, or if a process cannot get them.

        Functions say so by their attribute `check_row` (`contract.with_check`).
        """
        for reward in self._rewards:
            row_check = row_check_of(reward.function)
            if row_check is None:
                continue
            try:
                row_check(**accepted(reward.name, row_check, dict(columns)))
            except BaseException as error:  # a user's function may raise anything
                if is_interruption(error):
                    raise
                reason = str(error) if isinstance(error, ValueError) else describe(error)
                raise ValueError(f"reward function {reward.name!r} cannot use it: {reason}") from error
        if any(reward.portable for reward in self._rewards):
            _check_pickles(columns)

    def start(self) -> None:
        """Start the processes now, so that they load in the background; otherwise the first `submit` starts them.

        Raises ConnectionError if functions run in a Ray cluster and none answers.
        """
        for isolation, pool in POOLS.items():
            functions = {r.name: r.portable for r in self._rewards if r.portable and r.isolation == isolation}
            if functions and isolation not in self._pools:
                self._pools[isolation] = pool(functions, self.config)

    def submit(self, inputs: Inputs) -> Pending:
        """Start scoring n completions; inline functions have finished when this returns.

        Raises ValueError if a function requires an argument that does not exist. Every other failure of a function is raised
        by `Pending.result`.
        """
        self.check_columns(inputs.columns, has_environments=inputs.environments is not None)
        self.start()
        pieces = [inputs] if self.config.rows_per_call is None else inputs.split(self.config.rows_per_call)
        pickled = [pickle.dumps(one.without_environments()) for one in pieces] if self._pools else [b""] * len(pieces)
        # Inline functions last: they run here while the others run elsewhere.
        order = sorted(self._rewards, key=lambda reward: reward.isolation == "inline")
        futures = {
            reward.name: [self._start_call(reward, *piece) for piece in zip(pieces, pickled, strict=True)] for reward in order
        }
        return Pending(
            calls={name: list(zip(pieces, futures[name], strict=True)) for name in self.names},
            weights=dict(zip(self.names, self.weights, strict=True)),
            on_error=self.config.on_error,
        )

    def score(self, inputs: Inputs) -> Scores:
        """Score n completions and wait for the scores."""
        return self.submit(inputs).result()

    def close(self) -> None:
        """End the processes and the event loop, and cancel unfinished calls. The next `submit` starts new ones."""
        while self._pools:
            self._pools.popitem()[1].close()
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _start_call(self, reward: _Reward, inputs: Inputs, pickled: bytes) -> Future[CallResult]:
        if reward.isolation == "async":
            self._loop = self._loop or BackgroundLoop()
            timeout = None if getattr(reward.function, "has_own_timeout", False) else self.config.timeout
            call_once = functools.partial(_call_async, reward, inputs.without_environments(), timeout)
            return self._loop.run(attempts(call_once, self.config.retries))
        if reward.portable is not None:
            return self._pools[reward.isolation].submit(reward.name, pickled)
        done: Future[CallResult] = Future()
        process = os.getpid()
        try:
            done.set_result(call(reward.name, reward.function, inputs))
        except BaseException as error:  # a user's function may raise anything; it becomes the cause of what `result` raises
            if is_interruption(error) or os.getpid() != process:  # a fork of the function's must end
                raise
            done.set_result(dataclasses.replace(failure_of(error, num_rows=len(inputs)), cause=error))
        return done


def _check_pickles(columns: Mapping[str, Any]) -> None:
    for name, value in columns.items():
        try:
            pickle.dumps(value)
        except Exception as error:  # objects may raise anything
            raise ValueError(
                f"column {name!r} cannot be sent to the processes of reward functions: {describe(error)}; write the value as "
                "text or numbers, or set rewards.isolation=inline"
            ) from error


async def _call_async(reward: _Reward, inputs: Inputs, timeout: float | None) -> CallResult:
    """Call an async function; its exceptions become a Failure."""
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await call_async(reward.name, reward.function, inputs)
    except BaseException as error:  # a user's function may raise anything, sys.exit() too; it becomes the cause
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # cancelled from outside: no caller waits for the result any more
            raise
        timed_out = Failure(reason=f"no answer in {timeout:g} s: it was cancelled") if limit.expired() else None
        failure = timed_out or failure_of(error, num_rows=len(inputs))
        return dataclasses.replace(failure, cause=error)


# ---------------------------------------------------------------------------------------------------------- loading


def _with_options(entry: RewardSpec | RewardFunction) -> tuple[RewardSpec, RewardFunction]:
    """A function's spec and its options."""
    if isinstance(entry, RewardFunction):
        return entry.function, entry
    return entry, RewardFunction(function=entry if isinstance(entry, str) else reward_name(entry))


def _load(entries: Sequence[tuple[RewardSpec, RewardFunction]], isolation: Isolation) -> list[_Reward]:
    functions = [load_reward(spec, kwargs=options.kwargs) for spec, options in entries]
    names = _distinct([e.name or reward_name(f) for (_, e), f in zip(entries, functions, strict=True)])
    rewards: list[_Reward] = []
    for (spec, options), name, function in zip(entries, names, functions, strict=True):
        where = "async" if is_async(function) else options.isolation or getattr(function, "isolation", None) or isolation
        if where not in (*POOLS, "inline", "async"):
            raise ValueError(f"reward function {name!r}: isolation must be inline, process or ray (got {where!r})")
        if where != "inline" and names_environments(function):
            raise ValueError(
                f"reward function {name!r} requires `{ENVIRONMENTS}`, and instances cannot leave the trainer's process, nor "
                "wait for an async function: make it a `def` function with `isolation: inline`"
            )
        portable = None
        if where in POOLS:
            portable = portable_of(name, spec, kwargs=options.kwargs, other_machines=where == "ray")
        rewards.append(_Reward(name=name, function=function, isolation=where, portable=portable))
    return rewards


def _distinct(names: Sequence[str]) -> list[str]:
    """Make names distinct: the second of one name gets the suffix _2, the third _3 and so on, skipping names that exist."""
    distinct: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in distinct or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}_{number}"
        distinct.append(candidate)
    return distinct
