"""TRL's contract for one reward function: its arguments and its return values.

    def correct(completions, answer):
        return [None if expected is None else float(text == expected) for text, expected in zip(completions, answer)]

    columns = {"answer": ["yes", None]}
    inputs = Inputs(prompts=["?"] * 2, completions=["yes"] * 2, completion_ids=[[1]] * 2, columns=columns)
    returned = call("correct", correct, inputs)
    returned.rewards        # [1.0, None]

A reward function is any callable. It is called with keyword arguments only: `prompts`, `completions`, `completion_ids`, every
other column of the data, `trainer_state`, `log_extra` and `log_metric`; without `**kwargs` it gets only those that it names. A
function that names `completion_prefixes` gets what the prompt has written of each completion, and one that names
`sampled_lengths` how many tokens of each were sampled and not given by a tool or an environment. In a run with environments an
inline function also gets `environments`, the instance in which each completion acted. It returns one number for each
completion, or `None` where it does not apply to the row. Lists and mappings among the arguments are copies: it may change them.
The same code runs in the trainer's process and in reward processes (`worker.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import pickle
import signal
import statistics
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from .logged import logged_name, plain
from .texts import Function, describe, shorten

ONLY_BY_NAME = ("completion_prefixes", "sampled_lengths")
"""Arguments that TRL does not have: a function gets them only if it names them."""

ENVIRONMENTS = "environments"
"""The argument with the instances, which cannot leave the trainer's process."""

RESERVED_ARGUMENTS = (
    *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", ENVIRONMENTS),
    *ONLY_BY_NAME,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """n completions with everything that a reward function may look at.

    Attributes:
        prompts, completions: n strings, or n conversations (lists of messages); completions of one prompt are adjacent.
        completion_ids: n unpadded lists of token ids.
        columns: the data set's other columns, n values each.
        trainer_state: functions get it as an object with attributes (`trainer_state.global_step`), as in TRL. `log_history` may
            be a `History`.
        completion_prefixes: n texts: what the prompt has written of the completion, from a tag on, such as "<think>\\n" at the
            end of a chat template; None: nothing.
        sampled_lengths: n numbers: how many of the tokens were sampled; None: all.
        environments: n instances, in which the completions acted; None: there are none, or the function is not inline.

    Raises ValueError if lengths differ, or if a column has the name of an argument.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    trainer_state: Mapping[str, Any] = field(default_factory=dict)
    completion_prefixes: Sequence[str] | None = None
    sampled_lengths: Sequence[int] | None = None
    environments: Sequence[object] | None = None

    def __post_init__(self) -> None:
        check_column_names(self.columns)
        for name, values in self.rows().items():
            if len(values) != len(self.completions):
                raise ValueError(f"{name} has {len(values)} values for {len(self.completions)} completions")

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self) -> dict[str, Sequence[Any]]:
        """The arguments that have one value for each completion, by name."""
        lengths = self.sampled_lengths
        return {
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
            "completion_prefixes": [""] * len(self) if self.completion_prefixes is None else self.completion_prefixes,
            "sampled_lengths": list(map(len, self.completion_ids)) if lengths is None else lengths,
            **self.columns,
            **({} if self.environments is None else {ENVIRONMENTS: self.environments}),
        }

    def without_environments(self) -> Inputs:
        """The same for functions that are not inline."""
        return self if self.environments is None else dataclasses.replace(self, environments=None)

    def split(self, size: int) -> list[Inputs]:
        """The same rows in consecutive parts of at most `size`."""
        return [
            Inputs(
                prompts=self.prompts[start : start + size],
                completions=self.completions[start : start + size],
                completion_ids=self.completion_ids[start : start + size],
                columns={name: values[start : start + size] for name, values in self.columns.items()},
                trainer_state=self.trainer_state,
                completion_prefixes=self.completion_prefixes and self.completion_prefixes[start : start + size],
                sampled_lengths=self.sampled_lengths and self.sampled_lengths[start : start + size],
                environments=self.environments and self.environments[start : start + size],
            )
            for start in range(0, len(self), size)
        ]


class History:
    """The rows that a run has logged: pickled once, not for each call of a step, and read where they are asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], pickled: bytes = b"") -> None:
        self._rows = rows
        self._pickled = pickled

    def copied(self) -> list[dict[str, Any]]:
        """The rows, which the caller may change."""
        return pickle.loads(self._pickled) if self._pickled else [dict(row) for row in self._rows]

    def __reduce__(self) -> tuple[Any, ...]:
        self._pickled = self._pickled or pickle.dumps([dict(row) for row in self._rows])
        return History, ((), self._pickled)


