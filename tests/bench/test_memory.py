"""The memory bench: the bytes that its instrument counts, equal for fake and real tensors, and the planner against them."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.memory.step_memory import PeakMemory, fake_tensors, flash_workspace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "performance" / "memory.json"
Load = Callable[[str], ModuleType]
KIB = 1024
SMALL = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2, heads of their own keys": {"model_type": "qwen2", "num_key_value_heads": 8},
    "qwen3, wide heads": {"model_type": "qwen3", "head_dim": 128},
}
SMALL_PEAKS = {"rankup": 599_736_656, "trl": 529_941_992, "peft": 2_544_772_584}
"""Bytes of one step of `SMALL`, checkpointed, of one prompt with 256 tokens and 8 completions with 768."""
GROUPS = [(32, 96, 8), (256, 768, 8), (1024, 64, 16)]  # the last one's peak is in the backward of attention


@pytest.fixture(scope="module")
def sides(bench_module: Load) -> Any:
    return bench_module("memory_sides")


@pytest.fixture(scope="module")
def memory(bench_module: Load) -> Any:
    return bench_module("memory")


@pytest.fixture(scope="module")
def report(bench_module: Load) -> Any:
    return bench_module("memory_report")


@pytest.fixture(scope="module")
def cells(memory: Any) -> list[Any]:
    return [memory.Cell(**row) for row in json.loads(FIGURES.read_text())["cells"]]


# ---------------------------------------------------------------------------------------------------------- instrument


def test_a_storage_counts_once_and_until_nothing_refers_to_it():
    with PeakMemory() as counted:
        a = torch.ones(256)
        assert counted.now == KIB
        view, same = a[:8].reshape(2, 4), a.mul_(2)
        assert counted.now == KIB and same is a
        b = (a + 1) * 2  # a + 1 lives until the product exists
        assert (counted.now, counted.peak) == (2 * KIB, 3 * KIB)
        counted.begin()
        del a, same
        assert counted.now == 2 * KIB, "the view keeps it"
        del view, b
        assert (counted.now, counted.peak) == (0, 2 * KIB)


def test_saved_tensors_gradients_and_optimizer_state_count():
    """y = (x w)^2: x w is kept, 1 KiB; its gradient is added, that of w, 4 bytes, and AdamW's three numbers."""
    with PeakMemory() as counted:
        w, x = torch.ones(1, requires_grad=True), torch.ones(256)
        start = counted.now
        optimizer = torch.optim.AdamW([w])
        y = (x * w).square()
        assert counted.now == start + 2 * KIB
        loss = y.sum()
        del y
        assert counted.now == start + KIB + 4
        loss.backward()
        del loss
        assert counted.now == start + 4
        optimizer.step()
        assert counted.now == start + 4 + 3 * 4
        optimizer.zero_grad()
        assert counted.now == start + 3 * 4


def _mlp_step() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(mlp.parameters(), foreach=False)
    for _ in range(2):
        mlp(torch.ones(128, 64)).square().sum().backward()
        optimizer.step()


def test_the_peak_equals_that_of_torchs_allocator():
    """Every allocation and every free of a real step, as torch's profiler records them."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _mlp_step()
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, now)
    with PeakMemory() as counted:
        _mlp_step()
    assert counted.peak == pytest.approx(peak, rel=0.005)


def test_flash_attention_takes_fp32_and_expanded_gradients_inside():
    """2 sequences of 300 queries and 500 keys in all, 8 heads of 64 over 2: queries in blocks of 128 more, one number more."""
    rows = 300 + 2 * 128
    assert flash_workspace(300, 2, 500, (8, 64), 2) == 4 * rows * 8 * 65 + 2 * 2 * 500 * 8 * 64
    assert flash_workspace(300, 2, 500, (8, 64), 8) == 4 * rows * 8 * 65


# --------------------------------------------------------------------------------------------------------------- sides


def _peak(counted: Any, side: Any, case: Any) -> tuple[int, int]:
    for _ in range(2):
        counted.begin()
        side.add_gradients(case)
        side.update()
    return counted.now, counted.peak


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", ["rankup", "trl", "peft"])
def test_fakes_count_the_bytes_of_real_tensors(
    bench_module: Load, sides: Any, tiny_model_path: Callable[[str], Path], name: str, gradient_checkpointing: bool
):
    """The same step on the path of the CPU, with numbers and without."""
    folder, case = tiny_model_path("llama"), bench_module("cases").Case(20, 30, prompts=1, completions=4)
    options = {"rank": 16, "gradient_checkpointing": gradient_checkpointing}
    with quiet_stderr(), fake_tensors() as counted:
        fake = sides.SIDES[name](folder, **options)
        of_fakes = _peak(counted, fake, case)
    with quiet_stderr(), PeakMemory() as counted:
        real = sides.SIDES[name](folder, **options)
        of_real = _peak(counted, real, case)
    assert of_fakes == pytest.approx(of_real, rel=0.002)  # of indices some are real in both
    if name == "rankup":
        assert fake.policy.fusion.summary == real.policy.fusion.summary


def test_trls_head_is_called_as_trl_calls_it(sides: Any, tiny_model_path: Callable[[str], Path]):
    from trl.trainer.utils import add_fused_lm_head

    side = sides.TrlSide(tiny_model_path("llama"), rank=4, gradient_checkpointing=False)
    ids_BT = torch.randint(0, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BR = side.logprobs(ids_BT, 5)
        add_fused_lm_head(side.base, temperature=1.0, outputs=("log_probs", "entropy"))
        labels_BT = ids_BT.clone()
        labels_BT[:, :-5] = -100
        theirs_BT = side.model(input_ids=ids_BT, labels=labels_BT, fused_lm_head=True).log_probs
    torch.testing.assert_close(ours_BR, theirs_BT[:, -5:])


@pytest.mark.parametrize(
    ("name", "gradient_checkpointing"),
    [
        ("llama", False),
        ("llama", True),
        ("qwen2, heads of their own keys", True),
        ("qwen3, wide heads", False),
        pytest.param("qwen2, heads of their own keys", False, marks=pytest.mark.exhaustive),
        pytest.param("qwen3, wide heads", True, marks=pytest.mark.exhaustive),
    ],
)
def test_the_plan_is_within_a_tenth_of_the_measurement(
    memory: Any, report: Any, monkeypatch: pytest.MonkeyPatch, name: str, gradient_checkpointing: bool
):
    monkeypatch.setitem(memory.MODELS, name, SMALL | CHANGES[name])
    of_all = {"part": "", "model": name, "side": "rankup", "rank": 64, "gradient_checkpointing": gradient_checkpointing}
    chosen = [memory.Cell(**of_all, prompt=p, completion=r, generations=g) for p, r, g in GROUPS]
    with quiet_stderr():
        measured = memory.measure_all(chosen)
    assert [report.planned(cell) for cell in measured] == pytest.approx([cell.peak for cell in measured], rel=0.1)


# ------------------------------------------------------------------------------------------------------------- figures


def _unmeasured(cell: Any) -> Any:
    return dataclasses.replace(cell, state=0, peak=0)


def test_every_cell_of_the_page_was_measured(memory: Any, cells: list[Any]):
    assert [_unmeasured(cell) for cell in cells] == list(memory.cells())


def _first_of_each(cells: list[Any]) -> list[Any]:
    """Rankup's first cell of each model, part and kind of checkpointing."""
    found = {(c.part, c.model, c.gradient_checkpointing): c for c in reversed(cells) if c.side == "rankup"}
    return list(found.values())


