"""The command `rankup compare`: two evaluations prompt by prompt, with the interval of their difference.

    rankup compare runs/a runs/b                                        # the last evaluation of each run
    rankup compare runs/a/checkpoints/step_000050 runs/a                # a checkpoint and the end of a run
    rankup compare base.json runs/a/evaluations/step_000080.json --all  # results of `rankup eval`, and of a run
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

from ...common.exact_json import strict
from ...common.files import atomic_write
from ...display.view_text import decimal, one_line, shorten
from ...run.evaluation_files import EVALUATIONS, PromptResult, own_files, own_name, read_evaluation
from ...run.run_folder import CHECKPOINTS
from ..command import add_command
from .comparison import Comparison, Difference, Pair, answers_of, compare
from .table import aligned

EXAMPLES = """examples:
  rankup compare runs/a runs/b                                  the last evaluation of each run
  rankup compare runs/a/checkpoints/step_000050 runs/a          a checkpoint and the end of the run
  rankup compare base.json tuned.json --all                     results of `rankup eval --output`, all prompts that differ
  rankup compare runs/a runs/b --json difference.json
"""

SHOWN = 5
"""Prompts of each kind that are shown without `--all`."""


def add_compare_command(commands: Any) -> None:
    """Add `compare` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "two evaluations prompt by prompt, with the interval of their difference"
    parser = add_command(commands, "compare", text, examples=EXAMPLES, run=compare_evaluations)
    what = "a run folder, a checkpoint in it, or a JSON file with results"
    parser.add_argument("first", type=Path, metavar="A", help=what)
    parser.add_argument("second", type=Path, metavar="B", help=what)
    parser.add_argument("--all", action="store_true", help="show all prompts that were won or lost")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison to this file")


def compare_evaluations(options: argparse.Namespace) -> int:
    """`rankup compare A B [--all] [--json FILE]`"""
    files = [find_results(path) for path in (options.first, options.second)]
    comparison = compare(*(read_evaluation(file) for file in files))
    print(comparison_text(files, comparison, most=None if options.all else SHOWN))
    if options.json is not None:
        values = strict(_as_json(files, comparison))
        atomic_write(options.json, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
        print(f"wrote {options.json}")
    return 0


def find_results(path: Path) -> Path:
    """The file with the results of a run (its own last evaluation, else the newest of `rankup eval`), of a checkpoint, or the
    file itself.

    Raises:
        ValueError: there are none.
    """
    path = Path(expanduser(path))
    if not path.is_dir():
        return path  # reading says what is wrong with it
    resolved = path.resolve()
    if resolved.parent.name == CHECKPOINTS:
        folder, step = resolved.parents[1], resolved.name
        own = folder / EVALUATIONS / own_name(int(step.removeprefix("step_")), "during")
        found = [own] if own.is_file() else _newest(folder, f"eval_{step}_*.json")
    else:
        found = own_files(path)[-1:] or _newest(path, "eval_*.json")
    if not found:
        raise ValueError(f"{path} has no results of an evaluation: rankup eval {path} makes some")
    return found[0]


def _newest(run: Path, pattern: str) -> list[Path]:
    return sorted((run / EVALUATIONS).glob(pattern), key=lambda file: file.stat().st_mtime)[-1:]


# ---------------------------------------------------------------------------------------------------------------- text


def comparison_text(files: Sequence[Path], comparison: Comparison, *, most: int | None) -> str:
    """What `rankup compare` prints. `most`: prompts of each kind; None: all."""
    won, lost, equal = (len(pairs) for pairs in (comparison.won, comparison.lost, comparison.equal))
    paired = won + lost + equal + comparison.without_reward
    lines = [f"A: {files[0]}", f"B: {files[1]}", f"{paired} prompts in both{_unpaired(comparison)}"]
    if comparison.settings:
        lines.append(f"settings that differ: {'; '.join(_setting(name, both) for name, both in comparison.settings.items())}")
    if not comparison.all:
        return "\n".join([*lines, "there is nothing to compare"])
    lines += aligned([["", "A", "B", "B - A, 95 % interval"], *_rows(comparison)])
    lines.append(f"B against A: won {won}, lost {lost}, equal {equal}")
    for what, pairs in (("won", comparison.won), ("lost", comparison.lost)):
        shown = pairs if most is None else pairs[:most]
        if shown:
            more = f", the first {len(shown)} of {len(pairs)} (--all shows all)" if len(shown) < len(pairs) else ""
            lines += [f"{what}{more}:", *(line for pair in shown for line in _pair_lines(pair))]
    return "\n".join(lines)


def _unpaired(comparison: Comparison) -> str:
    texts = [
        f"{comparison.only_first} only in A" if comparison.only_first else "",
        f"{comparison.only_second} only in B" if comparison.only_second else "",
        f"{comparison.without_reward} without a reward in one of them" if comparison.without_reward else "",
    ]
    return "".join(f", {text}" for text in texts if text)


def _setting(name: str, both: tuple[Any, Any]) -> str:
    return f"{name} " + ", ".join(shorten(json.dumps(value, ensure_ascii=False), 60) for value in both)


def _rows(comparison: Comparison) -> list[list[str]]:
    of_each: dict[str, Mapping[str, Difference]] = {"": comparison.all, **comparison.sets}
    return [
        [f"{set_name} {name}".strip(), decimal(one.first, 3), decimal(one.second, 3), _difference_text(one)]
        for set_name, differences in of_each.items()
        for name, one in differences.items()
    ]


def _difference_text(one: Difference) -> str:
    mean, low, high = one.difference.mean, one.difference.low, one.difference.high
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _pair_lines(pair: Pair) -> list[str]:
    of_set = f"{pair.first.eval_set}: " if pair.first.eval_set else ""
    lines = [f"  {of_set}{shorten(one_line(pair.first.prompt), 110)}"]
    for name, result in (("A", pair.first), ("B", pair.second)):
        known = [reward for reward in result.rewards if reward is not None]
        lines.append(f"    {name} {decimal(sum(known) / len(known))}  {shorten(one_line(answers_of(result)), 100)}")
    return lines


def _as_json(files: Sequence[Path], comparison: Comparison) -> dict[str, Any]:
    values = {
        "first": str(files[0]),
        "second": str(files[1]),
        "only_first": comparison.only_first,
        "only_second": comparison.only_second,
        "without_reward": comparison.without_reward,
        "settings": {name: list(both) for name, both in comparison.settings.items()},
        "all": {name: dataclasses.asdict(one) for name, one in comparison.all.items()},
        "sets": {
            set_name: {name: dataclasses.asdict(one) for name, one in differences.items()}
            for set_name, differences in comparison.sets.items()
        },
        "equal": len(comparison.equal),
    }
    for name, pairs in (("won", comparison.won), ("lost", comparison.lost)):
        values[name] = [
            {
                "set": pair.first.eval_set,
                "hash": pair.first.hash,
                "prompt": pair.first.prompt,
                "first": _result(pair.first),
                "second": _result(pair.second),
            }
            for pair in pairs
        ]
    return values


def _result(result: PromptResult) -> dict[str, Any]:
    return {"rewards": result.rewards, "answers": result.answers, "texts": result.texts}
