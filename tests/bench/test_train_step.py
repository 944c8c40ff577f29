"""Counts and checks of the training benchmarks, and the command lines of all benchmarks, which are run by hand."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if path.read_text().startswith("#!"))
Load = Callable[[str], ModuleType]

lengths = st.integers(1, 12)
group_shapes = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=4)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def cases(bench_module: Load) -> Any:
    return bench_module("cases")


@pytest.fixture(scope="module")
def operations(bench_module: Load) -> Any:
    return bench_module("operations")


@pytest.fixture(scope="module")
def tiny_shape(operations: Any) -> Any:
    return operations.ModelShape(layers=1, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10)


# ------------------------------------------------------------------------------------------------------ command lines


def test_there_are_scripts():
    assert {"train_step.py", "rank.py", "profile_step.py", "report.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch(script: str):
    command = [sys.executable, "-X", "importtime", BENCH / script, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "vllm", "matplotlib"})


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_step.py", ["--case", "64"], "a case is PROMPT+COMPLETION"),
        ("train_step.py", ["--repeats", "0"], "--repeats: must be at least 1"),
        ("profile_step.py", ["--case", "0+64"], "a case is PROMPT+COMPLETION"),
        ("rank.py", ["--rank", "256"], "--rank must be from 1 to 128"),
        ("report.py", ["no/such/folder"], "is not a folder"),
    ],
)
def test_wrong_arguments_are_an_error_before_anything_starts(script: str, arguments: list[str], message: str):
    result = subprocess.run([sys.executable, BENCH / script, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------------- cases


def test_case_is_the_same_in_every_process(cases: Any):
    case = cases.Case.parse("5+3")
    groups = case.groups()
    assert groups == cases.Case.parse("5+3").groups()
    assert case.shapes() == [(len(g.prompt), [len(c) for c in g.completions]) for g in groups] == [(5, [3] * 8)] * 2
    assert len({tuple(c) for g in groups for c in g.completions}) == 16
    assert len({a for g in groups for a in g.advantages}) == 16


def test_padded_rows_of_a_group(cases: Any):
    rows = cases.padded_rows([cases.Group(prompt=[7, 8], completions=[[1], [2, 3]], advantages=[0.5, -0.5])])
    assert rows.token_ids == [[7, 8, 1, 0], [7, 8, 2, 3]]
    assert rows.attention == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert rows.is_target == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert (rows.prompt_lengths, rows.advantages, rows.num_tokens) == ([2, 2], [0.5, -0.5], 8)


@given(group_shapes)
def test_padded_rows_hold_every_completion_after_its_prompt(cases: Any, shapes: list[tuple[int, list[int]]]):
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1, 50) for _ in range(count)]

    groups = [cases.Group(tokens(p), [tokens(c) for c in cs], [draw.random() for _ in cs]) for p, cs in shapes]
    rows = cases.padded_rows(groups)
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    picked = list(zip(rows.token_ids, rows.attention, rows.is_target, strict=True))
    real = [[t for t, is_real in zip(ids, attention, strict=True) if is_real] for ids, attention, _ in picked]
    assert real == [prompt + completion for prompt, completion in pairs]
    targets = [[t for t, wanted in zip(ids, is_target, strict=True) if wanted] for ids, _, is_target in picked]
    assert targets == [completion for _, completion in pairs]
    assert {len(part) for row in picked for part in row} == {max(map(len, real))}
    assert rows.advantages == [a for group in groups for a in group.advantages]


# ---------------------------------------------------------------------------------------------------------- operations


def test_operations_of_a_step_counted_by_hand(operations: Any, tiny_shape: Any):
    group = (3, [2, 4])  # 3 + 1 + 3 tokens go through the model, 6 are predicted
    assert operations.num_tokens([group]) == (7, 6)
    weights = 16 + 8 + 8 + 16 + 32 + 32 + 32  # q, k, v, o, gate, up, down
    sides = 24 + 18 + 18 + 24 + 36 + 36 + 36  # 3 I + 3 O of each
    scores = 3 * 3 + 2 * 3 * (3 + 3)  # the prompt; two completions, as wide as the longer one
    assert operations.step_operations(tiny_shape, [group], rank=2) == {
        "base": 7 * (2 * weights - (16 + 8 + 8)),
        "adapter": 7 * 2 * (sides - 3 * 4),
        "attention": 2 * 6 * 2 * scores,
        "head": 2 * 6 * 4 * 10,
    }


@given(group_shapes, st.integers(1, 128))
def test_operations_add_up_over_groups_and_only_the_adapter_grows_with_the_rank(
    operations: Any, tiny_shape: Any, shapes: list[tuple[int, list[int]]], rank: int
):
    total = operations.step_operations(tiny_shape, shapes, rank=rank)
    parts = [operations.step_operations(tiny_shape, [shape], rank=rank) for shape in shapes]
    assert total == {kind: sum(part[kind] for part in parts) for kind in total}
    at_one = operations.step_operations(tiny_shape, shapes, rank=1)
    assert total == at_one | {"adapter": rank * at_one["adapter"]}


def test_model_shape_is_read_from_its_configuration(operations: Any, tmp_path: Path):
    config = '{"num_hidden_layers": 3, "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 4, "vocab_size": 99}'
    (tmp_path / "config.json").write_text(config)
    shape = operations.ModelShape.read(tmp_path)
    assert (shape.head_dim, shape.kv_heads, shape.vocabulary) == (3, 4, 99)
    assert shape.projections == [(12, 12)] * 4 + [(12, 20)] * 2 + [(20, 12)]


def test_growth_from_rank_64_to_128(bench_module: Load, cases: Any, tiny_shape: Any):
    rank = bench_module("rank")
    seconds = {64: [2.0, 2.0, 9.0], 128: [3.0, 3.0, 3.0]}
    growth = rank.case_result(tiny_shape, cases.Case(3, 2), seconds)["64_to_128"]
    assert growth["time_ratio"] == 1.5
    assert 1.0 < growth["operations_ratio"] < 2.0
    assert growth["time_over_operations"] == pytest.approx(1.5 / growth["operations_ratio"])
    assert "64_to_128" not in rank.case_result(tiny_shape, cases.Case(3, 2), {64: [2.0]})


# -------------------------------------------------------------------------------------------------- agreement, buckets


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({}, []),
        ({"loss_difference": 0.01}, ["loss"]),
        ({"grad_norm_ratio": 1.2}, ["gradient norm"]),
        ({"grad_norm_ratio": 0.5, "grad_cosine": 0.4}, ["gradient norm", "gradient"]),
        ({"logprob_difference": 0.6}, ["log-probabilities"]),
        ({"loss_difference": float("nan")}, ["loss"]),
    ],
)
def test_sides_that_compute_different_steps_are_found(bench_module: Load, change: dict[str, float], problems: list[str]):
    agreement = {
        "loss_difference": 1e-8,
        "grad_norm_ratio": 1.01,
        "grad_cosine": 0.998,
        "logprob_difference": 0.06,
        "adapter_effect": 0.6,
    }
    assert bench_module("train_step").disagreements(agreement | change) == problems


KERNEL, ATTENTION, LOGPROB = "/r/kernels/lora.py", "/r/kernels/attention_blocks.py", "/r/kernels/logprob.py"
LLAMA, ADAM = "/p/transformers/models/llama/modeling_llama.py", "/p/torch/optim/adamw.py"


@pytest.mark.parametrize(
    ("operation", "files", "weights", "bucket"),
    [
        ("mm", [KERNEL, LLAMA], {"base"}, "base products"),
        ("addmm_", [KERNEL, LLAMA], {"base"}, "base products"),
        ("addmm_", [KERNEL, LLAMA], set(), "adapter products"),
        ("silu", [KERNEL, LLAMA], set(), "other elementwise"),
        ("mm", [LOGPROB, "/r/grpo/policy.py"], {"head"}, "head products"),
        ("exp_", [LOGPROB, "/r/grpo/policy.py"], set(), "head elementwise"),
        ("mul", ["/r/grpo/losses.py", LOGPROB], set(), "head elementwise"),
        ("bmm", [ATTENTION, LLAMA], set(), "attention"),
        ("index_select", [ATTENTION, LLAMA], set(), "attention"),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", [], set(), "attention"),
        ("bmm", [], set(), "attention"),
        ("_fused_adamw_", [ADAM, "/r/grpo/learner.py"], set(), "optimizer"),
        ("_foreach_norm", ["/p/torch/nn/utils/clip_grad.py"], set(), "optimizer"),
        ("rsqrt", [LLAMA], set(), "other elementwise"),
    ],
)
def test_bucket_of_an_operation(bench_module: Load, operation: str, files: list[str], weights: set[str], bucket: str):
    profile_step = bench_module("profile_step")
    assert profile_step.bucket(operation, files, weights) == bucket
    assert bucket in profile_step.MEASURED


def test_python_is_the_rest_of_a_step(bench_module: Load):
    profile_step = bench_module("profile_step")
    profiled = [{"base products": 0.5, "attention": 0.1}, {"base products": 0.7}, {"base products": 0.6, "attention": 0.1}]
    result = profile_step.case_result([1.0, 2.0, 1.0], profiled, {"base": 150, "head": 50}, [1000.0])
    assert result["seconds"]["python"] == pytest.approx(1.0 - 0.6 - 0.1)
    assert sum(result["seconds"].values()) == pytest.approx(1.0)
    assert result["floor_seconds"] == pytest.approx(0.4)
    assert result["floor_share"] == pytest.approx(0.4)


def test_a_product_count_that_differs_from_the_shapes_ends_a_profile(bench_module: Load):
    check = bench_module("profile_step").check_operations
    expected = {"base": 10, "adapter": 5, "head": 3, "attention": 7}
    check(expected, {"base products": 10, "adapter products": 5, "head products": 3, "attention": 99})
    with pytest.raises(SystemExit, match="adapter products: 4 multiply-adds"):
        check(expected, {"base products": 10, "adapter products": 4, "head products": 3})
