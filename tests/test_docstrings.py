"""The examples in module docstrings call what exists, with arguments that it takes.

An example is an indented block of a module's docstring that is Python. Most need an engine or a model, so they are not run:
every call in them is bound to the signature of what it calls, which is a function or class of the module, one that the package
defines once under that name, or a method of an object that the example makes. Formulas, shell lines and calls of methods of
other objects are not checked.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "rewards", "rollout", "grpo")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def docstring_of(path: Path) -> str:
    """A module's docstring with its indentation, which the compiler and `inspect.getdoc` may remove."""
    return ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""


def examples(docstring: str) -> Iterator[ast.Module]:
    """The indented blocks that are Python."""
    for block in re.findall(r"(?:^ {4}.*\n|^\n)+", docstring + "\n", re.MULTILINE):
        try:
            example = ast.parse(textwrap.dedent(block))
        except SyntaxError:
            continue
        if example.body:
            yield example


@functools.cache
def definitions() -> dict[str, list[str]]:
    """The modules that define each public function and class, by its name."""
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module_name(path))
    return found


def module_name(path: Path) -> str:
    return ".".join(["rankup", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def wrong_calls(docstring: str, module: ModuleType) -> tuple[int, list[str]]:
    """How many calls of the examples were checked, and the errors in them."""
    checked, problems = 0, []
    for example in examples(docstring):
        made: dict[str, type] = {}  # variables that hold an object of a class of ours
        for statement in ast.walk(example):
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
                called = resolve(statement.value.func, module, made)
                if isinstance(called, type) and isinstance(statement.targets[0], ast.Name):
                    made[statement.targets[0].id] = called
        for call in (node for node in ast.walk(example) if isinstance(node, ast.Call)):
            called = resolve(call.func, module, made)
            if called is None:
                continue
            checked += 1
            problem = binding_problem(called, call)
            if problem:
                problems.append(f"{ast.unparse(call)}: {problem}")
    return checked, problems


def resolve(expression: ast.expr, module: ModuleType, made: dict[str, type]) -> object | None:
    """What a call's function is, None if this cannot be known: a name of the package, or a method of an object of `made`."""
    if isinstance(expression, ast.Name):
        if hasattr(module, expression.id):
            return getattr(module, expression.id)
        places = definitions().get(expression.id, [])
        return getattr(importlib.import_module(places[0]), expression.id) if len(places) == 1 else None
    if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name) and expression.value.id in made:
        cls = made[expression.value.id]
        method = getattr(cls, expression.attr, None)
        assert method is not None, f"{cls.__name__} has no method {expression.attr}"
        return functools.partial(method, None) if inspect.isfunction(inspect.getattr_static(cls, expression.attr)) else method
    return None


def binding_problem(called: object, call: ast.Call) -> str | None:
    """Why the arguments do not fit the signature; None if they do, or if an ellipsis leaves some out."""
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    if any(isinstance(value, ast.Starred) or (isinstance(value, ast.Constant) and value.value is ...) for value in values):
        return None
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    if isinstance(called, type) and "__init__" in vars(called):  # GRPOConfig takes more names than pydantic's signature says
        called = functools.partial(called.__init__, None)
    try:
        inspect.signature(called).bind(*[None] * len(call.args), **keywords)  # type: ignore[arg-type]
    except TypeError as error:
        return str(error)
    return None


WITH_EXAMPLES = [path for path in SOURCES if any(examples(docstring_of(path)))]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings_fit_the_code(path: Path) -> None:
    _, problems = wrong_calls(docstring_of(path), importlib.import_module(module_name(path)))
    assert not problems, problems


def test_most_modules_with_examples_have_calls_to_check() -> None:
    checked = [wrong_calls(docstring_of(path), importlib.import_module(module_name(path)))[0] for path in WITH_EXAMPLES]
    assert len(checked) > 40 and sum(count > 0 for count in checked) > 0.6 * len(checked), checked


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ('engine = RolloutEngine(EngineSettings(model="m", rank=64))', "rank"),
        ("with open_session(config, path, say=print) as session:\n    pass", "say"),
        ("request_seed(1, 2)", "missing a required argument"),
        ("engine = RolloutEngine(settings)\nengine.rollout(prompts, sampling, seed=3)", "seed"),
        ("engine = RolloutEngine(...)\nengine.rollout(prompts, sampling, seeds=seeds)", None),
        ("y = W x + b", None),
    ],
)
def test_examples_that_cannot_run_are_found(example: str, problem: str | None) -> None:
    from rankup.rollout import engine

    _, problems = wrong_calls(f"Title.\n\n{textwrap.indent(example, '    ')}\n\nText.", engine)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]