class _TrainerState(SimpleNamespace):
    """The `trainer_state` of a call. Its `log_history` is copied when it is asked for: it may have a thousand rows."""

    def __getattr__(self, name: str) -> Any:
        if name != "log_history" or "_history" not in vars(self):
            raise AttributeError(f"trainer_state has no {name!r}: it has {', '.join(vars(self))}", name=name, obj=self)
        self.log_history = self._history.copied()
        return self.log_history


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """The result of one call: n rewards, columns for the completions table (n values each), and logged metrics."""

    rewards: list[float | None] = field(default_factory=list)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a call has no result: `reason` in one line, and in `details` the user's traceback if there is one."""

    reason: str
    details: str = ""
    is_bad_value: bool = False
    """The function returned something other than a list of rewards."""
    cause: BaseException | None = None
    """The exception, if it was raised in this process."""


CallResult = Returned | Failure


class Interruption(SystemExit):
    """A signal asks this process to end: not a failure of the function that it interrupts, unlike any other SystemExit."""


class RewardError(RuntimeError):
    """A reward function failed; the message names the function and the rows, and ends with its traceback."""


def call(name: str, function: Function, inputs: Inputs) -> Returned:
    """Call a function that is not async. Raises what it raises, and ValueError if it does not return a list of rewards."""
    returned = Returned()
    rewards = function(**_arguments(name, function, inputs, returned))
    return dataclasses.replace(returned, rewards=_as_rewards(name, rewards, num_rows=len(inputs)))


async def call_async(name: str, function: Function, inputs: Inputs) -> Returned:
    """Call an async function."""
    returned = Returned()
    rewards = await function(**_arguments(name, function, inputs, returned))
    return dataclasses.replace(returned, rewards=_as_rewards(name, rewards, num_rows=len(inputs)))


class BadValueError(ValueError):
    """A function returned something other than a list of rewards. `is_not_finite`: but a list with NaN or infinity."""

    is_not_finite = False


MESSAGES_HINT = '; completions are messages here: use `completion[-1]["content"]`'
SINGLE_HINT = (
    " (this call has a single completion, which has no spread: an evaluation samples one for each prompt unless "
    "data.eval_samples is set, and rewards.rows_per_call may be 1)"
)


def is_interruption(error: BaseException) -> bool:
    """Whether a signal to this process raised the error. A function may raise KeyboardInterrupt and SystemExit itself."""
    if not isinstance(error, KeyboardInterrupt):
        return isinstance(error, Interruption)
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # it leaves no frame in the traceback: Ctrl-C comes first
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    code = getattr(getattr(handler, "__func__", handler), "__code__", None)
    return bool(frames) and frames[-1].f_code is code


def failure_of(error: BaseException, *, num_rows: int = 0) -> Failure:
    """The failure of a call with `num_rows` rows that raised `error`; the traceback shows only frames of the user's code."""
    single_hint = SINGLE_HINT if num_rows == 1 else ""
    if isinstance(error, BadValueError):
        return Failure(reason=str(error) + (single_hint if error.is_not_finite else ""), is_bad_value=True)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in _RANKUP_FILES]
    details = "".join(traceback.format_list(frames)) + "".join(traceback.format_exception_only(error))
    hint = MESSAGES_HINT if isinstance(error, AttributeError) and _is_conversation(error.obj) else ""
    hint += single_hint if isinstance(error, statistics.StatisticsError | ZeroDivisionError) else ""
    return Failure(reason=describe(error) + hint, details=f"Traceback (most recent call last):\n{details}")


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[-1], Mapping) and "content" in value[-1]


_RANKUP_FILES = {
    __file__.replace("contract.py", f"{name}.py") for name in ("contract", "own_files", "portable", "runner", "worker")
}


def _arguments(name: str, function: Function, inputs: Inputs, returned: Returned) -> dict[str, Any]:
    """The keyword arguments of a call. What the function logs is added to `returned`."""

    def log_extra(column: str, values: Iterable[Any]) -> None:
        """Set a column of the completions table; a later call for the same column replaces it."""
        where = f"log_extra({column!r}) in reward function {name!r}"
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise ValueError(f"{where}: give a list with one value for each of the {len(inputs)} completions")
        values = [plain(value) for value in values]
        if len(values) != len(inputs):
            raise ValueError(f"{where} got {len(values)} values for {len(inputs)} completions")
        returned.extras[str(column)] = values

    def log_metric(metric: str, value: float) -> None:
        """Log a number; if a name is logged several times, the mean is recorded."""
        returned.metrics.setdefault(logged_name(name, str(metric)), []).append(float(value))

    rows = inputs.rows()
    available = {**rows, "trainer_state": inputs.trainer_state, "log_extra": log_extra, "log_metric": log_metric}
    arguments = accepted(name, function, available)
    if "trainer_state" in arguments:
        state = dict(inputs.trainer_state)
        if isinstance(state.get("log_history"), History):
            state["_history"] = state.pop("log_history")
        arguments["trainer_state"] = _TrainerState(**copied(state))
    return {key: copied(value) if key in rows else value for key, value in arguments.items()}


