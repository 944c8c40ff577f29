"""Find a user's object by its name: `path/to/file.py:name` or `package.module:name`.

    load_reward("rewards/math.py:correct")          # a file, relative to the working directory, then to the run file
    load_reward("trl.rewards:think_format_reward")  # anything importable
    load_reward("last_integer")                     # what a package offers in the entry point group `rankup.rewards`
    load_reward("my/classifier")                    # a folder or hub id: a sequence classifier with one label
    load_reward(my_function)                        # a callable passes through
    load_reward("lengths.py:target", kwargs={"tokens": 100})    # what a factory returns

The folder of a `file.py` is searched for imports **while the file is being imported, and after everything else on
`sys.path`**: `import helper` at the top of the file finds `helper.py` beside it, but a neighbour called `json.py` can
never hide the real one, and `sys.path` is afterwards what it was. An import inside a function body, which runs later,
does not see the folder. For `package.module` the same holds for the working directory and the run file's folder.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

RewardSpec = str | Callable[..., Any]

ENTRY_POINTS = "rankup.rewards"
"""Entry point group in which packages offer rewards by a short name; the built-in ones are in it."""


def load_object(spec: str, *, base_dir: Path | None = None) -> object:
    """Return the object that `spec` names.

    `base_dir` (the run file's folder) is tried for relative paths after the working directory.

    Raises ValueError (malformed spec, no such module, no such name, or an error inside the user's file, which is kept
    as `__cause__`) and FileNotFoundError (no such file).
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"cannot read {spec!r}: write it as path/to/file.py:name or package.module:name")
    if place.endswith(".py"):
        module = _import_file(find_file(place, base_dir=base_dir))
    elif "/" in place:
        raise ValueError(f"cannot read {spec!r}: a path must end in .py, as in {place}.py:{name}")
    else:
        module = _import_module(place, folders=[Path.cwd(), *([base_dir] if base_dir else [])])
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{place} has no {name!r}{_names_to_offer(module, name)}") from None


def load_reward(
    spec: RewardSpec, *, base_dir: Path | None = None, kwargs: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Return the reward function that `spec` names, or `spec` itself where it is a callable already.

    With `kwargs` (an empty mapping counts) it is a factory, a function or a class, and what it returns for them is the reward
    function.

    Raises what `load_object` raises, and ValueError where the object cannot serve as a reward function.
    """
    found = _find(spec, base_dir=base_dir) if isinstance(spec, str) else spec
    function = found if kwargs is None else _made_by(spec, found, kwargs)
    if inspect.isclass(function):
        raise ValueError(f"reward {spec!r} is a class: name an instance of it or a function, or give its kwargs")
    if not callable(function):
        raise ValueError(f"reward {spec!r} is not callable: it is a {type(function).__name__}")
    return function


def _find(spec: str, *, base_dir: Path | None) -> object:
    if ":" in spec or spec.endswith(".py"):
        return load_object(spec, base_dir=base_dir)
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if spec in offered:
        return offered[spec].load()
    if "/" in spec or Path(spec).is_dir():
        from .classifier import SequenceClassifier

        return SequenceClassifier(spec)
    near = difflib.get_close_matches(spec, offered, n=3)
    offer = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(offered))}"
    raise ValueError(
        f"no reward is called {spec!r}: {offer} (your own is path/to/file.py:name or package.module:name, a sequence "
        "classifier a folder or hub id)"
    )


def _made_by(spec: RewardSpec, factory: object, kwargs: Mapping[str, Any]) -> object:
    if not callable(factory):
        raise ValueError(f"reward {spec!r} takes no kwargs: it is a {type(factory).__name__}")
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        given = ", ".join(kwargs) or "none"
        raise ValueError(f"reward {spec!r} cannot be made with its kwargs ({given}): {error}") from error
    return factory(**kwargs)


def reward_name(function: Callable[..., Any]) -> str:
    """The name under which a function is reported: `__name__`, looked up through partials, else its class's name."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def find_file(path: str | Path, *, base_dir: Path | None = None) -> Path:
    """Resolve `path` against the working directory, then against `base_dir`; FileNotFoundError where neither has it."""
    candidates = [Path(path).expanduser()]
    if base_dir is not None:
        candidates.append(base_dir / candidates[0])
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    places = " and ".join(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
    raise FileNotFoundError(f"no file {path} (looked for {places})")


def _import_file(path: Path) -> ModuleType:
    # The name carries path and content: two files called reward.py stay apart, an unchanged file is imported once, and
    # an edited one (a notebook that trains twice) is imported anew.
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    name = f"rankup_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look the module up by name
    try:
        with _search_last(path.parent):
            spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything; whatever it is goes on as the cause
        del sys.modules[name]
        raise ValueError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str, *, folders: list[Path]) -> ModuleType:
    try:
        with _search_last(*folders):
            return importlib.import_module(name)
    except Exception as error:  # as above
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(missing + ".")):
            raise ValueError(f"no module {name!r}: {error}") from error
        raise ValueError(f"module {name!r} could not be imported: {type(error).__name__}: {error}") from error


@contextmanager
def _search_last(*folders: Path) -> Iterator[None]:
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path.extend(added)
    importlib.invalidate_caches()  # the files may be younger than the folder listing that Python remembers
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:  # the imported code may have tidied up itself
                sys.path.remove(folder)


def _names_to_offer(module: ModuleType, name: str) -> str:
    public = sorted(key for key in dir(module) if not key.startswith("_") and callable(getattr(module, key, None)))
    near = difflib.get_close_matches(name, public, n=3)
    if near:
        return f": did you mean {' or '.join(near)}?"
    own = [key for key in public if getattr(getattr(module, key), "__module__", None) == module.__name__]
    return f": it has {', '.join((own or public)[:8])}" if public else ": it defines no functions"
