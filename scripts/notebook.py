#!/usr/bin/env python
"""Execute docs/notebook.ipynb and write it with its outputs.

    .venv/bin/python scripts/notebook.py

Its runs go to a temporary folder. Times of execution and the kernel's version are left out of the file; seconds and speeds of
the runs remain.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebook.ipynb"
CELL_SECONDS = 3600


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a new kernel that works in `folder`; their outputs replace those in the notebook.

    Raises:
        CellExecutionError: a cell failed.
    """
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=resources, record_timing=False).execute()
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"}, language_info={"name": "python"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute a notebook and write it with its outputs.")
    parser.add_argument("path", nargs="?", type=Path, default=NOTEBOOK)
    path: Path = parser.parse_args().path
    notebook, started = nbformat.read(path, as_version=4), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    nbformat.write(notebook, path)
    print(f"{path}: {time.monotonic() - started:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
