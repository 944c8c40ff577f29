"""`rankup export`: merged weights are exact up to rounding in fp32, and no other file is changed or left over."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankup.grpo.cli.export.export import export_adapter, export_merged
from rankup.grpo.cli.export.model_card import read_run
from rankup.grpo.cli.main import main
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import dump_config, load_config
from rankup.grpo.model.base_model import nf4_names
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import trainer_logprobs
from rankup.kernels.nf4 import Nf4Weight

SaveRun = Callable[..., Path]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = torch.tensor([[1, 17, 99, 200, 4, 4, 31]])


def exact_merge(base: Path, run: Path, scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """`W + s * B @ A` in fp64 from the files alone. `scales`: by the end of a module's name, "" for all others."""
    weights = {name: weight.double() for name, weight in load_file(base / "model.safetensors").items()}
    adapter = {name: tensor.double() for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items()}
    for key in [key for key in adapter if "_A" in key]:
        name = key.removeprefix("base_model.model.").partition(".lora_")[0]
        scale = next((value for end, value in scales.items() if end and name.endswith(end)), scales[""])
        delta = scale * adapter[key.replace("_A", "_B")] @ adapter[key]
        if name == "lm_head" and HEAD not in weights:
            weights[HEAD] = load_file(base / "model.safetensors")[EMBEDDING].double()
        weights[f"{name}.weight"] += delta.T if "lora_embedding" in key else delta
    if EMBEDDING.removesuffix(".weight") in {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in adapter}:
        weights.setdefault(HEAD, load_file(base / "model.safetensors")[EMBEDDING].double())  # unchanged
    return weights


@pytest.mark.parametrize(
    ("kind", "lora", "scales"),
    [
        pytest.param("llama", {}, {"": 0.5}, id="tied-head"),
        pytest.param("qwen3", {}, {"": 0.5}, id="untied-head"),
        pytest.param("qwen2", {}, {"": 0.5}, id="biases"),
        pytest.param("qwen3", {"targets": ["q_proj", "lm_head"]}, {"": 0.5}, id="adapter-on-untied-head"),
        pytest.param("llama", {"targets": ["q_proj", "lm_head"]}, {"": 0.5}, id="adapter-on-tied-head"),
        pytest.param("llama", {"targets": ["up_proj", "embed_tokens"]}, {"": 0.5}, id="adapter-on-tied-embedding"),
        pytest.param("qwen3", {"targets": ["up_proj", "embed_tokens"]}, {"": 0.5}, id="adapter-on-untied-embedding"),
        pytest.param("llama", {"targets": ["lm_head", "embed_tokens"]}, {"": 0.5}, id="adapters-on-both"),
        pytest.param("llama", {"use_rslora": True}, {"": 2.0}, id="rslora"),
        pytest.param(
            "llama",
            {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {"q_proj": 48}},
            {"down_proj": 2.0, "q_proj": 3.0, "": 0.5},
            id="patterns",
        ),
    ],
)
def test_merged_weights_are_the_exact_ones_rounded_once(
    save_run: SaveRun,
    tiny_model_path: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    lora: dict[str, Any],
    scales: dict[str, float],
) -> None:
    run = save_run(kind, **lora)
    none = export_merged(read_run(run), tmp_path / "fp32", dtype="float32")
    rounding = export_merged(read_run(run), tmp_path / "bf16", dtype="bfloat16")
    exact = exact_merge(tiny_model_path(kind), run, scales)
    fp32, bf16 = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert fp32.keys() == exact.keys() == bf16.keys()
    for name, weight in exact.items():
        assert (fp32[name].dtype, bf16[name].dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(fp32[name].double(), weight, rtol=1e-6, atol=2e-6)
        assert torch.equal(bf16[name], fp32[name].bfloat16())
    base = load_file(tiny_model_path(kind) / "model.safetensors")
    updates = {name: weight - base.get(name, base[EMBEDDING]).double() for name, weight in exact.items()}
    adapted = [name for name, update in updates.items() if update.any()]
    errors = [(bf16[name].double() - exact[name]).norm() for name in adapted]
    expected = torch.stack(errors).norm() / torch.stack([updates[name].norm() for name in adapted]).norm()
    assert none == 0 and rounding == pytest.approx(expected.item(), rel=1e-3)


def test_a_base_in_bf16_is_merged_in_fp32(save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model_path("llama"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    run = save_run(base=base)
    export_merged(read_run(run), tmp_path / "merged")  # auto: the dtype of the base
    exact = exact_merge(base, run, {"": 0.5})
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    different = sum(int((merged[name] != weight.float().bfloat16()).sum()) for name, weight in exact.items())
    total = sum(weight.numel() for weight in exact.values())
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    assert different / total < 1e-3  # where fp32's rounding meets a tie; merging in bf16 gets about a quarter wrong


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load_model(folder: Path) -> Any:
    with quiet_stderr():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_adapter(base: Path, adapter: Path) -> Any:
    with quiet_stderr():
        return PeftModel.from_pretrained(load_model(base), str(adapter))


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ["q_proj", "lm_head"]),
        ("llama", ["embed_tokens", "up_proj"]),
        ("qwen2", "all-linear"),
        ("qwen3", ["lm_head", "embed_tokens"]),
        ("gemma3", ["embed_tokens", "down_proj"]),  # scales its embedding
    ],
)
def test_logits_are_those_of_stock_peft(
    save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path, kind: str, targets: str | list[str]
) -> None:
    run, base = save_run(kind, targets=targets), tiny_model_path(kind)
    export_merged(read_run(run), tmp_path / "merged", dtype="float32")
    of_merged, of_adapter = logits_of(load_model(tmp_path / "merged")), logits_of(with_adapter(base, run / "adapter"))
    torch.testing.assert_close(of_merged, of_adapter, rtol=1e-4, atol=1e-4)
    assert (of_adapter - logits_of(load_model(base))).abs().max() > 0.1


