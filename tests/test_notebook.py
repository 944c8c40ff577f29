"""docs/notebook.ipynb: the file, and its cells in a real kernel."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_kernel import Kernel, Outputs

from rankup.grpo.display.run_html import RunPicture, run_html
from tests.support.layout import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def code_cells() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def html_of(cell: Any) -> list[str]:
    """The HTML that a cell shows, without that of other packages."""
    pages = [output.get("data", {}).get("text/html", "") for output in cell.outputs]
    return [
        page for page in pages if page.startswith(run_html(RunPicture(run_name="", status="", steps_done=0, max_steps=0))[:20])
    ]


def test_the_notebook_has_the_outputs_of_its_cells_in_order():
    cells = code_cells()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert NOTEBOOK.stat().st_size < 300_000
    for cell in cells:
        assert [output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
        ends_with_a_value = isinstance(ast.parse(cell.source).body[-1], ast.Expr)
        assert bool([output for output in cell.outputs if output.output_type == "execute_result"]) == ends_with_a_value
    runs = [page for cell in cells for page in html_of(cell)]
    assert [re.findall(r"(done|not trained) · step \d+ of \d+", page) for page in runs] == [["not trained"], *[["done"]] * 3]
    assert all("<svg" in page and "completions of step" in page for page in runs[1:])


def test_the_notebook_names_no_path_of_the_machine_that_executed_it():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.<])/(?:root|home|tmp|work|usr|opt)/\S*", text) == []
    assert "\\u001b" not in text and "\x1b" not in text


def test_its_links_lead_to_pages():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    links = [link for cell in cells for link in re.findall(r"\]\(([^)#\s]+)", cell.source) if cell.cell_type == "markdown"]
    assert links and [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.runs
@pytest.mark.parametrize("shortened", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, shortened: bool):
    """With two steps in each run by default; as it is with --exhaustive, where it must also learn something."""
    outputs: list[Outputs] = []
    with Kernel(tmp_path) as kernel:
        for cell in code_cells():
            source = re.sub(r'"(max_steps|eval_steps)": [1-9]\d*', r'"\1": 2', cell.source) if shortened else cell.source
            outputs.append(kernel.run(source))
            assert outputs[-1].error is None, (source, outputs[-1].error)
            assert "\x1b" not in outputs[-1].everything and "stderr" not in outputs[-1].streams
    assert len(list((tmp_path / "runs").iterdir())) == 3
    ends = ast.literal_eval(outputs[-3].results[0]["text/plain"])
    assert sorted(ends) == [8, 32] and all(0 <= reward <= 2 for reward in ends.values())
    evaluation = json.loads((tmp_path / "runs" / "sums" / "summary.json").read_text())["evaluation"]
    assert shortened or evaluation["after"]["reward"] > evaluation["before"]["reward"] + 0.3
