"""The page: template, style and scripts, put together into one HTML file that loads nothing.

    html = render_page("quickstart", compress(index), parts)
    html = render_page("quickstart", compress(index), {}, live=True)    # parts are fetched from the server of `--serve`

Data is gzip in base64, which holds no markup, whatever a model wrote. The policy of the page (Content-Security-Policy) allows
the scripts and the style of this file by their hashes, and nothing else: no request, no attribute that runs code.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

HERE = Path(__file__).parent
VENDOR = HERE.parent / "vendor"
SCRIPTS = (
    *("dom", "format", "data", "runs", "chart", "curves", "text", "filters", "completions", "prompts", "configuration"),
    *("keyboard", "live", "main"),
)
STYLES = ("base.css", "curves.css", "completions.css")


def render_page(title: str, index: bytes, parts: Mapping[str, bytes], *, live: bool = False) -> str:
    """The page. `index` and `parts` are gzip; `live`: it asks the server that it came from for what is new."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    style = "\n".join([(VENDOR / "uPlot.min.css").read_text(), *((HERE / name).read_text() for name in STYLES)])
    plots = (VENDOR / "uPlot.iife.min.js").read_text()
    own = "\n".join((HERE / f"{name}.js").read_text() for name in SCRIPTS)
    page = f'(() => {{\n"use strict";\n{own}\n}})();'
    scripts = [_without_end(script, "script") for script in (plots, page)]
    return template.from_string((HERE / "page.html.jinja").read_text()).render(
        title=title,
        policy=_policy(scripts, style, live=live),
        style=Markup(_without_end(style, "style")),
        scripts=[Markup(script) for script in scripts],
        index=base64.b64encode(index).decode(),
        parts={name: base64.b64encode(part).decode() for name, part in parts.items()},
        live=live,
    )


def _policy(scripts: list[str], style: str, *, live: bool) -> str:
    hashes = " ".join(map(_hash, scripts))
    connect = "; connect-src 'self'" if live else ""
    return f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; img-src data:; base-uri 'none'{connect}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _without_end(text: str, tag: str) -> str:
    assert f"</{tag}" not in text.lower(), f"a {tag} of the page would end early"
    return text
