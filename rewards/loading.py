"""Load a user's object by its spec: `path/to/file.py:name` or `package.module:name`.

    load_reward("rewards/math.py:correct")          # a file, relative to the working directory
    load_reward("trl.rewards:think_format_reward")  # anything importable
    load_reward("last_integer")                     # a name in the entry point group `rankup.rewards`
    load_reward("my/classifier")                    # a folder or Hub id: a sequence classifier with one label
    load_reward(my_function)                        # a callable is returned unchanged
    load_reward("lengths.py:target", kwargs={"tokens": 100})    # the function that a factory returns

A `file.py` finds the files next to it wherever it imports them, also inside functions, and those of another folder never
(`own_files.py`). A `package.module` that Python does not find is looked up in the working directory, in the same way.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from os.path import expanduser
from pathlib import Path
from types import ModuleType
from typing import Any

from .contract import Interruption
from .own_files import folder_of, has_module, import_file, import_from
from .texts import Function, describe, did_you_mean

RewardSpec = str | Function

ENTRY_POINTS = "rankup.rewards"
"""Entry point group in which packages, rankup included, register rewards under a short name."""


def load_object(spec: str, *, folder: Path | None = None) -> object:
    """Return the object that `spec` names.

    folder: where files, and modules that Python does not find, are looked up. None: the working directory.

    Raises ValueError (malformed spec, no such module, no such name, or an error inside the user's file, which is the
    `__cause__`) and FileNotFoundError (no such file).
    """
    location, _, name = spec.rpartition(":")
    if not location or not name.isidentifier():
        raise ValueError(f"cannot read {spec!r}: write it as path/to/file.py:name or package.module:name")
    if location.endswith(".py"):
        module = _import_file(find_file(location if folder is None else folder / location))
    elif "/" in location:
        raise ValueError(f"cannot read {spec!r}: a path must end in .py, as in {location}.py:{name}")
    else:
        module = _import_module(location, folder or Path.cwd())
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{location} has no {name!r}: {_suggestion(module, name)}") from None


def spec_of(function: Function) -> str | None:
    """The spec by which `load_object` finds this function, files relative to the working directory if they are inside of it.

    None if there is none: for lambdas, functions inside of others, methods, objects, and what a script or notebook defines.
    """
    name, module = getattr(function, "__qualname__", ""), sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None or module.__name__ == "__main__" or not name.isidentifier():
        return None
    if getattr(module, name, None) is not function:  # replaced, or never stored under its name
        return None
    folder, _, name_in_folder = folder_of(module), *module.__name__.partition(".")[1:]
    if folder is None:
        return f"{module.__name__}:{name}"
    if "." in name_in_folder and folder == Path.cwd():
        return f"{name_in_folder}:{name}"
    assert module.__file__ is not None, module
    path = Path(module.__file__)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{name}"


def load_reward(spec: RewardSpec, *, kwargs: Mapping[str, Any] | None = None, folder: Path | None = None) -> Function:
    """Return the reward function that `spec` names, or `spec` itself if it is a callable.

    With `kwargs` (even an empty mapping) `spec` is a factory, a function or a class, and what it returns for them is the reward
    function. `folder`: as for `load_object`.

    Raises what `load_object` raises, and ValueError if the object is not a reward function.
    """
    found = _find(spec, folder) if isinstance(spec, str) else spec
    function = found if kwargs is None else _call_factory(spec, found, kwargs)
    if inspect.isclass(function):
        raise ValueError(f"reward {spec!r} is a class: name an instance of it or a function, or give its kwargs")
    if not callable(function):
        raise ValueError(f"reward {spec!r} is not callable: it is a {type(function).__name__}")
    return function


def _find(spec: str, folder: Path | None) -> object:
    if ":" in spec or spec.endswith(".py"):
        return load_object(spec, folder=folder)
    registered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if spec in registered:
        return registered[spec].load()
    if "/" in spec or os.path.isdir(spec):
        from .classifier import SequenceClassifier

        return SequenceClassifier(spec)
    suggestion = did_you_mean(spec, registered) or f"there are {', '.join(sorted(registered))}"
    raise ValueError(
        f"no reward is called {spec!r}: {suggestion} (write your own as path/to/file.py:name or package.module:name, and a "
        "sequence classifier as a folder or Hub id)"
    )


def _call_factory(spec: RewardSpec, factory: object, kwargs: Mapping[str, Any]) -> object:
    if not callable(factory):
        raise ValueError(f"reward {spec!r} does not accept kwargs: it is a {type(factory).__name__}, not a factory")
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        names = ", ".join(kwargs) or "none"
        raise ValueError(f"reward {spec!r} does not accept its kwargs ({names}): {error}") from error
    try:
        return factory(**kwargs)
    except Interruption:
        raise
    except SystemExit as error:
        raise ValueError(f"reward {spec!r} cannot be made from its kwargs: {describe(error)}") from error


def reward_name(function: Function) -> str:
    """A function's name in metrics and messages: its `__name__`, also inside partials, else the name of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def find_file(path: str | Path) -> Path:
    """The absolute path of a file, relative to the working directory. Raises FileNotFoundError if there is none.

    Names in a run file are looked up beside it too, once, when it is loaded (`grpo/config/paths.py`).
    """
    found = Path(expanduser(path)).resolve()
    if os.path.isfile(found):
        return found
    raise FileNotFoundError(f"no file {path} (looked for {found}; names in a run file are also looked up beside it)")


def _import_file(path: Path) -> ModuleType:
    try:
        return import_file(path)
    except (KeyboardInterrupt, Interruption):  # a signal, not the file
        raise
    except BaseException as error:  # a user's file may raise anything, and call sys.exit()
        raise ValueError(f"{path} could not be imported: {describe(error)}") from error


def _import_module(name: str, folder: Path) -> ModuleType:
    top = name.partition(".")[0]
    try:
        importlib.invalidate_caches()  # the files may be newer than Python's cached folder listing
        if top not in sys.modules and importlib.util.find_spec(top) is None and has_module(folder, name):
            return import_from(folder, name)
        return importlib.import_module(name)
    except (KeyboardInterrupt, Interruption):  # a signal, not the file
        raise
    except BaseException as error:  # a user's module may raise anything, and call sys.exit()
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(missing + ".")):
            raise ValueError(f"no module {name!r}: {error}") from error
        raise ValueError(f"module {name!r} could not be imported: {describe(error)}") from error


def _suggestion(module: ModuleType, name: str) -> str:
    """The names in a module that come closest to `name`, else the callables that it defines."""
    public = sorted(key for key in dir(module) if not key.startswith("_") and callable(getattr(module, key, None)))
    local = [key for key in public if getattr(getattr(module, key), "__module__", None) == module.__name__]
    names = ", ".join((local or public)[:8])
    return did_you_mean(name, public) or (f"it has {names}" if names else "it defines no functions")
