"""The code of a user's functions, as hashes that a resumed run compares.

    code_of("rewards/math.py:correct")      # by path, the hashes of the file and of the neighbours that it imports
    code_of(my_function)                    # of a script or notebook: the hash of its source text, by its name

A function that is named by its file or module stands for the whole file and for the neighbours that it imports. Of a function
that is passed in Python only its own text is compared: not what it calls, nor the values that it reads. Installed packages and
rankup are not compared, nor are data files and models that a function reads.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from pathlib import Path
from types import ModuleType

from .loading import RewardSpec, find_file, load_object
from .own_files import digests_of, files_of, folder_of, own_modules
from .portable import installed_folders


def code_of(function: RewardSpec) -> dict[str, str]:
    """Hashes by file, relative to the working directory where it is inside of it, or by the function's name; often empty.

    Raises what `load_object` raises.
    """
    if isinstance(function, str):
        location = function.rpartition(":")[0]
        if location.endswith(".py"):
            file = find_file(location)
            return _digests(file, file.parent)
        return _of_module(_module_named(location, function)) if location else {}
    while isinstance(function, functools.partial):
        function = function.func
    defined = function if hasattr(function, "__qualname__") else type(function)
    module = sys.modules.get(getattr(defined, "__module__", None) or "")
    if module is not None and (folder_of(module) is not None or _is_installed(module)):
        return _of_module(module)
    try:
        source = inspect.getsource(defined)
    except (OSError, TypeError):  # typed at a prompt, or written in C
        source = _source_by_method(defined) if inspect.isclass(defined) else None
    return {} if source is None else digests_of({defined.__name__: source.encode()})


def _source_by_method(defined: type) -> str | None:
    """The text of a class of a script that was sent to a worker, where `__main__` is another file: its methods know theirs."""
    method = next((one for one in vars(defined).values() if inspect.isfunction(one)), None)
    try:
        lines = [] if method is None else inspect.findsource(method)[0]
        nodes = [node for node in ast.walk(ast.parse("".join(lines))) if isinstance(node, ast.ClassDef)]
    except (OSError, SyntaxError):
        return None
    for node in nodes:
        assert method is not None and node.end_lineno is not None
        if node.name == defined.__name__ and node.lineno <= method.__code__.co_firstlineno <= node.end_lineno:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "".join(inspect.getblock(lines[first - 1 :]))
    return None


def _module_named(name: str, spec: str) -> ModuleType:
    load_object(spec)
    here = [module for full, module in own_modules().items() if full.partition(".")[2] == name]
    return next((module for module in here if folder_of(module) == Path.cwd()), None) or sys.modules[name]


def _of_module(module: ModuleType) -> dict[str, str]:
    """The code of a module and of its neighbours; none of one that is installed."""
    if _is_installed(module):
        return {}
    file = Path(str(module.__file__)).absolute()
    depth = module.__name__.count(".") + (file.name == "__init__.py")
    return _digests(file, folder_of(module) or file.parents[depth])


def _is_installed(module: ModuleType) -> bool:
    """Whether it is a module of a package, of Python or of rankup, and not a user's own file."""
    if module.__name__ == "__main__" or module.__name__.partition(".")[0] == __name__.partition(".")[0]:
        return module.__name__ != "__main__"
    file = Path(getattr(module, "__file__", None) or "")
    return file.suffix != ".py" or any(file.resolve().is_relative_to(folder) for folder in _resolved_folders())


@functools.cache
def _resolved_folders() -> list[Path]:
    return [Path(folder).resolve() for folder in installed_folders() if folder]


def _digests(file: Path, root: Path) -> dict[str, str]:
    digests = digests_of(files_of(file, root))
    paths = {root / name: digest for name, digest in digests.items()}
    here = Path.cwd()
    return {str(path.relative_to(here) if path.is_relative_to(here) else path): digest for path, digest in paths.items()}
