"""Splits of a source, and parts of them as `datasets` writes them: `train[:100]`, `train[10%:20%]`, `train+validation`.

    splits = Splits("rows.jsonl", names=("train",), load=lambda name: rows)
    splits.select("train[:100]")                # the first 100 rows
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

Part = datasets.Dataset | Sequence[Any]
"""Rows of a split that were not taken from a stream."""


@dataclass(frozen=True, slots=True)
class Splits:
    """The splits of a source.

    Attributes:
        source: its name in error messages.
        names: of the splits that exist. None: the source takes any name.
        load: the rows of a split.
        is_one: they are names of one and the same split.
    """

    source: str
    names: tuple[str, ...] | None
    load: Callable[[str], Part]
    is_one: bool = False

    def select(self, spec: str) -> list[Part]:
        """The parts that `spec` names, in its order.

        Raises:
            ValueError: a split that does not exist, or a specification that `datasets` does not understand.
        """
        if self.names is None and not is_partial(spec):
            return [self.load(spec)]
        if self.names is not None and spec in self.names:
            return [self.load(spec)]
        if self.names is not None and spec == "all" and not self.is_one:
            return [self.load(name) for name in self.names]
        parts = {name: self.load(name) for name in self._named(spec)}
        try:
            instructions = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(parts[name]) for name in parts})
        except (AssertionError, ValueError) as error:
            raise ValueError(f"the split {spec!r} of {self.source}: {error}") from error
        return [_slice(parts[one.splitname], one.from_, one.to) for one in instructions]

    def _named(self, spec: str) -> list[str]:
        """The names in a specification. Raises ValueError for one that does not exist."""
        names = list(dict.fromkeys(re.split(r"[\[(]", part, maxsplit=1)[0].strip() for part in spec.split("+")))
        for name in names:
            if self.names is not None and name not in self.names:
                what = "it is one split, called train or test" if self.is_one else f"splits: {', '.join(self.names)}"
                raise ValueError(f"{self.source} has no split {name!r} ({what})")
        if self.is_one and len(names) > 1:
            raise ValueError(f"{self.source} is one split, called train or test: {spec!r} would repeat its rows")
        return names


def one_split(source: str, load: Callable[[], Part]) -> Splits:
    """Those of a source without named splits: it is one, called `train` or `test`, the defaults of the options."""
    return Splits(source, ("train", "test"), lambda name: load(), is_one=True)


def is_partial(spec: str) -> bool:
    """Whether a specification is more than the name of a split."""
    return "[" in spec or "+" in spec


def _slice(part: Part, start: int, stop: int) -> Part:
    return part.select(range(start, stop)) if isinstance(part, datasets.Dataset) else part[start:stop]
