#!/usr/bin/env python3
"""Turn the benchmarks' JSON files into the tables and pictures of the performance page.

    scripts/bench/report.py docs/performance

reads those of train_step.json, rank.json, vs_trl.json, rollout.json and profile.json that are in the folder, draws a picture
for each, and updates docs/performance.md: the text between

    <!-- table: train_step -->
    <!-- end -->

is replaced with the table of train_step.json, so that the numbers on the page are those of the files. Without a page, or with
--print, the tables are printed.

examples:
  scripts/bench/report.py docs/performance                      pictures, and the tables of docs/performance.md
  scripts/bench/report.py . --print --no-plots                  only look at the figures in this folder
  scripts/bench/report.py --check docs/performance              fail if the page and the files differ
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from common import TABLE, replace_tables, script_parser

MODULES = {"train_step": "train_step", "rank": "rank", "vs_trl": "vs_trl", "rollout": "rollout", "profile": "profile_step"}
"""The benchmark of each result; it has functions `table` and `draw`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the results, draw the pictures and update the page."""
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the JSON files and the pictures")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the Markdown page (default: the folder's name and .md)")
    parser.add_argument("--print", action="store_true", help="print the tables and leave the page unmodified")
    parser.add_argument("--no-plots", action="store_false", dest="plots", help="draw no pictures")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is out of date")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    files = {name: options.folder / f"{name}.json" for name in MODULES}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    if not results:
        sys.exit(f"{options.folder} has none of {', '.join(MODULES)} (.json): run a benchmark first")
    tables = {name: import_module(MODULES[name]).table(result) for name, result in results.items()}
    page: Path = options.page or options.folder.resolve().with_suffix(".md")
    if options.print or not page.is_file():
        print("\n".join(f"{name}\n\n{table}\n" for name, table in tables.items()))
    else:
        _update(page, tables, check=options.check)
    if options.plots and not options.check:
        for name, result in results.items():
            import_module(MODULES[name]).draw(result, options.folder / f"{name}.png")


def _update(page: Path, tables: dict[str, str], *, check: bool) -> None:
    """Write the tables into a page. `check`: only exit with an error if that would change it."""
    text = page.read_text()
    updated = replace_tables(text, tables, known=MODULES)
    if check:
        if updated != text:
            sys.exit(f"{page} and the files differ: run scripts/bench/report.py")
        return
    page.write_text(updated)
    shown = {match["name"] for match in TABLE.finditer(updated)}
    print(f"updated in {page}: {', '.join(sorted(shown & set(tables))) or 'nothing'}")
    for name in sorted(set(tables) - shown):
        print(f"not on the page: {name}; its marker is <!-- table: {name} -->")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
