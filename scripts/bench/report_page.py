#!/usr/bin/env python3
"""The page of `rankup report` for long runs: its size, what it keeps, how long it takes to write and to open.

Made-up runs of 130 steps with 128 completions each, all saved, of about 25 and of about 200 tokens, with the tokenizer of the
embedded model. Opening is measured in headless Chromium, if it and selenium are installed: from the start of the navigation
until the curves are drawn, and until the completions of a step are shown.

examples:
  scripts/bench/report_page.py                       a few minutes
  scripts/bench/report_page.py --json report_page.json
  scripts/bench/report_page.py --repeats 1           opens each page once
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, Result, command_line, markdown, run, summarise

STEPS, PROMPTS, COMPLETIONS = 130, 16, 8
WORDS = {"short": 22, "long": 190}


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    run(command_line(__doc__, repeats=5, what="times that each page is opened").parse_args(), measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Size, what is kept, seconds to write, and milliseconds to open of each page."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from report_runs import MadeRun

    from rankup.grpo.cli.report.report import write_report
    from rankup.grpo.cli.report.runs import RunFolder
    from rankup.grpo.common.model_files import resolve_model

    tokenizer = Path(resolve_model("smollm2-135m-instruct"))
    sides = {}
    with tempfile.TemporaryDirectory() as temporary:
        for side, words in WORDS.items():
            made = MadeRun(Path(temporary) / side, tokenizer=tokenizer, groups=PROMPTS, completions=COMPLETIONS, words=words)
            made.play(STEPS)
            made.finish()
            page = Path(temporary) / f"{side}.html"
            started = time.perf_counter()
            size, lines = write_report([RunFolder(made.folder)], page, max_bytes=10_000_000)
            written = time.perf_counter() - started
            sides[side] = {"bytes": size, "kept": lines[0], "seconds_to_write": written, **_open(page, options.repeats)}
    return {"sides": sides}


def _open(page: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds until the curves, and until completions are shown; empty without a browser."""
    if importlib.util.find_spec("selenium") is None or shutil.which("chromium") is None:
        return {}
    sys.path.insert(0, str(ROOT / "scripts"))
    from pictures import browser
    from selenium.webdriver.support.wait import WebDriverWait

    milliseconds: dict[str, list[float]] = {"curves": [], "completions": []}
    with browser("1280x900") as driver:
        for _ in range(repeats):
            for view in milliseconds:
                driver.get("about:blank")
                driver.get(f"{page.as_uri()}#{view}")
                shown = "document.documentElement.dataset.ready" if view == "curves" else "document.querySelector('.card')"
                WebDriverWait(driver, 120, 0.01).until(lambda driver, shown=shown: driver.execute_script(f"return {shown}"))
                now = "performance.getEntriesByName('ready')[0].startTime" if view == "curves" else "performance.now()"
                milliseconds[view].append(driver.execute_script(f"return {now}"))
    return {view: summarise(values) for view, values in milliseconds.items()}


def report(result: Result) -> str:
    """A row for each page."""
    rows = [
        [
            side,
            f"{figures['bytes'] / 1e6:.1f} MB",
            figures["kept"].partition(", ")[2],
            f"{figures['seconds_to_write']:.1f} s",
            *(f"{figures[view]['median']:.0f} ms" if view in figures else "–" for view in ("curves", "completions")),
        ]
        for side, figures in result["sides"].items()
    ]
    return markdown(["completions", "size", "kept", "written in", "curves after", "completions after"], rows, left=1)


if __name__ == "__main__":
    main()
