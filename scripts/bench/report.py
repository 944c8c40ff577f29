#!/usr/bin/env python3
"""Turn the benchmarks' JSON files into the tables and pictures of the performance page.

    scripts/bench/report.py docs/performance

reads those of train_step.json, rank.json, vs_trl.json, rollout.json and profile.json that are in the folder, draws a picture
for each, and updates docs/performance.md: the text between

    <!-- table: train_step -->
    <!-- end -->

is replaced with the table of train_step.json, so that the numbers on the page are those of the files. Without a page, or with
--print, the tables are printed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import use_environment
from report_tables import TABLES

EXAMPLE = """examples:
  scripts/bench/report.py docs/performance                      pictures, and the tables of docs/performance.md
  scripts/bench/report.py . --print --no-plots                  only look at the figures in this folder
  scripts/bench/report.py --check docs/performance              fail if the page and the files differ
"""
MARKER = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<body>.*?)(?P<end><!-- end -->|(?=<!-- table: )|\Z)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the figures, draw the pictures and update the page."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the JSON files and the pictures")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the Markdown page (default: the folder's name and .md)")
    parser.add_argument("--print", action="store_true", help="print the tables and leave the page unmodified")
    parser.add_argument("--no-plots", action="store_false", dest="plots", help="draw no pictures")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is out of date")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    figures = read_figures(options.folder)
    tables = {name: TABLES[name](figure) for name, figure in figures.items()}
    page: Path = options.page or options.folder.resolve().with_suffix(".md")
    if options.print or not page.is_file():
        for name, table in tables.items():
            print(f"{name}\n\n{table}\n")
    else:
        update_page(page, tables, check=options.check)
    if options.plots and not options.check:
        from report_plots import PLOTS

        for name, figure in figures.items():
            picture = options.folder / f"{name}.png"
            PLOTS[name](figure, picture)
            print(f"drawn: {picture}")


def read_figures(folder: Path) -> dict[str, Any]:
    """The results in a folder, by name.

    Raises:
        ValueError: the folder has none.
    """
    files = {name: folder / f"{name}.json" for name in TABLES}
    found = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
    if not found:
        raise ValueError(f"{folder} has none of {', '.join(path.name for path in files.values())}: run a benchmark first")
    return found


def replace_tables(text: str, tables: Mapping[str, str]) -> str:
    """The text of a page with the tables between their markers. A marker that is not in `tables` keeps its table.

    Raises:
        ValueError: a marker has an unknown name or no end.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"<!-- table: {name} -->: unknown table; the tables are {', '.join(TABLES)}")
        if not match["end"]:
            raise ValueError(f"<!-- table: {name} --> has no <!-- end -->")
        if name not in tables:
            return match[0]
        return f"<!-- table: {name} -->\n{tables[name].rstrip()}\n<!-- end -->"

    return MARKER.sub(replaced, text)


def update_page(page: Path, tables: Mapping[str, str], *, check: bool) -> None:
    """Write the tables into a page. `check`: only exit with an error if that would change it."""
    text = page.read_text()
    updated = replace_tables(text, tables)
    if check:
        if updated != text:
            sys.exit(f"{page} and the files differ: run scripts/bench/report.py")
        return
    page.write_text(updated)
    shown = {match["name"] for match in MARKER.finditer(updated)}
    print(f"updated in {page}: {', '.join(sorted(shown & set(tables))) or 'nothing'}")
    for name in sorted(set(tables) - shown):
        print(f"not on the page: {name}; its marker is <!-- table: {name} -->")


if __name__ == "__main__":
    use_environment()
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
