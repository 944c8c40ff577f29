"""The commands and run files in the documentation are ones that work."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import code_blocks

from rankup.configs import quickstart
from rankup.grpo.cli.main import parse
from rankup.grpo.config import GRPOConfig, load_config
from rankup.grpo.config.reference import reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
SHELLS = {"bash", "sh", "shell", "console"}


def commands(text: str) -> list[list[str]]:
    """The words of every command line of ours in a page's shell blocks: what starts with `scripts/` or `rankup`."""
    blocks = [block.replace("\\\n", " ") for language, block in code_blocks(text) if language in SHELLS]
    prompt = re.compile(r"^(\$ )?([A-Z_]+=\S+ )*(\.venv/bin/)?")
    lines = [prompt.sub("", line.strip()) for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"rankup\b|scripts/", line)]


def problem(words: list[str]) -> str | None:
    """The error in a command line; None if it works."""
    name, *arguments = words
    if name != "rankup":
        is_script = (ROOT / name).is_file() and os.access(ROOT / name, os.X_OK)
        return None if is_script else "there is no such script, or it cannot be executed"
    try:
        options = parse(arguments)
    except SystemExit as exit_:  # 0 after --help
        return "rankup does not understand it" if exit_.code else None
    # A file in a folder is one of the repository's; a bare name, such as run.yaml, is a file of the reader's; so is a run.
    file = Path(getattr(options, "file", None) or getattr(options, "what", ""))  # `rankup plan` takes a model
    is_ours = file.suffix == ".yaml" and len(file.parts) > 1
    if not is_ours:
        return None
    try:
        load_config(ROOT / file, options.overrides)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("line", "works"),
    [
        ("scripts/test.sh -m 'not engine'  # the quick ones", True),
        ("$ rankup train configs/quickstart.yaml lora.rank=128 \\\n    seed=7", True),
        (".venv/bin/rankup eval runs/quickstart", True),
        ("RAY_ADDRESS=auto rankup train my.yaml", True),
        ("rankup train my.yaml", True),
        ("rankup --help", True),
        ("scripts/no_such_script.sh", False),
        ("scripts/bench/common.py", False),
        ("rankup learn configs/quickstart.yaml", False),
        ("rankup train", False),
        ("rankup train configs/no_such_file.yaml", False),
        ("rankup train configs/quickstart.yaml lora.rnk=128", False),
    ],
)
def test_recognition_of_commands_that_work(line: str, works: bool):
    (words,) = commands(f"Text.\n\n```bash\n# a comment\n{line}\ncat LICENSE\n```\nrankup is no command here.\n")
    assert (problem(words) is None) is works


def test_every_command_of_the_documentation_works():
    found = [(page.name, words) for page in PAGES for words in commands(page.read_text())]
    assert len([words for page, words in found if page == "README.md"]) >= 4
    problems = {f"{page}: {shlex.join(words)}": problem(words) for page, words in found}
    assert {command: what for command, what in problems.items() if what is not None} == {}


def test_the_reference_of_all_options_is_current():
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == reference(), "run: python -m rankup.grpo.config.reference docs/options.md"
    assert [name for name in GRPOConfig.model_fields if f"## {name}\n" not in page and f"`{name}`" not in page] == []


def test_every_link_of_the_documentation_leads_to_a_file():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in link]
    assert links
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_every_module_that_the_documentation_names_exists():
    """Paths such as `grpo/run/records.py`; `your/file.py` and the like are not ours."""
    pattern = re.compile(r"`((?:grpo|rollout|kernels|rewards|scripts|tests|configs)/[\w./-]+\.(?:py|sh|yaml|sbatch|md))`")
    paths = [(page, path) for page in PAGES if page.name != "log.md" for path in pattern.findall(page.read_text())]
    assert paths
    assert [(page.name, path) for page, path in paths if not (ROOT / path).exists()] == []


def test_the_reward_of_the_readme_scores_completions_of_the_quick_start():
    (reward, *_) = [block for language, block in code_blocks((ROOT / "README.md").read_text()) if language == "python"]
    namespace: dict[str, Any] = {}
    exec(reward, namespace)
    row = quickstart.evaluation()[0]
    texts = [f"The sum is {row['answer']}.", row["answer"], f"{row['answer']}1", "I do not know"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    inputs = {"prompts": [row["prompt"]] * 4, "completion_ids": [[1]] * 4}
    for given in (completions, texts):  # of a conversation, and of a prompt that is a text
        for answer in (row["answer"], int(row["answer"])):
            assert namespace["score"](completions=given, answer=[answer] * 4, **inputs) == [1.0, 1.0, 0.0, 0.0]


def test_every_run_file_of_the_documentation_is_valid():
    blocks = [block for page in PAGES for language, block in code_blocks(page.read_text()) if language == "yaml"]
    assert blocks
    for block in blocks:
        GRPOConfig(**yaml.safe_load(block))
