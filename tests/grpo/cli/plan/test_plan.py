"""The command `rankup plan`: what it prints, its JSON, its run files, and one clear line where something is wrong."""

from __future__ import annotations

import argparse
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rankup.grpo.cli.plan.advice import PRACTICE
from rankup.grpo.cli.plan.plan import EXAMPLES, add_plan_command, make_plan
from rankup.grpo.cli.plan.view import show
from rankup.grpo.config import load_config
from rankup.grpo.memory import parts
from rankup.grpo.memory.parts import GIB, RESIDENT

pytestmark = pytest.mark.slow

SMOLLM = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
KEYS = {
    "model",
    "architecture",
    "shape",
    "parameters",
    "task",
    "adapter",
    "max_lora_rank",
    "workload",
    "memory",
    "kv_cache",
    "gpu_memory_utilization",
    "savings",
    "notes",
}


SHORT = ["--prompt-length", "64", "--completion-length", "64", "--tokens-per-pack", "256"]  # a pass is measured block by block


@dataclass
class Planner:
    """The command in the test's folder, where `model` has the shapes of SmolLM2-135M."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def options(self, *arguments: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        add_plan_command(parser.add_subparsers(required=True))
        return parser.parse_args(["plan", str(self.folder / "model"), *arguments])

    def __call__(self, *arguments: str) -> str:
        """What the command prints."""
        options = self.options(*arguments)
        assert options.command(options) == 0
        return self.capsys.readouterr().out

    def json(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Planner:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMOLLM))
    return Planner(tmp_path, capsys)


@pytest.fixture
def plan_without_a_pass(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """For tests of what does not depend on the memory of a pass, of which a plan measures up to ten."""
    monkeypatch.setattr(parts, "pass_parts", lambda *_: {"activations": GIB, "logits_chunk": GIB // 8})
    return plan


def test_json_has_all_numbers_and_reasons(plan: Planner):
    made = plan.json("--vram", "24")
    assert set(made) == KEYS
    assert made["parameters"] == {"base": 134_515_008, "adapter": 19_537_920, "adapter_per_rank": 305_280}
    assert made["adapter"]["rank"]["value"] == 64 and made["adapter"]["alpha"]["value"] == 32
    assert all(choice["reason"] for choice in made["adapter"].values())
    assert made["max_lora_rank"] == 64
    memory = made["memory"]
    everything = sum(memory["training"].values()) + sum(memory["engine"].values())
    assert memory["fits"] and memory["training_peak"] == everything - memory["engine"]["activations"]
    in_a_pass = sum(size for name, size in memory["training"].items() if name not in RESIDENT)
    assert memory["sampling"] == everything - in_a_pass
    assert 0 < made["gpu_memory_utilization"] < 1
    assert made["kv_cache"]["bytes_per_token"] == 2 * 30 * 3 * 64 * 2


def test_without_vram_sizes_are_named(plan: Planner):
    made = plan.json()
    assert made["memory"]["vram"] is None and made["memory"]["fits"] is None
    assert made["memory"]["common_sizes_gib"] == [16, 24, 40, 48, 80, 141]
    assert "fits on 16, 24, 40, 48, 80, 141 GiB" in plan()


@pytest.mark.parametrize("rank", [1, 64, 65, 128])
def test_vllms_buffers_are_for_64_or_128(plan_without_a_pass: Planner, rank: int):
    assert plan_without_a_pass.json("--rank", str(rank))["max_lora_rank"] == (64 if rank <= 64 else 128)


def test_output_is_plain_text_with_every_section(plan: Planner):
    text = plan("--vram", "24")
    titles = ("model", "adapter", "memory", "sampling and training", "notes")
    assert [title for title in titles if f"\n{title}\n" not in f"\n{text}"] == []
    assert "\x1b" not in text and "it fits" in text and "gpu_memory_utilization" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_a_narrow_terminal_loses_no_number(plan: Planner):
    buffer = io.StringIO()
    show(make_plan(plan.options("--vram", "24")), Console(file=buffer, width=80, force_terminal=True))
    assert "\x1b[" in buffer.getvalue() and "19,537,920" in buffer.getvalue()


def test_a_plan_that_does_not_fit_suggests_changes(plan: Planner):
    text = plan("--vram", "4", "--tokens-per-pack", "16384")
    assert "too small" in text and "more are needed" in text
    assert "optim.gradient_checkpointing true" in text and ", which fits" in text
    assert text.count(", which fits") == 1


@pytest.mark.parametrize("task", PRACTICE)
def test_a_written_run_file_loads_to_the_plan(plan_without_a_pass: Planner, task: str):
    file = plan_without_a_pass.folder / "runs" / "run.yaml"
    made = plan_without_a_pass.json("--task", task, "--vram", "24", "--gradient-checkpointing", "--write", str(file))
    config = load_config(file)
    assert config.model.name == str(plan_without_a_pass.folder / "model")
    planned = {name: made["adapter"][name]["value"] for name in ("rank", "alpha", "use_rslora", "targets")}
    assert {name: getattr(config.lora, name) for name in planned} == planned
    assert (config.lora.dropout, config.lora.max_rank) == (0, made["max_lora_rank"])
    assert config.optim.learning_rate == made["adapter"]["learning_rate"]["value"]
    assert config.optim.gradient_checkpointing
    assert config.rollout.gpu_memory_utilization is None and config.optim.tokens_per_pack is None, "the run decides them"
    assert f"# {made['adapter']['rank']['reason']}" in file.read_text()


def test_a_run_that_does_not_fit_is_not_written(plan: Planner):
    """It was, with exit status 0."""
    file = plan.folder / "run.yaml"
    options = plan.options("--vram", "1", "--rank", "64", "--write", str(file))
    assert options.command(options) == 1
    output = plan.capsys.readouterr()
    assert "too small" in output.out and not file.exists()
    assert re.fullmatch(r".*run\.yaml was not written: the run needs \d\.\d GiB, the device has 1\.0 GiB\. .*\n", output.err)


def test_practices_dropout_is_shown_and_not_written(plan_without_a_pass: Planner):
    file = plan_without_a_pass.folder / "run.yaml"
    made = plan_without_a_pass.json("--task", "code", "--write", str(file))
    assert made["adapter"]["dropout"]["value"] == 0.1
    assert any("no dropout but 0" in note for note in made["notes"])
    assert load_config(file).lora.dropout == 0


def test_on_cpu_the_run_file_sizes_the_cache(plan: Planner):
    file = plan.folder / "run.yaml"
    plan("--device", "cpu", "--vram", "8", *SHORT, "--write", str(file))
    assert 0 < load_config(file).rollout.kv_cache_gib < 8
    assert "gpu_memory_utilization" not in file.read_text()


def test_a_file_is_replaced_by_force_only(plan_without_a_pass: Planner):
    file = plan_without_a_pass.folder / "run.yaml"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"run\.yaml exists: .*--force"):
        plan_without_a_pass("--write", str(file))
    assert file.read_text() == "mine"
    plan_without_a_pass("--write", str(file), "--force")
    assert load_config(file).lora.rank == 64


def test_tight_memory_lowers_the_rank(plan: Planner):
    ample = plan.json("--task", "math", "--rows", "50000", "--vram", "24", "--load-in", "bf16")
    tight = plan.json("--task", "math", "--rows", "50000", "--vram", "2.0")
    assert ample["adapter"]["rank"]["value"] == 128
    assert tight["adapter"]["rank"]["value"] < 128
    assert "memory is tight" in tight["adapter"]["rank"]["reason"]


BAD: dict[str, tuple[list[str], str]] = {
    "rank 256": (["--rank", "256"], "lora.rank: must be at most 128"),
    "one generation": (["--num-generations", "1"], "rollout.num_generations: must be at least 2"),
    "no such layer": (["--targets", "q_proj,wq"], "LlamaForCausalLM has no layer wq"),
    "small device": (["--vram", "0.2"], "0.2 GiB of memory: too small for the base weights"),
}


@pytest.mark.parametrize(("arguments", "part"), BAD.values(), ids=BAD)
def test_mistakes_are_one_line(plan: Planner, arguments: list[str], part: str):
    with pytest.raises(ValueError) as caught:
        plan(*arguments)
    (line,) = str(caught.value).splitlines()
    assert part in line


@pytest.mark.parametrize("arguments", [["--vram", "0"], ["--vram", "many"], ["--rows", "-1"], ["--task", "chess"]])
def test_wrong_options_are_refused_by_the_parser(plan: Planner, capsys: pytest.CaptureFixture[str], arguments: list[str]):
    with pytest.raises(SystemExit):
        plan.options(*arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_help_shows_examples_that_parse(capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    add_plan_command(parser.add_subparsers(required=True))
    with pytest.raises(SystemExit):
        parser.parse_args(["plan", "--help"])
    assert "examples:\n  rankup plan smollm2-135m-instruct" in capsys.readouterr().out
    examples = [line.strip().split("  ")[0].split()[1:] for line in EXAMPLES.splitlines()[1:]]
    assert all(parser.parse_args(example).command is not None for example in examples)


def test_how_the_base_is_held_and_the_optimizer_go_into_the_budget(plan: Planner):
    assert "base_weights" not in plan.json()["memory"]["training"]
    unshared = plan.json("--share-base-weights", "false")["memory"]
    assert unshared["training"]["base_weights"] == unshared["engine"]["base_weights"] == 2 * 134_515_008
    assert plan.json("--share-base-weights", "false")["workload"]["share_base_weights"] is False
    packed = plan.json("--share-base-weights", "false", "--load-in", "nf4")
    assert packed["memory"]["training"]["base_weights"] < 0.6 * unshared["training"]["base_weights"]
    assert not any("NF4" in note for note in packed["notes"])
    assert any("NF4 saves no memory here" in note for note in plan.json("--load-in", "nf4")["notes"])
    in_8_bits = plan.json("--optimizer", "adamw_8bit")["memory"]["training"]
    assert in_8_bits["optimizer"] == pytest.approx(2.03 * 19_537_920, rel=0.001)


HELD: dict[str, tuple[list[str], dict[str, Any]]] = {
    "as by default": ([], {"load_in": None, "share_base_weights": "auto", "optimizer": "adamw"}),
    "not shared, packed": (
        ["--share-base-weights", "false", "--load-in", "nf4", "--optimizer", "adamw_8bit"],
        {"load_in": "nf4", "share_base_weights": False, "optimizer": "adamw_8bit"},
    ),
    "shared": (["--share-base-weights", "true"], {"load_in": None, "share_base_weights": True, "optimizer": "adamw"}),
}


@pytest.mark.parametrize(("arguments", "fields"), HELD.values(), ids=HELD)
def test_how_the_base_is_held_and_the_optimizer_go_into_the_run_file(
    plan_without_a_pass: Planner, arguments: list[str], fields: dict[str, Any]
):
    file = plan_without_a_pass.folder / "run.yaml"
    plan_without_a_pass("--write", str(file), *arguments)
    config = load_config(file)
    found = {"load_in": config.model.load_in, "share_base_weights": config.model.share_base_weights}
    assert found | {"optimizer": config.optim.optimizer} == fields


def test_targets_come_as_a_preset_names_or_an_expression(plan_without_a_pass: Planner):
    def adapted(targets: str) -> Any:
        return plan_without_a_pass.json("--targets", targets)["adapter"]["targets"]["value"]

    assert adapted("qkv") == "qkv"
    assert adapted("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert adapted(r".*layers\.(0|1)\..*q_proj") == r".*layers\.(0|1)\..*q_proj"
