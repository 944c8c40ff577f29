#!/usr/bin/env python3
"""Summarizes the results of `scripts/gpu_check.sh` in the report.md of its folder.

The results of a step that failed or was interrupted may be missing.

examples:
  scripts/gpu_report.py gpu_check/20260101-120000-cpu     write the report again
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
TAIL = 15  # lines shown of the log of a step that failed


def main() -> None:
    """Write the report and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that gpu_check.sh created")
    folder: Path = parser.parse_args().folder
    report = folder / "report.md"
    report.write_text("\n".join([*_header(folder), *_steps(folder), *_run(folder), *_benchmarks(folder)]) + "\n")
    print(f"report: {report}")


def _header(folder: Path) -> Iterator[str]:
    """Device, versions and code paths, and the warnings and problems of `rankup doctor`."""
    yield f"# GPU check: {folder.name}"
    found = _json(folder / "doctor.json")
    if found is None:
        yield from _machine(folder)
        return
    for title in ("device", "versions", "paths"):
        yield from ("", f"## {title.capitalize()}", "", "| | | |", "|---|---|---|")
        for finding in found["sections"].get(title, []):
            yield _row(finding["name"], finding["value"], finding["note"])
    findings = [finding for section in found["sections"].values() for finding in section]
    bad = [finding for finding in findings if finding["level"] in ("warning", "problem")]
    kernels = found["sections"].get("self-test", [])
    yield from ("", f"Self-test: {sum(one['level'] == 'ok' for one in kernels)} of {len(kernels)} kernels pass.")
    for finding in bad:
        yield f"- {finding['level']}: {finding['name']}, {finding['value']}: {finding['note']}"


def _machine(folder: Path) -> Iterator[str]:
    """What the first benchmark has noted of machine and versions, for a check without `rankup doctor`."""
    results = filter(None, (_json(path) for path in sorted((folder / "bench").glob("*.json"))))
    first: dict[str, Any] = next(results, {"machine": {}, "versions": {}})
    for title in ("machine", "versions"):
        yield from ("", f"## {title.capitalize()}", "", "| | |", "|---|---|")
        for name, value in first[title].items():
            if isinstance(value, dict):
                yield from (_row(f"{name}, {part}", one) for part, one in value.items())
            else:
                yield _row(name, value)


def _steps(folder: Path) -> Iterator[str]:
    yield from ("", "## Steps", "", "| step | | seconds | log |", "|---|---|---|---|")
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    for name, word, seconds, _ in steps:
        yield _row(name, word, seconds, f"[logs/{name}.log](logs/{name}.log)")
    for name, word, _, command in steps:
        if word != "ok":
            tail = (folder / "logs" / f"{name}.log").read_text(errors="replace").splitlines()[-TAIL:]
            yield from ("", f"`{command}` {word}. Its log ends with:", "", "```", *tail, "```")


def _run(folder: Path) -> Iterator[str]:
    """Reward and speed of the run at each step."""
    metrics = folder / "run" / "metrics.jsonl"
    if not metrics.is_file():
        return
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    yield from ("", "## Run", "")
    if (folder / "run" / "learning_curve.png").is_file():
        yield from ("![Learning curve](run/learning_curve.png)", "")
    columns = {
        "reward": "reward",
        "loss": "loss",
        "gradient": "grad_norm",
        "rollout, tokens/s": "tokens_per_second/rollout",
        "training, tokens/s": "tokens_per_second/train",
        "rollout, s": "time/rollout",
        "training, s": "time/train",
    }
    present = {label: name for label, name in columns.items() if any(name in line for line in lines)}
    yield _row("step", *present)
    yield "|---" * (len(present) + 1) + "|"
    for line in lines:
        if "reward" in line:  # not an evaluation
            yield _row(line.get("step", ""), *(_number(line.get(name)) for name in present.values()))
    yield ""
    for line in (line for line in lines if "eval_reward" in line):
        yield f"- evaluation after step {line.get('step')}: reward {_number(line['eval_reward'])}"


def _benchmarks(folder: Path) -> Iterator[str]:
    """What the benchmarks print: a table, and lines below it. `learner-8b.json` is of `learner.py`."""
    for path in sorted((folder / "bench").glob("*.json")):
        report = import_module(path.stem.partition("-")[0]).report(json.loads(path.read_text()))
        yield from ("", f"## Benchmark {path.stem}", "", f"All results: [bench/{path.name}](bench/{path.name})", "", report)


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _json(path: Path) -> dict[str, Any] | None:
    """The file's content; None if it is missing or empty because its step failed."""
    text = path.read_text() if path.is_file() else ""
    return json.loads(text) if text.strip() else None


if __name__ == "__main__":
    main()
