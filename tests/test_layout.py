"""The layout of docs/design.md: which module may import which, and the sizes of files and functions."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.support.layout import ROOT, imports, imports_to_the_right, modules_of, source_files, untyped_arguments

MOST_IMPORTS = 14

GENERATED = {"grpo/config/trl/arguments.py"}
"""Files that nobody reads from top to bottom: a line for each option."""

# pydantic checks what a user wrote.
UNTYPED_ARGUMENTS = {"grpo/config/run_config: GRPOConfig(**values)", "grpo/config/files: GRPOConfig(**values)"}


def test_imports_point_to_the_left_only():
    assert imports_to_the_right(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/lora.py", "from ..rollout.types import Completion"),
        ("kernels/nested/lora.py", "from ...rewards import runner"),
        ("kernels/lora.py", "import rankup"),
        ("section.py", "from .kernels import lora"),
        ("rewards/runner.py", "from rankup.grpo.config import GRPOConfig"),
        ("rewards/runner.py", "from .. import grpo"),
        ("rollout/engine.py", "import rankup.rewards.runner\nimport rankup.grpo.config"),
        ("rollout/engine.py", "def f():\n    from ..grpo import config"),
        ("grpo/guards/rules.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..data import prompts"),
        ("grpo/model/policy.py", "from ..update.learner import Learner"),
        ("grpo/trainer.py", "from .cli.main import main"),
        ("grpo/run/records.py", "from ..trainer import GRPOTrainer"),
        ("grpo/trainer.py", "from kernels import lora"),
    ],
)
def test_an_import_to_the_right_is_found(tmp_path: Path, path: str, line: str):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line)
    assert len(imports_to_the_right(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/nested/lora.py", "from ..logprob import f"),
        ("rewards/config.py", "from ..section import Section"),
        ("rollout/engine.py", "from ..kernels.lora import f\nfrom ..rewards.texts import f"),
        ("grpo/guards/guards.py", "from .rules import f\nfrom ..config import GuardsConfig"),
        ("grpo/trainer.py", "from rankup.rollout.engine import RolloutEngine"),
        ("grpo/cli/check.py", "from ..trainer import GRPOTrainer\nfrom . import main"),
        ("__init__.py", "from .grpo.trainer import GRPOTrainer"),
    ],
)
def test_an_import_to_the_left_is_allowed(tmp_path: Path, path: str, line: str):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line)
    assert imports_to_the_right(tmp_path) == []


def test_no_modules_import_each_other_in_a_circle():
    modules = modules_of(ROOT)
    graph = {module.name: imports(module, modules, at_import_only=True) for module in modules.values()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_the_processes_that_start_workers_do_not_import_the_trainer():
    """It takes seconds in each of them, one after the other."""
    modules = modules_of(ROOT)
    graph = {module.name: imports(module, modules, at_import_only=True) for module in modules.values()}
    found: set[str] = set()
    waiting = {"grpo/cluster/ray_train", "grpo/cluster/mailbox"}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= graph.get(name, set()) - found
    trainer = ("grpo/loop", "grpo/setup", "grpo/model", "grpo/update", "grpo/data")
    assert [name for name in found if name.startswith(trainer)] == []


def test_no_module_imports_many_of_ours():
    modules = modules_of(ROOT)
    counts = {module.name: len(imports(module, modules)) for module in modules.values()}
    assert {name: count for name, count in counts.items() if count > MOST_IMPORTS} == {}


def test_no_untyped_dictionary_is_passed_as_keyword_arguments_of_ours():
    assert set(untyped_arguments(modules_of(ROOT))) - UNTYPED_ARGUMENTS == set()


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("def g(values: dict[str, Any]): f(**values)", True),
        ("def g():\n    values: dict[str, Any] = {}\n    f(**values)", True),
        ("class C:\n    bag: dict[str, Any]\n    def g(self): f(**self.bag)", True),
        ("def h() -> dict[str, Any]: ...\ndef g(): f(**h())", True),
        ("def h() -> dict[str, Any]: ...\ndef g():\n    values = h()\n    f(**values)", True),
        ("def g(values: dict[str, float]): f(**values)", False),
        ("def g(values: dict[str, Any]): json.dumps(**values)", False),
        ("def g(values: dict[str, Any]): return {**values}", False),
    ],
)
def test_an_untyped_dictionary_of_arguments_is_found(tmp_path: Path, code: str, is_found: bool):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "loop.py").write_text(f"def f(**values): ...\n{code}")
    assert bool(untyped_arguments(modules_of(tmp_path))) is is_found


def test_files_and_functions_are_short():
    too_long = []
    for path in source_files():
        text = path.read_text()
        lengths = {"": len(text.splitlines())}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[node.name] = (node.end_lineno or node.lineno) - node.lineno + 1
        too_long += [
            f"{path.relative_to(ROOT)} {name}: {length} lines"
            for name, length in lengths.items()
            if length > (60 if name else 400) and not (name == "" and path.relative_to(ROOT).as_posix() in GENERATED)
        ]
    assert too_long == []
