#!/usr/bin/env python3
"""A picture of the tokens of one episode: the end of its prompt, and which of the others were sampled and which given.

The episode is one of a run's completions. Without --row it is the first with two turns, a call and the highest reward.

example:
  scripts/study/episode_tokens.py runs/calculator --out docs/episode.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from transformers import PreTrainedTokenizerBase

from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.config import load_config
from rankup.grpo.data.renderer import PromptRenderer
from rankup.grpo.data.tokenizers import load_tokenizer
from rankup.grpo.episodes.actions import Actions
from rankup.grpo.run.completions import read_completions
from rankup.grpo.run.plots import FAINT_INK, INK, STYLE

Kind = Literal["prompt", "sampled", "given"]
FILL: dict[Kind, str] = {"prompt": "#f0f2f5", "sampled": "#cfe3f5", "given": "#fbe3c4"}
EDGE: dict[Kind, str] = {"prompt": "#c4cad2", "sampled": "#0072B2", "given": "#E69F00"}
WIDTH = 78
"""Of a line, in characters."""
PAD = 0.36
"""Of the box around a token, in characters, both sides together."""
GAP = 0.3
"""Between two boxes."""
LEFT = 7.5
"""Of the tokens, in characters: labels are left of it."""
LINE = 2.35
"""From line to line, in units of a character's width."""
BOX = 1.75
"""Height of a token."""
SPACES = {"\n": "\N{DOWNWARDS ARROW WITH TIP LEFTWARDS}", " ": "\N{MIDDLE DOT}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token as it is shown. `part`: the number of its turn, prompt or result."""

    text: str
    kind: Kind
    part: int


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with tools or an environment")
    parser.add_argument("--step", type=int, help="of the completions file (default: the newest)")
    parser.add_argument("--row", type=int, help="of the file")
    parser.add_argument("--out", type=Path, default=Path("episode.png"))
    options = parser.parse_args()
    row = _row(options.run, options.step, options.row)
    draw(tokens_of(options.run, row), options.out)
    print(f"wrote {options.out}: {row['prompt'][-60:]!r}, reward {row['reward']}")


def _row(run: Path, step: int | None, place: int | None) -> dict[str, Any]:
    files = sorted((run / "completions").glob("*.parquet" if step is None else f"step_{step:06d}.parquet"))
    if not files:
        raise SystemExit(f"{run} has no completions of this step")
    rows = read_completions(files[-1])
    if place is not None:
        return rows[place]
    of_two_turns = [row for row in rows if len(row["episode"]["sampled_spans"]) == 2 and row["episode"]["tool_calls"]]
    if not of_two_turns:
        raise SystemExit(f"{files[-1]} has no episode of two turns: choose one with --row")
    return max(of_two_turns, key=lambda row: row["reward"])


def tokens_of(run: Path, row: dict[str, Any]) -> list[Token]:
    """The tokens of the prompt's last message, and all that follow."""
    config = load_config(run / "config.yaml")
    tokenizer = load_tokenizer(config, resolve_model(config.model.name))
    actions = Actions.load(config)
    schemas = [] if actions is None else actions.schemas(row["data"])
    prompt = PromptRenderer(tokenizer, config.data).token_ids(json.loads(row["prompt"]), schemas)
    starts = [place for place, token in enumerate(prompt) if token in tokenizer.all_special_ids]
    last_message = prompt[starts[-3] if len(starts) > 2 else 0 :]
    kinds: list[Kind] = ["given"] * len(row["completion_ids"])
    for start, end in row["episode"]["sampled_spans"]:
        kinds[start:end] = ["sampled"] * (end - start)
    parts = [0]
    for before, kind in zip([None, *kinds], kinds, strict=False):
        parts.append(parts[-1] + (before != kind))
    of_prompt = [Token(text=_shown(tokenizer, token), kind="prompt", part=0) for token in last_message]
    behind = zip(row["completion_ids"], kinds, parts[1:], strict=True)
    return of_prompt + [Token(text=_shown(tokenizer, token), kind=kind, part=part) for token, kind, part in behind]


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token with visible white space."""
    text: Any = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text.translate(str.maketrans(SPACES))


def draw(tokens: Sequence[Token], out: Path) -> None:
    """Draw the tokens as boxes in lines, a new one for each part."""
    lines = list(_lines(tokens))
    height = len(lines) * LINE + 4.2
    with rc_context({**STYLE, "font.family": ["DejaVu Sans"]}):
        figure = Figure(figsize=(10, 10 * height / WIDTH), dpi=160)  # no pyplot: no display
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(height, 0)
        axes.axis("off")
        _draw_legend(axes, tokens)
        part = -1
        for number, line in enumerate(lines):
            y = 3.9 + number * LINE
            if line[0].part != part:
                part = line[0].part
                axes.text(LEFT - 1, y + BOX / 2, _label(tokens, part), ha="right", va="center", fontsize=10.5, color=INK)
            x = LEFT
            for token in line:
                _draw_box(axes, x, y, token.text, token.kind)
                x += len(token.text) + PAD + GAP
        figure.savefig(out, facecolor="white")


def _lines(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens in lines that are no longer than the picture is wide; a part begins a new one."""
    line: list[Token] = []
    x = 0.0
    for token in tokens:
        width = len(token.text) + PAD + GAP
        if line and (token.part != line[-1].part or LEFT + x + width > WIDTH - 1):
            yield line
            line, x = [], 0.0
        line.append(token)
        x += width
    yield line


def _label(tokens: Sequence[Token], part: int) -> str:
    """What a part is; turns are counted."""
    kind = next(token.kind for token in tokens if token.part == part)
    turns = {token.part for token in tokens if token.kind == "sampled" and token.part <= part}
    return f"turn {len(turns)}" if kind == "sampled" else "result" if kind == "given" else "prompt"


def _draw_legend(axes: Axes, tokens: Sequence[Token]) -> None:
    counts = {kind: sum(token.kind == kind for token in tokens) for kind in FILL}
    meanings: dict[Kind, str] = {
        "prompt": "end of the prompt",
        "sampled": f"sampled: {counts['sampled']} tokens, the targets of the loss",
        "given": f"given: {counts['given']} tokens, inputs only",
    }
    x = LEFT
    for kind, meaning in meanings.items():
        _draw_box(axes, x, 1.0, "  ", kind)
        axes.text(x + 3, 1.0 + BOX / 2, meaning, va="center", fontsize=10.5, color=INK)
        x += 5 + 0.58 * len(meaning)


def _draw_box(axes: Axes, x: float, y: float, text: str, kind: Kind) -> None:
    width = len(text) + PAD
    shape = "round,pad=0,rounding_size=0.3"
    box = FancyBboxPatch((x, y), width, BOX, boxstyle=shape, facecolor=FILL[kind], edgecolor=EDGE[kind], linewidth=0.8)
    axes.add_patch(box)
    font = {"fontsize": 720 / WIDTH / 0.602 * 0.92, "family": "DejaVu Sans Mono"}
    for place, character in enumerate(text):  # each in a place of its own, so that the width is exact
        colour = FAINT_INK if character in SPACES.values() else INK
        axes.text(x + PAD / 2 + place + 0.5, y + 0.7 * BOX, character, ha="center", va="baseline", color=colour, **font)


if __name__ == "__main__":
    main()
