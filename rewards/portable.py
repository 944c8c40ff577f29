"""A reward function in a form that another process, or another machine, can load.

    portable = portable_of("style", "my.py:style", for_machines=True)
    pickle.loads(pickle.dumps(portable)).load()     # the function, where there is no my.py

A process of this machine finds a function by the name that the user gave, and gets one without a name by cloudpickle. Another
machine has what is installed, and nothing else of the user's: a function from a file travels with the code that it uses.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from .contract import Function
from .loading import RewardSpec, find_file, load_object, load_reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Portable:
    """A reward function in a form that another process can load.

    Attributes:
        name: under which it is reported.
        spec: where it is found; None where it is `pickled` (by cloudpickle).
        kwargs: what it is made with where it is a factory.
        file, digest: of a spec that names a file, its path and the hash of its content when the run began.
    """

    name: str
    spec: str | None = None
    kwargs: Mapping[str, Any] | None = None
    base_dir: Path | None = None
    file: Path | None = None
    digest: str = ""
    pickled: bytes = b""

    def load(self) -> Function:
        """The function. Raises what `load_reward` or unpickling raises, and ValueError where the file has changed."""
        if self.file is not None and _digest_of(self.file) != self.digest:
            raise ValueError(f"{self.file} has changed since the run began: all calls must be of the same function")
        found = pickle.loads(self.pickled) if self.spec is None else self.spec
        return load_reward(found, base_dir=self.base_dir, kwargs=self.kwargs)


def portable_of(
    name: str,
    spec: RewardSpec,
    *,
    kwargs: Mapping[str, Any] | None = None,
    base_dir: Path | None = None,
    for_machines: bool = False,
) -> Portable:
    """What another process needs for the function that `load_reward(spec, kwargs=kwargs)` gives.

    `for_machines`: other machines need it too. Raises ValueError where it cannot be sent.
    """
    if not isinstance(spec, str):
        return Portable(name=name, kwargs=kwargs, pickled=_pickled(name, spec, for_machines=for_machines))
    place = spec.rpartition(":")[0]
    if for_machines and place:
        found = load_object(spec, base_dir=base_dir)  # of a factory itself: what it makes may hold what cannot be sent
        return Portable(name=name, kwargs=kwargs, pickled=_pickled(name, found, for_machines=True))
    if place.endswith(".py"):
        file = find_file(place, base_dir=base_dir)
        spec = f"{file}:{spec.rpartition(':')[2]}"
        return Portable(name=name, spec=spec, kwargs=kwargs, base_dir=base_dir, file=file, digest=_digest_of(file))
    return Portable(name=name, spec=spec, kwargs=kwargs, base_dir=base_dir)


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _pickled(name: str, found: object, *, for_machines: bool) -> bytes:
    import cloudpickle

    try:
        with _sent_along(_installed_folders() if for_machines else sys.path):
            return cloudpickle.dumps(found)
    except (pickle.PicklingError, TypeError) as error:
        where, instead = ("a process", "name it as file.py:name, or")
        if for_machines:
            where, instead = "other machines", "install its module on every node, let it run in a process, or"
        raise ValueError(f"reward function {name!r} cannot be sent to {where}: {error}; {instead} let it run inline") from error


@contextmanager
def _sent_along(folders: Sequence[str]) -> Iterator[None]:
    """Inside the block cloudpickle sends the code of loaded modules that would not be found in `folders`, not their names."""
    import cloudpickle

    is_found = functools.cache(functools.partial(_is_found, folders=folders))
    modules = [module for name, module in list(sys.modules.items()) if _has_code(name, module)]
    own = [module for module in modules if not is_found(module.__name__.partition(".")[0])]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _has_code(name: str, module: object) -> bool:
    is_named = isinstance(module, ModuleType) and module.__name__ == name != "__main__"  # of __main__ it always sends the code
    return is_named and getattr(module, "__file__", None) is not None


def _is_found(package: str, *, folders: Sequence[str]) -> bool:
    """Whether a new process would find it: `importlib.util.find_spec` is content with what is loaded here."""
    others = (finder for finder in sys.meta_path if finder is not PathFinder)  # built in, or installed in editable form
    return PathFinder.find_spec(package, folders) is not None or any(f.find_spec(package, None) is not None for f in others)


def _installed_folders() -> list[str]:
    """Where the standard library and installed packages are."""
    of_python = [*sysconfig.get_paths().values(), sysconfig.get_config_var("DESTSHARED")]
    return [*of_python, *site.getsitepackages(), site.getusersitepackages()]
