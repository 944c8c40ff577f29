"""A reward function in a form that another process, or another machine, can load.

    portable = portable_of("length", "my.py:length", other_machines=True)
    length = pickle.loads(pickle.dumps(portable)).load()    # works on a machine that has no my.py
    length(completions=["abc"])                             # [3.0]

A process on this machine loads a function by the spec that the user gave; a callable is sent by cloudpickle. Another machine
has only installed packages: a function from a user's file is sent with the code that it uses.
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

from .loading import RewardSpec, find_file, load_object, load_reward
from .texts import Function


@dataclass(frozen=True, slots=True, kw_only=True)
class Portable:
    """A reward function in a form that another process can load.

    Attributes:
        spec: as `load_reward` takes it, or a callable pickled by cloudpickle.
        kwargs: arguments of a factory.
        digest: if the spec names a file, the hash of its content at the start of the run.
    """

    spec: str | bytes
    kwargs: Mapping[str, Any] | None = None
    digest: str = ""

    def load(self) -> Function:
        """The function. Raises what `load_reward` or unpickling raises, and ValueError if the file has changed."""
        if isinstance(self.spec, bytes):
            return load_reward(pickle.loads(self.spec), kwargs=self.kwargs)
        file = Path(self.spec.rpartition(":")[0])
        if self.digest and _digest_of(file) != self.digest:
            raise ValueError(f"{file} has changed since the run began: all calls must use the same function")
        return load_reward(self.spec, kwargs=self.kwargs)


def portable_of(
    name: str,
    spec: RewardSpec,
    *,
    kwargs: Mapping[str, Any] | None = None,
    other_machines: bool = False,
) -> Portable:
    """What another process needs for the function that `load_reward(spec, kwargs=kwargs)` returns.

    `other_machines`: whether it must load on machines without the user's files. Raises ValueError, with the function's name in
    messages, if it cannot be sent.
    """
    location, _, attribute = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    found: object = spec
    if other_machines and location:
        found = load_object(f"{location}:{attribute}")  # not what a factory returns: it may not be picklable
    if not isinstance(found, str):
        return Portable(spec=_pickled(name, found, other_machines=other_machines), kwargs=kwargs)
    if not location.endswith(".py"):
        return Portable(spec=found, kwargs=kwargs)
    file = find_file(location)
    return Portable(spec=f"{file}:{attribute}", kwargs=kwargs, digest=_digest_of(file))


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _pickled(name: str, found: object, *, other_machines: bool) -> bytes:
    import cloudpickle

    try:
        with _modules_by_value(_installed_folders() if other_machines else sys.path):
            return cloudpickle.dumps(found)
    except (pickle.PicklingError, TypeError) as error:
        where, instead = "a process", "name it as file.py:name, or"
        if other_machines:
            where, instead = "other machines", "install its module on every node, run it in a process, or"
        raise ValueError(f"reward function {name!r} cannot be sent to {where}: {error}; {instead} run it inline") from error


@contextmanager
def _modules_by_value(folders: Sequence[str]) -> Iterator[None]:
    """Inside the block cloudpickle sends the code, not just the name, of every loaded module that `folders` do not hold."""
    import cloudpickle

    is_found = functools.cache(functools.partial(_is_found, folders=folders))
    modules = [module for name, module in list(sys.modules.items()) if _has_code(name, module)]
    by_value = [module for module in modules if not is_found(module.__name__.partition(".")[0])]
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _has_code(name: str, module: object) -> bool:
    is_named = isinstance(module, ModuleType) and module.__name__ == name != "__main__"  # it always sends the code of __main__
    return is_named and getattr(module, "__file__", None) is not None


def _is_found(package: str, *, folders: Sequence[str]) -> bool:
    """Whether a new process would find it. (`importlib.util.find_spec` would accept any module that is loaded here.)"""
    others = (finder for finder in sys.meta_path if finder is not PathFinder)  # built in, or an editable install
    return PathFinder.find_spec(package, folders) is not None or any(f.find_spec(package, None) is not None for f in others)


def _installed_folders() -> list[str]:
    """The folders of the standard library and of installed packages."""
    of_python = [*sysconfig.get_paths().values(), sysconfig.get_config_var("DESTSHARED")]
    return [*of_python, *site.getsitepackages(), site.getusersitepackages()]
