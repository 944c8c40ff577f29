"""What the pages of the documentation contain."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block of a Markdown page."""
    pattern = re.compile(r"^ *```([\w-]*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    return [(match[1].lower(), match[2]) for match in pattern.finditer(text)]
