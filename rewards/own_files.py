"""Python files of a user: each folder is a namespace of its own, in which its files import each other.

    module = import_file(Path("rewards/math.py"))       # its `import utils` finds rewards/utils.py, now and inside functions
    files = files_of(Path("rewards/math.py"))           # {"math.py": b"...", "utils.py": b"..."}

A file imports what a script in its folder would import: first the standard library, then the files and packages next to it,
then everything else. But its neighbours are modules of the folder (`rankup_files_<hash>.utils`), not of the interpreter: files
of two folders that import their own `utils.py` get two modules, and a neighbour never replaces a module of a library, which
does not see the folder. `sys.path` is not changed. While a file is imported, `sys.argv` holds its name only, as in a script
without arguments.

Only import statements find neighbours; `importlib.import_module("utils")` does not, but
`importlib.import_module(".utils", __package__)` does.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType

NAMESPACE = "rankup_files_"
"""Start of the names of the packages that stand for folders."""

_OURS = __name__.partition(".")[0]

_contents: dict[str, str] = {}
"""The hash of each imported file's content when it was imported, by module."""


def import_file(path: Path) -> ModuleType:
    """The module of a file: the same one as long as neither the file nor a neighbour that is imported has been edited.

    Raises whatever the file raises.
    """
    package = _package_of(path.parent)
    _forget_edited(package)
    name = f"{package}.{path.stem.replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as dataclasses and pickle look the module up by name
    try:
        with _arguments_of(path):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def import_from(folder: Path, name: str) -> ModuleType:
    """The module `name`, with dots, of the files of a folder. Raises ModuleNotFoundError, or whatever the file raises."""
    package = _package_of(folder)
    _forget_edited(package)
    with _arguments_of(folder / name):
        return importlib.import_module(f"{package}.{name}")


def has_module(folder: Path, name: str) -> bool:
    """Whether a folder has a file or a package of that name, which may have dots."""
    return _finder(str(folder)).find_spec(name.partition(".")[0]) is not None


def folder_of(module: ModuleType) -> Path | None:
    """The folder whose namespace a module belongs to; None if it is a module of the interpreter."""
    package = sys.modules.get(module.__name__.partition(".")[0])
    return Path(package.__path__[0]) if package is not None and package.__name__.startswith(NAMESPACE) else None


def own_modules() -> dict[str, ModuleType]:
    """The users' modules that are imported now, and that a process which knows their folder finds by their names."""
    modules = {name: sys.modules[name] for name in list(_contents) if name in sys.modules}
    return {
        name: module
        for name, module in modules.items()
        if Path(module.__file__ or "").stem in (name.rpartition(".")[2], "__init__")  # not `reward.v2.py`
    }


def know_folder(folder: Path) -> None:
    """From now on, modules of the folder can be imported by their names, as unpickling does."""
    _package_of(folder)


def files_of(path: Path, root: Path | None = None) -> dict[str, bytes]:
    """The contents of a file and of all neighbours that it imports, anywhere in its code, by path relative to `root`.

    root: the folder in which imports are looked up. None: that of the file.
    """
    root = path.parent if root is None else root
    contents: dict[Path, bytes] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in contents:
            contents[file] = file.read_bytes()
            waiting += _imported_files(file, contents[file], root)
    return {str(file.relative_to(root)): contents[file] for file in sorted(contents)}


def _imported_files(file: Path, code: bytes, root: Path) -> Iterator[Path]:
    """The neighbours that the import statements of a file may read; none if it cannot be parsed: its import gives the error."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            package = file.relative_to(root).parent.parts
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = [*start, *([node.module] if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    for name in names:
        parts = name.split(".")
        if parts[0] in sys.stdlib_module_names or parts[0] == _OURS:
            continue
        for end in range(1, len(parts) + 1):
            module = root.joinpath(*parts[:end])
            yield from (one for one in (module.with_name(f"{module.name}.py"), module / "__init__.py") if one.is_file())


def digests_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """Hashes of the contents of files."""
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in files.items()}


@contextmanager
def _arguments_of(path: Path) -> Iterator[None]:
    """Inside the block, the arguments of the process are those of a script without any: `argparse` must not read ours."""
    arguments, sys.argv = sys.argv, [str(path)]
    try:
        yield
    finally:
        sys.argv = arguments


def _package_of(folder: Path) -> str:
    """The name of the package that stands for a folder, which exists from now on."""
    name = f"{NAMESPACE}{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        package = ModuleType(name, f"The Python files in {folder}.")
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before that of `sys.path`, which would find them too
    return name


def _forget_edited(package: str) -> None:
    """If an imported file of the package has been edited, import all of them again when they are needed."""
    importlib.invalidate_caches()  # the files may be newer than Python's cached folder listing
    _finder(sys.modules[package].__path__[0]).invalidate_caches()
    modules = {name: module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")}
    if all(_contents.get(name) == _content(module) for name, module in modules.items()):
        return
    for name in modules:
        del sys.modules[name]


def _content(module: ModuleType) -> str | None:
    """The hash of a module's file as it is now; None if it is gone or was not imported by `_Loader`."""
    file = Path(module.__file__ or "")
    is_source = isinstance(module.__loader__, _Loader) and file.is_file()
    return hashlib.sha256(file.read_bytes()).hexdigest() if is_source else None


class _Loader(SourceFileLoader):
    """Executes a user's file with an `__import__` of its own, by the module's entry `__builtins__`."""

    def get_code(self, fullname: str) -> CodeType:
        """The compiled file. Not from Python's cache, which knows an edited file only by its size and the second."""
        content = self.get_data(self.path)
        _contents[fullname] = hashlib.sha256(content).hexdigest()
        return self.source_to_code(content, self.path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder:
    """Finds the modules of the packages that stand for folders."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As the import system calls it; `path` is that of the parent package."""
        if not name.startswith(NAMESPACE) or path is None:
            return None
        specs = (_finder(folder).find_spec(name) for folder in path)
        return next((spec for spec in specs if spec is not None), None)


@cache
def _finder(folder: str) -> FileFinder:
    return FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_Loader, SOURCE_SUFFIXES))


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """The `__import__` of users' files; the arguments are those of Python's."""
    package, _, importer = str((globals or {}).get("__name__", "")).partition(".")
    top = name.partition(".")[0]
    is_itself = importer == top and "__path__" not in (globals or {})  # torch.py that imports torch: the library
    if level > 0 or is_itself or not _is_neighbour(package, top):
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
    return module if fromlist else sys.modules[f"{package}.{top}"]


def _is_neighbour(package: str, top: str) -> bool:
    """Whether `import top` in a file of that package means a file or package of the folder."""
    if not package.startswith(NAMESPACE) or top in sys.stdlib_module_names or top == _OURS:
        return False
    spec = _finder(sys.modules[package].__path__[0]).find_spec(top)
    if spec is None:
        return False
    # A folder without __init__.py may hold anything: as in a script, everything else comes before it.
    return spec.loader is not None or importlib.util.find_spec(top) is None