_SCALARS = frozenset((str, int, float, bool, type(None)))


def copied(value: Any) -> Any:
    """The value with copies of its lists and mappings at every depth: no call may change what others see."""
    kind = type(value)
    if kind is tuple:
        return tuple(item if type(item) in _SCALARS else copied(item) for item in value)
    if kind is list:
        return [item if type(item) in _SCALARS else copied(item) for item in value]
    if kind is dict:
        return {key: item if type(item) in _SCALARS else copied(item) for key, item in value.items()}
    return set(value) if kind is set else value


def accepted(name: str, function: Function, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `function` takes: all of TRL's if it has `**kwargs`, and those that it names.

    Raises ValueError if it requires one that does not exist.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables written in C have no signature
        return {key: value for key, value in arguments.items() if key not in ONLY_BY_NAME}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    missing = [parameter for parameter in required if parameter not in arguments]
    if ENVIRONMENTS in missing:
        raise ValueError(f"reward function {name!r} requires `{ENVIRONMENTS}`: only a run with rollout.environment has "
            "them, and not if its server admits fewer sessions than a step has episodes")
    if missing:
        columns = [column for column in arguments if column not in RESERVED_ARGUMENTS]
        raise ValueError(
            f"reward function {name!r} requires {missing[0]!r}, which is not a column of the data "
            f"(columns: {', '.join(columns) or 'none'})"
        )
    names = {p.name for p in parameters}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {key: value for key, value in arguments.items() if key in names or (takes_all and key not in ONLY_BY_NAME)}


def names_environments(function: Function) -> bool:
    """Whether a function has an argument `environments`."""
    try:
        return ENVIRONMENTS in inspect.signature(function).parameters
    except ValueError:  # some callables written in C have no signature
        return False


def check_column_names(columns: Iterable[str]) -> None:
    """Raise ValueError if a data column has the name of an argument that every reward function gets."""
    clashes = [name for name in columns if name in RESERVED_ARGUMENTS]
    if clashes:
        raise ValueError(f"data column {clashes[0]!r} has the name of a reward function's argument: rename the column")


def with_check(check_row: Callable[..., None]) -> Callable[[Function], Function]:
    """A decorator: before a run starts, `check_row` is called with the columns of each row, one value each, by keyword.

    It raises ValueError with the reason if the function cannot use the row. Like a reward function it gets only the columns
    that it names, unless it has `**columns`.
    """

    def decorate(function: Function) -> Function:
        function.check_row = check_row  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return decorate


def row_check_of(function: Function) -> Callable[..., None] | None:
    """The `check_row` of a function, through partials; None if it has none."""
    while isinstance(function, functools.partial) and not hasattr(function, "check_row"):
        function = function.func
    return getattr(function, "check_row", None)


def is_async(function: Function) -> bool:
    """Whether calling it returns an awaitable; looks through partials and at an object's `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _as_rewards(name: str, returned: Any, *, num_rows: int) -> list[float | None]:
    if callable(returned):
        raise BadValueError(
            f"reward function {name!r} returned a function: it is a factory, so give it `kwargs` "
            f"(in a run file, {{function: ..., kwargs: {{}}}})"
        )
    if isinstance(returned, (str, bytes, Mapping)) or not isinstance(returned, Iterable):
        raise BadValueError(
            f"reward function {name!r} returned {_shown(returned)}: return a list with one number or None for each of "
            f"the {num_rows} completions"
        )
    rewards = list(returned)
    if len(rewards) != num_rows:
        raise BadValueError(f"reward function {name!r} returned {len(rewards)} rewards for {num_rows} completions")
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
        error = BadValueError(
            f"reward function {name!r} returned {_shown(reward)} for row {row}: return a finite number, or None where "
            "the function does not apply"
        )
        error.is_not_finite = not isinstance(reward, (str, bytes))
        raise error
    return number


def _shown(value: Any) -> str:
    return f"{shorten(repr(value), 60)} ({type(value).__name__})"
