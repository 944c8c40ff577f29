"""The modules of the package and what they import, read from their syntax trees."""

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    {"section", "configs"},
    {"kernels", "rewards"},
    {"rollout"},
    {"grpo/common"},
    {"grpo/config"},
    {"grpo/display"},
    {"grpo/data", "grpo/guards", "grpo/algorithm"},
    {"grpo/episodes"},
    {"grpo/model"},
    {"grpo/experience"},
    {"grpo/update"},
    {"grpo/memory"},
    {"grpo/run"},
    {"grpo/checkpoint"},
    {"grpo/user_inputs"},
    {"grpo/prepared"},
    {"grpo/setup"},
    {"grpo/sessions", "grpo/generation", "grpo/sharing"},
    {"grpo/context"},
    {"grpo/ending", "grpo/evaluating"},
    {"grpo/recording"},
    {"grpo/loop"},
    {"grpo/objects"},
    {"grpo/cluster"},
    {"grpo/running"},
    {"grpo/trainer_methods"},
    {"grpo/trainer"},
    {"grpo/cli"},
)
"""Folders and modules from left to right, as in docs/design.md: imports point to the left only, none to a neighbour."""

NOT_SOURCES = {"build", "dist", "runs", "node_modules"}


def source_files(root: Path = ROOT) -> list[Path]:
    """Every Python file of the repository, outside of environments, builds and hidden folders."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in NOT_SOURCES]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


@dataclass(frozen=True)
class Module:
    """One of our modules: its name with slashes (`grpo/config/lora`; a package by its folder) and its syntax tree."""

    name: str
    package: list[str]
    tree: ast.Module

    @property
    def layer(self) -> str:
        return layer_of(self.name)


def layer_of(name: str) -> str:
    """The entry of `LAYERS` that a module belongs to; empty for the package `rankup` itself."""
    first, _, rest = name.partition("/")
    return f"{first}/{rest.partition('/')[0]}" if first == "grpo" and rest else first


def modules_of(root: Path) -> dict[str, Module]:
    """All modules of the package, by name."""
    folders = sorted({name.partition("/")[0] for layer in LAYERS for name in layer})
    files = [*root.glob("*.py"), *(path for folder in folders for path in source_files(root / folder))]
    modules = {}
    for path in files:
        relative = path.relative_to(root)
        parts = relative.parent.parts if path.name == "__init__.py" else relative.with_suffix("").parts
        name = "/".join(parts)
        modules[name] = Module(name, ["rankup", *relative.parent.parts], ast.parse(path.read_text()))
    return modules


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: no function bodies, nothing under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            child = ast.Module(child.orelse, [])
        yield child
        yield from statements(child)


def imports(module: Module, modules: dict[str, Module], *, at_import_only: bool = False) -> set[str]:
    """Names of our modules that a module imports, in functions and under `TYPE_CHECKING` too unless `at_import_only`."""
    found = set()
    for node in statements(module.tree) if at_import_only else ast.walk(module.tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = module.package[: len(module.package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            dotted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            first, *rest = name.split(".")
            path = "/".join(rest)
            if first == "rankup":
                found.add(path if path in modules or first == name else path.rpartition("/")[0])
            elif any(first == layer for layers in LAYERS for layer in layers):  # `kernels` without `rankup`
                found.add(name)
    return found - {module.name}


def imports_to_the_right(root: Path) -> list[str]:
    """Imports that do not point to the left, as "module imports module"."""
    rank = {name: index for index, names in enumerate(LAYERS) for name in names}
    modules = modules_of(root)
    violations = []
    for module in modules.values():
        for name in imports(module, modules) if module.layer in rank else ():
            is_within = layer_of(name) == module.layer
            if not is_within and rank.get(layer_of(name), len(LAYERS)) >= rank[module.layer]:
                violations.append(f"{module.name} imports {name or 'rankup'}")
    return sorted(violations)


def untyped_arguments(modules: dict[str, Module]) -> list[str]:
    """Calls of our functions and classes that pass `**values` where `values` is annotated `dict[str, Any]`.

    An annotation is found by name: that of a parameter, a variable, a field, or a function that returns it. The syntax alone
    does not know the type of a mapping without an annotation, nor the class of the object whose method is called.
    """
    bags = {"dict[str, Any]", "Mapping[str, Any]"}
    nodes = [node for module in modules.values() for node in ast.walk(module.tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    returning = {f.name for f in functions if f.returns and ast.unparse(f.returns) in bags}
    ours = {f.name for f in functions} | {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    fields = {
        node.target.attr if isinstance(node.target, ast.Attribute) else ast.unparse(node.target)
        for node in nodes
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in bags
    }
    found = set()
    for module in modules.values():
        for function in ast.walk(module.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= _untyped_arguments_in(module, function, bags, returning, ours, fields | returning)
    return sorted(found)


def _untyped_arguments_in(
    module: Module,
    function: ast.FunctionDef | ast.AsyncFunctionDef,
    bags: set[str],
    returning: set[str],
    ours: set[str],
    fields: set[str],
) -> set[str]:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) in bags}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in bags:
            names.add(ast.unparse(node.target))
        made_by = node.value.func if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) else None
        if isinstance(node, ast.Assign) and isinstance(made_by, ast.Name) and made_by.id in returning:
            names |= {ast.unparse(target) for target in node.targets}
    found = set()
    for call in ast.walk(function):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ours):
            continue
        for value in (keyword.value for keyword in call.keywords if keyword.arg is None):
            made_by = value.func if isinstance(value, ast.Call) else None
            is_bag = (
                (isinstance(value, ast.Name) and value.id in names)
                or (isinstance(value, ast.Attribute) and value.attr in fields)
                or (isinstance(made_by, ast.Name) and made_by.id in returning)
            )
            if is_bag:
                found.add(f"{module.name}: {call.func.id}(**{ast.unparse(value)})")
    return found
