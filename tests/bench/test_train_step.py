"""Counts and checks of the training benchmarks, and the command lines of all benchmarks, which are run by hand."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankup.grpo.memory.shapes import read_shape

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if path.read_text().startswith("#!"))
Load = Callable[[str], ModuleType]

TINY = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": 10,
}


@pytest.fixture(scope="module")
def cases(bench_module: Load) -> Any:
    return bench_module("cases")


@pytest.fixture(scope="module")
def operations(bench_module: Load) -> Any:
    return bench_module("operations")


@pytest.fixture(scope="module")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return read_shape(str(folder))


# ------------------------------------------------------------------------------------------------------ command lines


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
        ("vs_trl.py", ["--micro-batch", "7"], "--micro-batch must divide the 64 completions of a step"),
        ("plan_memory.py", ["--tokens-per-pack", "100"], "--tokens-per-pack must be a multiple of 512"),
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
    assert [(len(g.prompt.token_ids), [len(c.token_ids) for c in g.completions]) for g in groups] == [(5, [3] * 8)] * 2
    assert len({c.token_ids for g in groups for c in g.completions}) == 16
    assert len({a for g in groups for a in g.advantages}) == 16
    assert (case.tokens, case.targets) == (2 * (5 + 8 * 2), 2 * 8 * 3)


def test_log_probabilities_are_of_the_tokens_that_logits_predict(bench_module: Load):
    """Of all positions, and of the last three with the one before them."""
    logits_BTV = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    ids_BT = torch.arange(12).reshape(2, 6) % 10
    everywhere = bench_module("peft_side").logprobs_of(logits_BTV, ids_BT)
    assert everywhere[1, 2] == logits_BTV[1, 2].log_softmax(-1)[ids_BT[1, 3]]
    assert torch.equal(bench_module("peft_side").logprobs_of(logits_BTV[:, -4:], ids_BT), everywhere[:, -3:])


# ---------------------------------------------------------------------------------------------------------- operations


def test_operations_of_a_step_counted_by_hand(cases: Any, operations: Any, tiny_shape: Any):
    case = cases.Case(3, 4, prompts=1, completions=2)  # 3 + 2 * 3 tokens go through the model, 8 are predicted
    weights = 16 + 8 + 8 + 16 + 32 + 32 + 32  # q, k, v, o, gate, up, down
    sides = 24 + 18 + 18 + 24 + 36 + 36 + 36  # 3 I + 3 O of each
    scores = 3 * 3 + 2 * 3 * (3 + 3)  # the prompt; two completions
    assert operations.step_operations(tiny_shape, case, rank=2) == {
        "base": 9 * (2 * weights - (16 + 8 + 8)),
        "adapter": 9 * 2 * (sides - 3 * 4),
        "attention": 2 * 6 * 2 * scores,
        "head": 2 * 8 * 4 * 10,
    }


@given(prompts=st.integers(1, 3), rank=st.integers(1, 128))
def test_operations_grow_with_the_prompts_and_only_those_of_the_adapter_with_the_rank(
    cases: Any, operations: Any, tiny_shape: Any, prompts: int, rank: int
):
    one, several = cases.Case(5, 3, prompts=1), cases.Case(5, 3, prompts=prompts)
    at_one = operations.step_operations(tiny_shape, one, rank=1)
    expected = {kind: prompts * count for kind, count in at_one.items()}
    assert operations.step_operations(tiny_shape, several, rank=rank) == expected | {"adapter": rank * expected["adapter"]}


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


class StandIn:
    """A worker that computes nothing: rankup takes 1 s and 1 kB, every stock side 3 s and 4 kB."""

    def __init__(self, name: str, *_: object, **options: object) -> None:
        is_ours = name == "rankup"
        probe = {"loss": 0.1, "grad_norm": 1.0, "grad_cosine": 1.0, "logprobs": [-1.0], "base_logprobs": [-2.0]}
        self.answers = {"seconds": 1.0 if is_ours else 3.0, "peak_bytes": 1000 if is_ours else 4000, "probe": probe}

    def call(self, method: str, *_: object) -> Any:
        return self.answers.get(method)

    def cpu_seconds(self) -> float:
        return 0.0

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_rankup_is_compared_with_every_side_in_every_case(bench_module: Load, monkeypatch: pytest.MonkeyPatch):
    train_step = bench_module("train_step")
    monkeypatch.setattr(train_step, "Worker", StandIn)
    found = train_step.measure(argparse.Namespace(case=None, repeats=2, main_only=False))["cases"]
    assert list(found) == ["64+64", "256+64"]
    for case in found.values():
        assert list(case["seconds"]) == list(case["peak_bytes"]) == list(train_step.LABELS)
        assert (case["speedup"], case["speedup_over_autocast"], case["memory_ratio"]) == (3.0, 3.0, 0.25)
        assert [len(seconds["all"]) for seconds in case["seconds"].values()] == [2, 2, 1, 1, 1, 1]


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
