"""The model of a step on many devices: formulas, the simulation, and the numbers of the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def scaling(bench_module: Load) -> Any:
    return bench_module("scaling")


@pytest.fixture(scope="module")
def model(bench_module: Load) -> Any:
    return bench_module("scaling_model")


@pytest.fixture(scope="module")
def report(bench_module: Load) -> Any:
    return bench_module("scaling_report")


@pytest.fixture(scope="module")
def llama(scaling: Any) -> Any:
    """Llama-3.1-8B by rank."""
    return scaling.read_models()


@pytest.fixture(scope="module")
def figures(scaling: Any, llama: Any) -> Any:
    return scaling.compute(llama, repeats=1)


# --------------------------------------------------------------------------------------------------- collectives


def test_gradients_are_those_of_the_planner(llama: Any):
    assert {rank: one.adapter for rank, one in llama.items()} == {64: 167_772_160, 128: 335_544_320}
    assert llama[64].gradient_bytes == 671_088_640
    base = 8_030_261_248
    norms, embedding = 65 * 4096, 128256 * 4096
    assert llama[64].body + llama[64].head == base - norms - embedding


def test_a_ring_sends_as_much_as_one_played_hop_by_hop(model: Any):
    """Members pass on one chunk a hop: first sums, then results."""
    members, chunk = 5, 7.0
    chunks = np.random.default_rng(0).integers(0, 9, (members, members)).astype(float)  # member, chunk
    total, sent, hops = chunks.sum(axis=0), np.zeros(members), 0
    for shift, adds in ((0, True), (1, False)):
        for hop in range(members - 1):
            moved = [(m, (m - hop + shift) % members, chunks[m, (m - hop + shift) % members]) for m in range(members)]
            for sender, index, value in moved:
                receiver = (sender + 1) % members
                chunks[receiver, index] = value + (chunks[receiver, index] if adds else 0)
                sent[sender] += chunk
            hops += 1
    assert (chunks == total).all()
    assert model.ring_seconds(members * chunk, members, 1.0, 0.0) == pytest.approx(sent[0])
    assert model.ring_seconds(0.0, members, 1.0, 1.0) == hops


@pytest.mark.parametrize("algorithm", ["ring", "nodes", "tree"])
def test_one_device_sends_nothing_and_one_node_uses_its_links_only(model: Any, algorithm: str):
    assert model.all_reduce_seconds(1e9, 1, model.INFINIBAND, algorithm) == 0
    in_node = [model.all_reduce_seconds(1e9, 8, network, algorithm) for network in (model.INFINIBAND, model.ETHERNET)]
    assert in_node[0] == in_node[1]
    assert in_node[0] == pytest.approx(2 * 7 / 8 * 1e9 / (450e9 * 0.8) + 14 * 3e-6)


def test_rings_in_nodes_need_fewer_slow_hops(model: Any):
    """Between 64 nodes: (7 / 8 of the buffer twice inside) and (63 / 64 twice outside), 126 hops instead of 1,022."""
    seconds = model.all_reduce_seconds(1e9, 512, model.ETHERNET, "nodes")
    assert seconds == pytest.approx(1.75e9 / 360e9 + 14 * 3e-6 + 2 * 63 / 64 * 1e9 / 10e9 + 126 * 50e-6)
    ring = model.all_reduce_seconds(1e9, 512, model.ETHERNET, "ring")
    assert ring == pytest.approx(2 * 511 / 512 * 1e9 / 10e9 + 1022 * 50e-6)
    tree = model.all_reduce_seconds(1e9, 512, model.ETHERNET, "tree")
    assert tree == pytest.approx(1.75e9 / 360e9 + 14 * 3e-6 + 2e9 / 10e9 + 12 * 50e-6)


def test_nodes_of_one_device_form_a_ring(model: Any):
    times = [model.all_reduce_seconds(1e9, 64, model.SLOW_ETHERNET, algorithm) for algorithm in ("ring", "nodes")]
    assert times[0] == pytest.approx(times[1])


# ------------------------------------------------------------------------------------------------------ simulation


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=24)


@given(flat=lengths, slots=st.integers(1, 8))
def test_a_rollout_equals_one_played_iteration_by_iteration(model: Any, llama: Any, flat: list[int], slots: int):
    prompt, one, device = 10, llama[64], model.H100
    waiting, live, seconds, iterations, most = list(flat), [], 0.0, 0, 0
    while waiting or live:
        while waiting and len(live) < slots:
            live.append((waiting.pop(0), 0))
        context = sum(prompt + done for _, done in live)
        most = max(most, context)
        reading = (one.read_bytes + one.kv_bytes * context) / (device.memory_rate * device.memory_share)
        products = len(live) * one.operations_per_token / (device.operations * device.compute_share)
        seconds += max(reading, products) + device.iteration_seconds
        iterations += 1
        live = [(length, done + 1) for length, done in live if done + 1 < length]
    seconds += len(flat) * prompt * one.operations_per_token / (device.operations * device.compute_share)
    rollout = model.roll_out(np.array(flat)[:, None], prompt, one, device, slots)
    assert (rollout.iterations, rollout.kv_tokens) == (iterations, most)
    assert rollout.seconds == pytest.approx(seconds)


def test_lengths_are_as_described(model: Any):
    batch = model.Batch(prompts=4000)
    drawn = batch.draw(np.random.default_rng(0))
    assert drawn.shape == (4000, 8)
    assert np.median(drawn) == pytest.approx(600, rel=0.05)
    assert drawn.max() == 4096 and drawn.min() >= 1
    logarithms = np.log(drawn)
    assert logarithms.std(axis=1, ddof=1).mean() == pytest.approx(0.4 * 0.965, rel=0.05)  # of 8 values the mean deviation
    assert logarithms.mean(axis=1).std() == pytest.approx((0.5**2 + 0.4**2 / 8) ** 0.5, rel=0.05)


def test_a_fixed_batch_has_the_same_work_and_the_same_longest_completion_on_every_number_of_devices(model: Any, llama: Any):
    batch = model.Batch(prompts=16)
    alone, shared, idle = (model.simulate(llama[64], batch, workers=n, repeats=3) for n in (1, 16, 32))
    assert alone.rollout_wait == alone.training_wait == alone.network == 0
    assert 16 * shared.training == pytest.approx(alone.training)
    assert alone.iterations == shared.iterations == idle.iterations
    assert shared.seconds - shared.network == pytest.approx(idle.seconds - idle.network)  # the further 16 only wait
    assert idle.busy == pytest.approx(shared.busy / 2, rel=0.01)


def test_no_worker_waits_if_all_completions_have_one_length(model: Any, llama: Any):
    batch = model.Batch(prompts=32, prompt_sigma=0.0, completion_sigma=0.0)
    steps = model.simulate(llama[64], batch, workers=8, repeats=1)
    assert steps.rollout_wait == pytest.approx(0) and steps.training_wait == pytest.approx(0)
    assert steps.busy == pytest.approx(1 - steps.network / steps.seconds)


# ---------------------------------------------------------------------------------------------------------- output


def test_the_picture_is_drawn(report: Any, figures: Any, tmp_path: Path):
    report.draw(figures, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_with_json_alone_no_table_is_printed(scaling: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scaling.main(["--repeats", "1", "--json", str(tmp_path / "scaling.json")])
    figures = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["workers"] for row in figures["weak"]["64"]] == list(scaling.DEVICES)
    assert "| ---" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_shows_the_tables_of_the_script(scaling: Any, report: Any, llama: Any):
    page = (ROOT / "docs" / "scaling.md").read_text()
    shown = dict(re.findall(r"<!-- table: ([\w-]+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    assert shown == report.tables(scaling.compute(llama, repeats=20))
