#!/usr/bin/env python3
"""Pictures of a run for the documentation: its page in headless Chromium, and its terminal in tmux.

examples:
  scripts/pictures.py page runs/quickstart docs/report.png
  scripts/pictures.py page runs/quickstart docs/report_dark.png --dark
  scripts/pictures.py page runs/calculator completions.png --view completions --colours given --size 400x900
  scripts/pictures.py terminal docs/terminal.png -- .venv/bin/rankup train configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import io
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    "--hide-scrollbars",
)
TERMINAL_STYLE = (
    "body { margin: 0; background: #16191d } "
    "pre { margin: 0; padding: 14px 18px; display: inline-block; "
    "font: 13px/1.3 'DejaVu Sans Mono', monospace; color: #d7dae0 }"
)
NORMAL = [
    *((0, 0, 0), (224, 108, 97), (120, 190, 110), (214, 173, 90)),
    *((97, 160, 225), (190, 130, 200), (86, 182, 194), (171, 178, 191)),
]
BRIGHT = [(110, 118, 130), *NORMAL[1:7], (255, 255, 255)]
TERMINAL_THEME = TerminalTheme(background=(22, 25, 29), foreground=(215, 218, 224), normal=NORMAL, bright=BRIGHT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="page|terminal")
    page = kinds.add_parser("page", help="the page of `rankup report`")
    page.add_argument("run", type=Path, nargs="+", help="run folders, and the picture to write")
    page.add_argument("--view", default="curves", choices=["curves", "completions", "configuration"])
    page.add_argument("--colours", metavar="WORD", help="the choice of colours of tokens that has this word")
    page.add_argument("--size", default="1280x800", metavar="WIDTHxHEIGHT")
    page.add_argument("--dark", action="store_true")
    page.set_defaults(call=picture_of_page)
    terminal = kinds.add_parser("terminal", help="a command in a terminal, after its end")
    terminal.add_argument("picture", type=Path)
    terminal.add_argument("--size", default="124x32", metavar="COLUMNSxROWS")
    terminal.add_argument("command", nargs="+")
    terminal.set_defaults(call=picture_of_terminal)
    options = parser.parse_args()
    options.call(options)


def picture_of_page(options: argparse.Namespace) -> None:
    """Write the page of these runs as `rankup report` does, and what a browser shows of it."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select
    from selenium.webdriver.support.wait import WebDriverWait

    *runs, picture = options.run
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        rankup = Path(sys.executable).with_name("rankup")
        subprocess.run([rankup, "report", *runs, "--output", page], check=True)
        with browser(options.size, dark=options.dark) as driver:
            driver.get(f"{page.as_uri()}#{options.view}")
            is_drawn = "return document.documentElement.dataset.ready"
            WebDriverWait(driver, 60).until(lambda driver: driver.execute_script(is_drawn))
            if options.colours:
                choices = map(Select, driver.find_elements(By.TAG_NAME, "select"))
                texts = ((choice, option.text) for choice in choices for option in choice.options)
                choice, text = next((choice, text) for choice, text in texts if options.colours in text)
                choice.select_by_visible_text(text)
            driver.save_screenshot(str(picture))


def picture_of_terminal(options: argparse.Namespace) -> None:
    """Run the command in a terminal of this size; the picture shows the screen after it has ended."""
    columns, _, rows = options.size.partition("x")
    with tempfile.TemporaryDirectory() as folder:
        socket, ended = str(Path(folder) / "tmux"), Path(folder) / "ended"
        command = shlex.join(options.command)
        shell = f"printf '$ %s\\n' {shlex.quote(command)}; {command}; touch {ended}; sleep 60"
        tmux = ["tmux", "-S", socket, "-f", "/dev/null"]
        subprocess.run([*tmux, "new-session", "-d", "-x", columns, "-y", rows, shell], check=True)
        while not ended.exists():
            time.sleep(0.2)
        screen = subprocess.run([*tmux, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True).stdout
        subprocess.run([*tmux, "kill-server"], check=True)
        page = Path(folder) / "terminal.html"
        page.write_text(f"<meta charset=utf-8><style>{TERMINAL_STYLE}</style><pre>{_as_html(screen.rstrip())}</pre>")
        with browser("1400x1200") as driver:
            driver.get(page.as_uri())
            driver.find_element("tag name", "pre").screenshot(str(options.picture))


def _as_html(screen: str) -> str:
    """What a terminal shows, with its colours."""
    console = Console(record=True, width=1000, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(Text.from_ansi(screen), soft_wrap=True)
    return console.export_html(inline_styles=True, code_format="{code}", theme=TERMINAL_THEME)


@contextmanager
def browser(size: str, *, dark: bool = False) -> Iterator[Chrome]:
    """Chromium without a window, whose pages have this width and height in CSS pixels."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    width, height = map(int, size.split("x"))
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            # Windows have a least width; pages on a device do not.
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
