"""docs/notebook.ipynb: the file, and its cells in a real kernel."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_kernel import Kernel

from tests.support.layout import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def code_cells() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def html_of(cell: Any) -> list[str]:
    """The runs that a cell shows."""
    pages = [output.get("data", {}).get("text/html", "") for output in cell.outputs]
    return [page for page in pages if page.startswith('<div class="rankup')]


def test_the_notebook_has_the_outputs_of_its_cells_in_order():
    cells = code_cells()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert NOTEBOOK.stat().st_size < 300_000
    for cell in cells:
        assert [output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
        ends_with_a_value = isinstance(ast.parse(cell.source).body[-1], ast.Expr)
        assert bool([output for output in cell.outputs if output.output_type == "execute_result"]) == ends_with_a_value
    runs = [page for cell in cells for page in html_of(cell)]
    assert [re.findall(r"(done|not trained) · step \d+ of \d+", page) for page in runs] == [["not trained"], ["done"], ["done"]]
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
    results: dict[str, str] = {}
    with Kernel(tmp_path) as kernel:
        for cell in code_cells():
            source = re.sub(r"(max_steps|eval_steps)=\d+", r"\1=2", cell.source) if shortened else cell.source
            outputs = kernel.run(source)
            assert outputs.error is None, (source, outputs.error)
            assert "\x1b" not in outputs.everything and "stderr" not in outputs.streams
            assert "closing the engine" not in outputs.everything, "a user's engine stays open"
            for bundle in outputs.results:
                results[cell.source] = bundle["text/plain"]
    (ends,) = [ast.literal_eval(text) for source, text in results.items() if "engine.close()" in source]
    assert list(ends) == [64, 16] and all(0 <= reward <= 2 for reward in ends.values())
    evaluation = json.loads((tmp_path / "runs" / "rank64" / "summary.json").read_text())["evaluation"]
    assert evaluation["after"]["reward"] == ends[64]
    assert shortened or ends[64] > evaluation["before"]["reward"]