def test_the_plan_is_within_a_tenth_of_a_cell_of_each_model(report: Any, cells: list[Any]):
    chosen = _first_of_each(cells)
    assert len(chosen) == 3 * 2 + 1 + 2
    assert [report.planned(cell) for cell in chosen] == pytest.approx([cell.peak for cell in chosen], rel=0.1)


@pytest.mark.exhaustive
def test_the_plan_is_within_a_tenth_of_every_cell(report: Any, cells: list[Any]):
    ratios = [report.planned(cell) / cell.peak for cell in cells if cell.side == "rankup"]
    assert len(ratios) >= 36
    assert min(ratios) > 0.9 and max(ratios) < 1.1


@pytest.mark.exhaustive
@pytest.mark.parametrize("side", ["rankup", "trl", "peft"])
def test_the_figures_equal_a_new_measurement(memory: Any, cells: list[Any], side: str):
    first = next(cell for cell in cells if cell.side == side)
    with quiet_stderr():
        (measured,) = memory.measure_all([_unmeasured(first)])
    assert measured.peak == pytest.approx(first.peak, rel=0.001)


@pytest.mark.parametrize("side", SMALL_PEAKS)
def test_a_small_model_takes_what_it_took_when_the_page_was_measured(bench_module: Load, memory: Any, side: str):
    """Another peak here means that the figures of the page are out of date: measure them again."""
    case = bench_module("cases").Case(256, 768, prompts=1, completions=8)
    with quiet_stderr():
        ((_, peak),) = memory.measure(SMALL, side, [case], rank=64, gradient_checkpointing=True)
    assert peak == pytest.approx(SMALL_PEAKS[side], rel=0.001)


def _shown_tables() -> dict[str, str]:
    page = (ROOT / "docs" / "memory.md").read_text()
    return dict(re.findall(r"<!-- table: ([\w-]+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))


def test_the_page_shows_the_tables_of_the_figures(report: Any, cells: list[Any], monkeypatch: pytest.MonkeyPatch):
    """Except for the column of `rankup plan`, whose passes are measured again with --exhaustive."""
    shown = _shown_tables()
    ratios = [
        float(r) for name in ("checkpointing", "kept", "rank128") for r in re.findall(r" (\d\.\d{3}) \|$", shown[name], re.M)
    ]
    assert len(ratios) == 3 * (6 + 6 + 3) and min(ratios) > 0.9 and max(ratios) < 1.1
    left = iter(ratios)
    monkeypatch.setattr(report, "planned", lambda cell: next(left) * cell.peak)
    assert shown == report.tables(cells)


@pytest.mark.exhaustive
def test_the_page_shows_the_plan_of_every_cell(report: Any, cells: list[Any]):
    assert _shown_tables() == report.tables(cells)


def test_the_picture_is_drawn(report: Any, cells: list[Any], tmp_path: Path):
    report.draw(cells, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_memory_grows_with_p_plus_g_r_and_not_with_the_vocabulary(report: Any, cells: list[Any]):
    ours = [cell for cell in cells if cell.side == "rankup"]
    by_vocabulary = [report.activations(cell) for cell in ours if cell.part == "vocabularies"]
    assert max(by_vocabulary) < 1.01 * min(by_vocabulary)
    for checkpointing in (False, True):
        grown = [cell for cell in ours if cell.part == "completions" and cell.gradient_checkpointing is checkpointing]
        densities = [report.activations(cell) / cell.case.tokens for cell in grown]
        assert max(densities) < 1.15 * min(densities)