def test_an_exported_adapter_equals_that_of_the_run(
    save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    run, base = save_run(), tiny_model_path("llama")
    export_adapter(read_run(run), tmp_path / "out")
    assert torch.equal(logits_of(with_adapter(base, tmp_path / "out")), logits_of(with_adapter(base, run / "adapter")))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"README.md", "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize("merge", [False, True])
def test_the_base_and_the_run_are_unchanged_and_no_path_is_published(
    save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path, merge: bool
) -> None:
    base, run = tiny_model_path("llama"), save_run()
    before = hashes(base) | hashes(run)
    (export_merged if merge else export_adapter)(read_run(run), tmp_path / "out")
    assert hashes(base) | hashes(run) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    texts = [path for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"]
    assert [path.name for path in texts if str(base.parent) in path.read_text() or str(tmp_path) in path.read_text()] == []


def hashes(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("merge", [False, True])
def test_all_files_of_an_export_have_the_same_permissions(save_run: SaveRun, tmp_path: Path, merge: bool) -> None:
    (export_merged if merge else export_adapter)(read_run(save_run()), tmp_path / "out")
    (tmp_path / "any").touch()
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "any").stat().st_mode}


def test_a_generation_config_is_copied_even_if_transformers_refuses_to_write_it(
    save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model_path("llama"), tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": false, "eos_token_id": [2, 5]}')
    export_merged(read_run(save_run(base=base)), tmp_path / "merged")
    assert (tmp_path / "merged" / "generation_config.json").read_text() == (base / "generation_config.json").read_text()


# Errors


def export_and_fail(run: Path, *arguments: str, capfd: pytest.CaptureFixture[str]) -> str:
    """The error of the command, which has one line."""
    capfd.readouterr()
    assert main(["export", str(run), *arguments]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rankup: error: ")
    return line


def test_a_folder_without_a_run_is_refused_in_one_line(
    save_run: SaveRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert "it has no config.yaml" in export_and_fail(tmp_path / "absent", capfd=capfd)
    assert "it has no config.yaml" in export_and_fail(tmp_path / "empty", capfd=capfd)
    run = save_run()
    assert "--dtype needs --merge" in export_and_fail(run, "--dtype", "float32", capfd=capfd)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    assert "no adapter in" in export_and_fail(run, capfd=capfd)
    assert not (run / "export").exists()


@pytest.mark.parametrize("arguments", [[], ["--merge"]])
def test_a_missing_base_model_is_refused_in_one_line(
    save_run: SaveRun, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    run = save_run(base=tmp_path / "gone")
    assert f"model {tmp_path / 'gone'}: no such folder" in export_and_fail(run, *arguments, capfd=capfd)
    assert not (run / "export").exists()


def test_an_adapter_of_another_model_is_refused_and_leaves_no_files(
    save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = save_run("llama", base=tiny_model_path("qwen2"))
    assert "does not fit this model" in export_and_fail(run, "--merge", capfd=capfd)
    assert not (run / "export").exists()


def test_weights_outside_the_range_of_a_dtype_are_refused(save_run: SaveRun, tmp_path: Path) -> None:
    run = save_run()
    file = run / "adapter" / "adapter_model.safetensors"
    huge = {name: tensor * (1e6 if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    save_file(huge, file)
    with pytest.raises(ValueError, match="too large for float16: use --dtype bfloat16 or float32"):
        export_merged(read_run(run), tmp_path / "out", dtype="float16")
    save_file({name: tensor * torch.nan for name, tensor in huge.items()}, file)
    with pytest.raises(ValueError, match="NaNs detected"):
        export_merged(read_run(run), tmp_path / "out", dtype="float32")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_export_is_replaced_only_with_overwrite(
    save_run: SaveRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = save_run(), tmp_path / "out"
    assert main(["export", str(run), "--output", str(out)]) == 0
    (out / "stale.txt").touch()
    line = export_and_fail(run, "--output", str(out), capfd=capfd)
    assert "exists already: add --overwrite" in line and "another --output" in line
    assert main(["export", str(run), "--output", str(out), "--merge", "--overwrite"]) == 0
    assert (out / "config.json").is_file() and not (out / "stale.txt").exists()


def test_only_an_export_is_ever_replaced(save_run: SaveRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = save_run()
    export_merged(read_run(run), tmp_path / "base")
    on_an_export = save_run(folder=tmp_path / "second", base=tmp_path / "base")  # trained further from an exported model
    (tmp_path / "file").touch()
    before = hashes(tmp_path)
    for output in (run, run / "adapter", tmp_path, tmp_path / "base", tmp_path / "file"):
        arguments = ["--merge", "--overwrite", "--output", str(output)]
        assert "is not an export, so it is not replaced" in export_and_fail(on_an_export, *arguments, capfd=capfd)
    assert "give one of --merge and --gguf" in export_and_fail(on_an_export, "--merge", "--gguf", capfd=capfd)
    assert hashes(tmp_path) == before


# The command


@pytest.mark.parametrize(
    ("arguments", "folder", "serve"),
    [
        ([], "adapter", "--enable-lora --max-lora-rank 64 --lora-modules policy="),
        (["--merge"], "merged", "vllm serve "),
    ],
)
def test_the_command_prints_the_folder_and_how_to_serve_it(
    save_run: SaveRun, capfd: pytest.CaptureFixture[str], arguments: list[str], folder: str, serve: str
) -> None:
    run = save_run()
    capfd.readouterr()
    assert main(["export", str(run), *arguments]) == 0
    *_, where, how = (captured := capfd.readouterr()).out.splitlines()
    assert captured.err == ""
    assert where.startswith(f"{run / 'export' / folder} (") and where.endswith(" MiB)")
    assert how.startswith("serve it: vllm serve ") and serve in how and how.endswith(str(run / "export" / folder))


def test_a_checkpoint_of_a_run(save_run: SaveRun, tmp_path: Path) -> None:
    checkpoint = save_run(folder=tmp_path / "run" / "checkpoints" / "step_000010")
    assert main(["export", str(checkpoint), "--merge"]) == 0
    # Next to the checkpoints: the run deletes old ones.
    merged = tmp_path / "run" / "export" / "step_000010-merged"
    assert "- steps: 10, a checkpoint" in (merged / "README.md").read_text()


@pytest.mark.engine
def test_vllm_samples_from_a_merged_model_with_an_untied_head(
    save_run: SaveRun, tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    run = save_run("llama", targets=["q_proj", "lm_head"])
    export_merged(read_run(run), tmp_path / "merged")
    engine = make_engine(model=str(tmp_path / "merged"))
    (logprobs,) = engine.prompt_logprobs([TOKENS[0].tolist()], use_adapter=False)
    expected = logits_of(load_model(tmp_path / "merged")).log_softmax(-1)[0, :-1].gather(1, TOKENS[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_trained_on_nf4_is_merged_into_the_dequantized_weights(
    save_run: SaveRun, tiny_model_path: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tiny_model_path("qwen2"), save_run("qwen2")
    config = load_config(run / "config.yaml", ["model.load_in=nf4", "model.dtype=float32"])
    (run / "config.yaml").write_text(dump_config(config))
    export_merged(read_run(run), tmp_path / "merged")
    exact = exact_merge(base, run, {"": 0.5})
    rounded = {name: Nf4Weight.quantise(load_file(base / "model.safetensors")[name]).dense() for name in nf4_names(str(base))}
    for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
        expected = exact[name]
        if name in rounded:
            expected = expected + rounded[name].double() - load_file(base / "model.safetensors")[name].double()
        assert torch.allclose(weight.double(), expected, rtol=0, atol=1e-6)
    assert main(["export", str(run)]) == 0
    assert "--merge" in capsys.readouterr().out
    assert "BitsAndBytesConfig" in (run / "export" / "adapter" / "README.md").read_text()


def test_the_code_in_the_card_of_an_adapter_on_nf4_loads_the_trained_policy(save_run: SaveRun, tmp_path: Path) -> None:
    """transformers and bitsandbytes compute the logits of our policy."""
    run = save_run("llama64")
    config = load_config(run / "config.yaml", ["model.load_in=nf4", "model.dtype=float32"])
    (run / "config.yaml").write_text(dump_config(config))
    export_adapter(read_run(run), tmp_path / "adapter")
    code = re.findall("```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)[0]
    code = code.replace("path/to/this/folder", str(tmp_path / "adapter"))
    code = code.replace("path/to/llama64", config.model.name)
    found: dict[str, Any] = {}
    with quiet_stderr():
        exec(code, found)
        policy = Policy(config.model.name, lora=config.lora, dtype="float32", load_in="nf4")
    policy.load_adapter(run / "adapter")
    policy.write_slots()
    tokens = [1, 17, 99, 200, 4, 4, 31]
    with torch.no_grad():
        # In evaluation mode bitsandbytes repacks weights on CPU, with scales in bf16.
        logprobs = found["model"].train()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(trainer_logprobs(policy, [tokens])[0]), expected, atol=1e-4)
