"""The tables and pictures of the performance page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]
MACHINE = {"cpu": "Test CPU", "cores": 2}


def summary(median: float) -> dict[str, Any]:
    return {"median": median, "min": median * 0.9, "max": median * 1.1, "all": [median]}


def train_step_figure() -> dict[str, Any]:
    seconds = {"rankup": summary(0.5), "stock": summary(2.0), "autocast": summary(1.25)}
    case = {
        "speedup": 4.0,
        "memory_ratio": 0.25,
        "speedup_over_autocast": 2.5,
        "seconds": seconds,
        "peak_bytes": {"rankup": 2**30, "stock": 2**32, "autocast": 2**31},
        "tokens": {"rankup": 1136, "stock": 2048, "autocast": 2048},
    }
    return {"cases": {"64+64": case, "256+64": case}, "machine": MACHINE}


def rank_figure() -> dict[str, Any]:
    ranks = {str(r): {"seconds": summary(0.4 + r / 160), "operations": {"total": 10**11 + r * 10**9}} for r in (32, 64, 128)}
    case = {"ranks": ranks, "tokens": 1136, "64_to_128": {"time_ratio": 1.5, "operations_ratio": 1.39}}
    return {"cases": {"64+64": case}, "machine": MACHINE}


def vs_trl_figure() -> dict[str, Any]:
    phases = {"rollout": summary(2.5), "train": summary(1.5)} | dict.fromkeys(("reward", "publish", "other"), summary(0.0))
    return {
        "speedup": 3.0,
        "step_seconds": {"rankup": summary(4.0), "trl": summary(12.0)},
        "trl_tuned": {"speedup": 2.5, "step_seconds": summary(10.0)},
        "phases": dict.fromkeys(("rankup", "trl", "trl_tuned"), phases),
        "machine": MACHINE,
    }


def rollout_figure() -> dict[str, Any]:
    rates = {"rankup": summary(800.0), "base": summary(750.0), "stock": summary(13.5)}
    ratios = {"ratio_to_base": 1.07, "ratio_to_stock": 59.3}
    return {"tokens_per_second": rates, "decoding": rates | ratios, **ratios, "machine": MACHINE}


def profile_figure() -> dict[str, Any]:
    names = "adapter products,head products,attention,head elementwise,other elementwise,optimizer"
    seconds = {"base products": 0.6, "python": 0.2} | dict.fromkeys(names.split(","), 0.0)
    case = {"step_seconds": summary(0.8), "seconds": seconds, "floor_seconds": 0.4}
    return {"cases": {"64+64": case}, "machine": MACHINE}


FIGURES = {
    "train_step": train_step_figure,
    "rank": rank_figure,
    "vs_trl": vs_trl_figure,
    "rollout": rollout_figure,
    "profile": profile_figure,
}


@pytest.fixture(scope="module")
def report(bench_module: Load) -> Any:
    return bench_module("report")


@pytest.fixture(scope="module")
def replace_tables(bench_module: Load) -> Any:
    return bench_module("common").replace_tables


@pytest.fixture(scope="module")
def table_of(report: Any, bench_module: Load) -> Callable[..., list[list[str]]]:
    """The cells of the table of a benchmark's result."""

    def made(name: str, figure: dict[str, Any]) -> list[list[str]]:
        table = bench_module(report.MODULES[name]).table(figure)
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]

    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the results of all benchmarks."""
    made = tmp_path / "performance"
    made.mkdir()
    for name, figure in FIGURES.items():
        (made / f"{name}.json").write_text(json.dumps(figure()))
    return made


# ------------------------------------------------------------------------------------------------------------- markers


def test_only_the_text_between_markers_is_replaced(replace_tables: Any):
    text = "Before.\n<!-- table: rank -->\nold\n\n\n<!-- end -->\nBetween.\n<!-- table: profile -->\n<!-- end -->\nAfter.\n"
    renewed = replace_tables(text, {"rank": "| r |", "profile": "| p |\n"})
    assert renewed == (
        "Before.\n<!-- table: rank -->\n| r |\n<!-- end -->\nBetween.\n<!-- table: profile -->\n| p |\n<!-- end -->\nAfter.\n"
    )
    assert replace_tables(renewed, {"rank": "| r |", "profile": "| p |"}) == renewed


def test_marker_without_a_result_keeps_its_table(replace_tables: Any):
    text = "<!-- table: rollout -->\nkept\n<!-- end -->\n"
    assert replace_tables(text, {"rank": "| r |"}, known=FIGURES) == text


def test_backslashes_in_a_table_are_not_interpreted(replace_tables: Any):
    assert r"| \1 \g<0> |" in replace_tables("<!-- table: rank -->\n<!-- end -->", {"rank": r"| \1 \g<0> |"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- table: ranks -->\n<!-- end -->", "unknown table; the tables are train_step, rank, vs_trl"),
        ("<!-- table: rank -->\nno end", "has no <!-- end -->"),
        ("<!-- table: rank -->\n<!-- table: profile -->\n<!-- end -->", "rank --> has no <!-- end -->"),
    ],
)
def test_invalid_markers_are_an_error(replace_tables: Any, text: str, problem: str):
    with pytest.raises(ValueError, match=problem):
        replace_tables(text, {"rank": "| r |"}, known=FIGURES)


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", FIGURES)
def test_every_table_is_well_formed(table_of: Any, name: str):
    rows = table_of(name, FIGURES[name]())
    assert len(rows) > 2
    assert len({len(row) for row in rows}) == 1
    assert set(rows[1]) <= {"---", "---:"}


def test_train_step_table_shows_the_figures(table_of: Any):
    rows = table_of("train_step", train_step_figure())
    assert rows[2] == ["64+64", "rankup", "**0.50** (0.45 to 0.55)", "", "1,024", "", "1,136"]
    assert rows[3] == ["", "PEFT, full logits", "**2.00** (1.80 to 2.20)", "4.00 ×", "4,096", "0.25", "2,048"]
    assert rows[4][1:] == ["under bf16 autocast", "**1.25** (1.12 to 1.38)", "2.50 ×", "2,048", "0.50", "2,048"]


def test_rank_table_relates_to_rank_64_and_ends_with_the_growth(table_of: Any):
    rows = table_of("rank", rank_figure())
    assert rows[3] == ["64", "0.800 (× 1.00)", "164 G (× 1.00)"]
    assert rows[4] == ["128", "1.200 (× 1.50)", "228 G (× 1.39)"]
    assert rows[5] == ["64 to 128", "**× 1.50**", "× 1.39"]


def test_phases_of_a_step_are_shown(table_of: Any):
    rows = table_of("vs_trl", vs_trl_figure())
    assert rows[0][3:] == ["rollout", "reward", "training", "weights to vLLM", "other"]
    assert rows[4] == ["TRL, tuned", "**10.00** (9.00 to 11.00)", "2.50 ×", "2.50", "0.00", "1.50", "0.00", "0.00"]


# ------------------------------------------------------------------------------------------------------- the command


def test_page_and_pictures_come_from_the_files(report: Any, folder: Path):
    page = folder.with_suffix(".md")
    page.write_text("".join(f"## {name}\n\n<!-- table: {name} -->\n<!-- end -->\n\n" for name in FIGURES))
    with pytest.raises(SystemExit, match="and the files differ"):
        report.main([str(folder), "--check"])
    report.main([str(folder)])
    report.main([str(folder), "--check"])
    assert "**0.50** (0.45 to 0.55)" in page.read_text()
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_check_changes_nothing(report: Any, folder: Path):
    page = folder.with_suffix(".md")
    page.write_text("<!-- table: rank -->\nold\n<!-- end -->\n")
    with pytest.raises(SystemExit):
        report.main([str(folder), "--check"])
    assert page.read_text() == "<!-- table: rank -->\nold\n<!-- end -->\n"
    assert not list(folder.glob("*.png"))


def test_without_a_page_the_tables_go_to_the_terminal(report: Any, folder: Path, capsys: pytest.CaptureFixture[str]):
    report.main([str(folder), "--no-plots"])
    assert "| rank | 64+64: seconds | operations |" in capsys.readouterr().out
    assert not list(folder.glob("*.png"))


def test_a_folder_without_results_is_an_error(report: Any, tmp_path: Path):
    with pytest.raises(SystemExit, match="run a benchmark first"):
        report.main([str(tmp_path)])
