"""A reward function in a form that another process, or another machine, can load.

    portable = portable_of("length", "my.py:length", other_machines=True)
    length = pickle.loads(pickle.dumps(portable)).load()    # works on a machine that has no my.py
    length(completions=["abc"])                             # [3.0]

A process on this machine loads a function by the spec that the user gave; a callable is sent by cloudpickle. Another machine
has only installed packages: the files of a user's function, its own and the neighbours that it imports, are sent and loaded
there by the same rules (`own_files.py`); of other callables cloudpickle sends the code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
import site
import sys
import sysconfig
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from .loading import RewardSpec, find_file, load_object, load_reward, spec_of
from .own_files import digests_of, files_of, folder_of, know_folder, own_modules
from .texts import Function


@dataclass(frozen=True, slots=True, kw_only=True)
class Portable:
    """A reward function in a form that another process can load.

    Attributes:
        spec: as `load_reward` takes it, or a callable pickled by cloudpickle.
        kwargs: arguments of a factory.
        folder: where the files of the spec are looked up; None: the working directory.
        files: contents of the user's files by their path in `folder`, if the other machine may not have them.
        digests: hashes of the files at the start of the run, by their path, if the other process reads them.
        folders: those of the files that a pickled callable refers to.
    """

    spec: str | bytes
    kwargs: Mapping[str, Any] | None = None
    folder: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    folders: Sequence[str] = ()

    def load(self) -> Function:
        """The function. Raises what `load_reward` or unpickling raises, and ValueError if a file has changed."""
        for path, digest in self.digests.items():
            file = Path(path)
            if not file.is_file() or digests_of({path: file.read_bytes()})[path] != digest:
                raise ValueError(f"{file} has changed since the run began: all calls must use the same function")
        for folder in self.folders:
            know_folder(Path(folder))
        spec = pickle.loads(self.spec) if isinstance(self.spec, bytes) else self.spec
        return load_reward(spec, kwargs=self.kwargs, folder=None if self.folder is None else Path(self.folder))

    def unpacked(self, parent: Path) -> Portable:
        """The same with its files written below `parent`. Files of one folder stay together."""
        if not self.files:
            return self
        folder = parent / hashlib.sha256(str(self.folder).encode()).hexdigest()[:16]
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return dataclasses.replace(self, folder=str(folder), files={})


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
    text = spec if isinstance(spec, str) else spec_of(spec)
    own = None if text is None else own_files_of(text)
    if text is not None and own is not None:
        folder, files, inside = own
        if other_machines:
            return Portable(spec=inside, kwargs=kwargs, folder=str(folder), files=files)
        digests = {str(folder / path): digest for path, digest in digests_of(files).items()}
        return Portable(spec=inside, kwargs=kwargs, folder=str(folder), digests=digests)
    found: object = spec
    if other_machines and isinstance(spec, str) and ":" in spec:
        found = load_object(spec)  # not what a factory returns: it may not be picklable
    if isinstance(found, str):
        return Portable(spec=found, kwargs=kwargs)
    pickled = _pickled(name, found, other_machines=other_machines)
    referred = [] if other_machines else [m for n, m in own_modules().items() if n.partition(".")[0].encode() in pickled]
    return Portable(
        spec=pickled,
        kwargs=kwargs,
        digests=digests_of({str(m.__file__): Path(str(m.__file__)).read_bytes() for m in referred}),
        folders=sorted({str(folder_of(m)) for m in referred}),
    )


def own_files_of(spec: str) -> tuple[Path, dict[str, bytes], str] | None:
    """The folder, the files (by their path in it), and the spec in that folder of a function in a user's own files.

    None for short names, classifiers, and modules that Python finds itself. Raises what `load_object` raises.
    """
    location, _, attribute = spec.rpartition(":")
    if not location:
        return None
    if location.endswith(".py"):
        file = find_file(location)
        return file.parent, files_of(file), f"{file.name}:{attribute}"
    load_object(spec)
    folder = Path.cwd()
    module = next((m for n, m in own_modules().items() if n.partition(".")[2] == location and folder_of(m) == folder), None)
    return None if module is None else (folder, files_of(Path(str(module.__file__)), folder), spec)


def _pickled(name: str, found: object, *, other_machines: bool) -> bytes:
    import cloudpickle

    try:
        with _modules_by_value(installed_folders() if other_machines else sys.path, {} if other_machines else own_modules()):
            return cloudpickle.dumps(found)
    except (pickle.PicklingError, TypeError) as error:
        where, instead = "a process", "name it as file.py:name, or"
        if other_machines:
            where, instead = "other machines", "name it as file.py:name, install its module on every node, or"
        raise ValueError(f"reward function {name!r} cannot be sent to {where}: {error}; {instead} run it inline") from error


@contextmanager
def _modules_by_value(folders: Sequence[str], by_name: Container[str]) -> Iterator[None]:
    """Inside the block cloudpickle sends the code, not just the name, of every loaded module that `folders` do not hold, unless
    its name is in `by_name`."""
    import cloudpickle

    is_found = functools.cache(functools.partial(_is_found, folders=folders))
    modules = [module for name, module in list(sys.modules.items()) if _has_code(name, module)]
    by_value = [m for m in modules if m.__name__ not in by_name and not is_found(m.__name__.partition(".")[0])]
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


def installed_folders() -> list[str]:
    """The folders of the standard library and of installed packages."""
    of_python = [*sysconfig.get_paths().values(), sysconfig.get_config_var("DESTSHARED")]
    return [*of_python, *site.getsitepackages(), site.getusersitepackages()]
