"""Everything that a page shows, in the form that the page reads: one index, and one part for the completions of each step.

    index, parts = report_data([RunFolder(Path("runs/quickstart"))], limit=9_000_000)
    index["runs"][0]["steps"]       # [{"step": 10, "groups": 16, "kept": 16, ...}, ...]
    parts["0-10"]                   # gzip: what `pack_step` returns

If all completions take more than `limit` bytes, the first, the last and some steps in between keep all of theirs, the others
some groups, or none; the index says how many.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.log import logger
from .completions import pack_step, spread
from .runs import RunFolder, columns_of, names_of
from .tokens import TokenTexts

FULL_SHARE = 0.6
"""Of the space, for steps that keep all completions."""
PROBES = 4
"""Steps that are packed to see how much smaller a packed step is than its file."""

SCALES = (1.0, 0.85, 0.7, 0.5, 0.25, 0.0)
"""Of the limit, tried one after the other: an estimate may be too low."""


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The completions of a step as a part of the page, and what the index says of them."""

    entry: dict[str, Any]
    part: bytes


@dataclass(slots=True)
class PackedRun:
    """One run and the texts of its tokens; `texts` is the reason if there are none."""

    run: RunFolder
    name: str
    texts: TokenTexts | str

    def pack(self, path: Path, share: float = 1.0) -> PackedStep | None:
        """A step, or this share of its groups; None for a file that vanished or is no completions file."""
        try:
            packed = pack_step(path, None if isinstance(self.texts, str) else self.texts, share=share)
        except FileNotFoundError:
            return None
        except ValueError as error:  # written by something else, or damaged
            logger.warning(f"left out {path}: {error}")
            return None
        groups, completions = packed["of"]
        keys = [group["key"] for group in packed["groups"]]
        entry = {"groups": groups, "completions": completions, "kept": len(packed["reward"]), "keys": keys}
        return PackedStep(entry, compress(packed))


def report_data(runs: Sequence[RunFolder], *, limit: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The index of the page, and its parts by run and step. `limit`: bytes of all of it, in base64.

    Raises:
        ValueError: a line of the metrics is no JSON, or the index alone exceeds the limit.
    """
    packed_runs = open_runs(runs)
    for one in packed_runs:
        one.run.read_rows()
    columns = [columns_of(one.run.rows) for one in packed_runs]
    bare = len(compress([describe(one, of_run, []) for one, of_run in zip(packed_runs, columns, strict=True)]))
    if in_base64(bare) > limit:
        raise ValueError(f"the metrics and configurations alone take {in_base64(bare) / 1e6:.1f} MB: raise --max-mb")
    room = limit * 3 // 4 - bare
    sizes = [sum(_size(path) for path in one.run.completions_files().values()) for one in packed_runs]
    parts: dict[str, bytes] = {}
    described = []
    for number, one in enumerate(packed_runs):
        steps, of_run = pack_run(one, limit=room * sizes[number] // max(1, sum(sizes)))
        parts |= {f"{number}-{step}": part for step, part in of_run.items()}
        described.append(describe(one, columns[number], steps))
    return {"runs": described}, parts


def in_base64(size: int) -> int:
    """Characters of so many bytes."""
    return (size + 2) // 3 * 4


def open_runs(runs: Sequence[RunFolder]) -> list[PackedRun]:
    """Names and tokenizers of the runs."""
    names = names_of([run.folder for run in runs])
    return [PackedRun(run, name, TokenTexts.of(run.config, run.folder)) for run, name in zip(runs, names, strict=True)]


def describe(one: PackedRun, columns: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run in the index."""
    return {
        "name": one.name,
        "headline": one.run.headline(),
        "facts": one.run.facts(),
        "options": one.run.options(),
        "no_tokens": one.texts if isinstance(one.texts, str) else None,
        "metrics": columns,
        "steps": steps,
    }


def pack_run(one: PackedRun, *, limit: int) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The steps of a run in the index, and their parts, which take at most `limit` bytes together."""
    files = one.run.completions_files()
    whole = {step: one.pack(files[step]) for step in _some(list(files), PROBES)}
    ratios = [len(packed.part) / _size(files[step]) for step, packed in whole.items() if packed and _size(files[step])]
    estimates = [max(ratios, default=1.0) * _size(path) for path in files.values()]
    found: dict[int, PackedStep] = {}
    for scale in SCALES:
        found.clear()
        for step, share in zip(files, shares_of(estimates, scale * limit), strict=True):
            packed = whole[step] if share == 1.0 and step in whole else one.pack(files[step], share)
            if share == 1.0:
                whole[step] = packed
            if packed is not None:
                found[step] = packed
        if sum(len(packed.part) for packed in found.values() if packed.entry["kept"]) <= limit:
            break
    steps = [{"step": step, **packed.entry} for step, packed in found.items()]
    return steps, {step: packed.part for step, packed in found.items() if packed.entry["kept"]}


def shares_of(sizes: Sequence[float], limit: float) -> list[float]:
    """The share of each step's groups to keep, so that together they take `limit`.

    All of them if they fit. Otherwise as many steps as fit into 60 % of the space keep all, evenly spread, among them the first
    and the last; the others get what is left.
    """
    if sum(sizes) <= limit:
        return [1.0] * len(sizes)
    full: list[int] = []
    for count in range(1, len(sizes)):
        places = spread(len(sizes), count)
        if sum(sizes[place] for place in places) > FULL_SHARE * limit:
            break
        full = places
    used = sum(sizes[place] for place in full)
    rest = max(1e-9, sum(sizes) - used)
    share = min(0.999, max(0.0, (limit - used) / rest))
    return [1.0 if place in full else share for place in range(len(sizes))]


def compress(value: Any) -> bytes:
    """JSON in gzip, the same bytes for the same value. Half of a surrogate pair is no UTF-8; the page replaces it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=9, mtime=0)


def _some(steps: Sequence[int], count: int) -> list[int]:
    return [steps[place] for place in spread(len(steps), count)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
