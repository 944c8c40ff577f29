"""Pictures for the documentation: of a page, and of a terminal."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_runs import MadeRun
from tiny_models import tiny_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pictures.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromedriver") or not shutil.which("tmux"), reason="needs chromium and tmux"),
]


def size_and_colours(picture: Path) -> tuple[tuple[int, int], set[Any]]:
    from PIL import Image

    with Image.open(picture) as image:
        rgb = image.convert("RGB")
        return rgb.size, {colour for _, colour in rgb.getcolors(maxcolors=2**24) or ()}


def draw(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, SCRIPT, *arguments], check=True, capture_output=True, timeout=240)


def test_a_page_is_drawn_light_and_dark_and_narrow(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    made = MadeRun(tmp_path / "run", tokenizer=tmp_path / "tokenizer")
    made.play(2)
    made.finish()
    brightest = {}
    for name, *options in (("light", "--size", "500x400"), ("dark", "--dark", "--size", "400x400", "--view", "completions")):
        picture = tmp_path / f"{name}.png"
        draw("page", made.folder, picture, *options)
        size, colours = size_and_colours(picture)
        assert size == (500 if name == "light" else 400, 400) and len(colours) > 20
        brightest[name] = colours
    assert (255, 255, 255) in brightest["light"] and (255, 255, 255) not in brightest["dark"]


def test_a_terminal_is_drawn_with_its_colours_after_the_command(tmp_path: Path) -> None:
    picture = tmp_path / "terminal.png"
    draw("terminal", picture, "--size", "60x10", "--", "printf", r"\033[38;2;255;0;0mlines of red <b>\033[0m\n")
    (width, height), colours = size_and_colours(picture)
    assert 100 < width < 700 and 30 < height < 200 and (255, 0, 0) in colours
