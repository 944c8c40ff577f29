"""`rankup export RUN --gguf`: read back, the file has the logits and tokens of the merged model; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CHAT_TEMPLATE, KINDS, make_tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rankup import GRPOConfig
from rankup.grpo.cli.export.export import export_merged
from rankup.grpo.cli.export.gguf_file import LLAMA3, QWEN2, SPLITTING, check_supported, write_gguf
from rankup.grpo.cli.export.model_card import read_run
from rankup.grpo.cli.main import main
from rankup.grpo.config import dump_config
from rankup.grpo.model.policy import Policy

TOKENS = torch.tensor([[1, 17, 99, 200, 4, 4, 31]])
TEXTS = ("What is 17 + 25?", "  ünïcode\n\n def f(x):\treturn x1234", "Don't <special> stop", "")


def bpe_tokenizer(pre_tokenizer: Any = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, and 260 tokens as the tiny models have."""
    special = ["<pad>", "<bos>", "<eos>", "<special>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = {token: index for index, token in enumerate([*special, *alphabet[:-4], "in", "re", "Ġi", "'t"])}
    tokenizer = Tokenizer(models.BPE(made, merges=[("i", "n"), ("r", "e"), ("Ġ", "i"), ("'", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])  # type: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<special>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run folder with an adapter without zeros, on a tiny model whose tokenizer has merges."""

    def make(kind: str, *, tokenizer: PreTrainedTokenizerFast | None = None, targets: Any = "all-linear") -> Path:
        # The default of transformers, which its reader of GGUF takes for every Qwen3.
        monkeypatch.setitem(KINDS, "qwen3", ("Qwen3Config", {"head_dim": 128, "tie_word_embeddings": False}))
        base = make_tiny_model(tmp_path / "base", kind)
        (tokenizer or bpe_tokenizer()).save_pretrained(base)
        policy = Policy(str(base), lora=GRPOConfig(rank=8, targets=targets).lora, dtype="float32")
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for master in policy.masters:
                master.copy_(torch.randn(master.shape, generator=generator) * 0.2)
        policy.save_adapter(tmp_path / "run" / "adapter")
        config = GRPOConfig(model=str(base), rank=8, targets=targets, run_name="mine", output_dir=tmp_path / "run")
        (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
        return tmp_path / "run"

    return make


def read_back(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", "all-linear"), ("llama", ["q_proj", "lm_head"]), ("qwen2", "all-linear"), ("qwen3", "all-linear")],
)
def test_the_file_is_the_merged_model(make_run, tmp_path: Path, kind: str, targets: Any, dtype: str) -> None:
    run = make_run(kind, targets=targets)
    export_merged(read_run(run), tmp_path / "merged", dtype=dtype)
    export_merged(read_run(run), tmp_path / "gguf", dtype=dtype, as_gguf=True)
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"mine.gguf", "README.md"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    found = read_back(tmp_path / "gguf" / "mine.gguf")
    weights = {name: tensor.float() for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items()}
    ours = found.state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in weights.items())
    torch.testing.assert_close(logits(found), logits(merged), rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(found) - logits(base)).abs().max() > 0.1
    config = AutoConfig.from_pretrained(tmp_path / "gguf", gguf_file="mine.gguf")
    assert (config.rms_norm_eps, config.max_position_embeddings) == (pytest.approx(1e-6), 512)


@pytest.mark.parametrize("bos", [False, True])
def test_the_tokenizer_in_the_file_is_that_of_the_run(make_run, tmp_path: Path, bos: bool) -> None:
    run = make_run("llama", tokenizer=bpe_tokenizer(bos=bos))
    assert main(["export", str(run), "--gguf", "--output", str(tmp_path / "out")]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "base")
    ours = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="mine.gguf")
    for text in TEXTS:
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 0)
    fields = gguf.GGUFReader(tmp_path / "out" / "mine.gguf").fields
    contents = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "add_bos_token", "add_eos_token")}
    assert contents == {"pre": "gpt-2", "add_bos_token": bos, "add_eos_token": False}
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:5] == [3, 3, 3, 3, 1] and len(kinds) == len(fields["tokenizer.ggml.tokens"].contents()) == 260


def split(pattern: str) -> Any:
    without_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), without_regex])


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (split(QWEN2), "qwen2"),
        (split(LLAMA3), "llama-bpe"),
    ],
)
def test_the_way_of_splitting_has_the_name_that_llama_cpp_knows(pre_tokenizer: Any, name: str) -> None:
    from rankup.grpo.cli.export.gguf_file import _splitting

    assert _splitting(bpe_tokenizer(pre_tokenizer)) == name and name in SPLITTING.values()


def test_scaled_rope_of_llama_3(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    sizes = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        rope_parameters=rope, max_position_embeddings=512,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(sizes)
    check_supported(model.config, bpe_tokenizer())
    write_gguf(model, bpe_tokenizer(), tmp_path / "a.gguf", dtype="float32", name="a")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    factors = torch.tensor(tensors["rope_freqs.weight"].data)
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / factors, ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))[0])
    assert factors.min() == 1 and factors.max() == pytest.approx(8)


def refusal(config: Any, tokenizer: Any) -> str:
    with pytest.raises(ValueError) as caught:
        check_supported(config, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_file_cannot_hold_is_refused(tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    good, config = bpe_tokenizer(), AutoConfig.from_pretrained(tiny_model_path("llama"))
    check_supported(config, good)
    gemma = AutoConfig.from_pretrained(tiny_model_path("gemma3"))
    assert refusal(gemma, good).startswith("--gguf: models of the kind gemma3_text are not supported (llama, qwen2, qwen3")
    assert refusal(LlamaConfig(attention_bias=True), good) == "--gguf: a llama model with biases is not supported"
    yarn = LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    assert refusal(yarn, good) == "--gguf: a llama model with RoPE of the type yarn is not supported"
    assert "it is not byte-level BPE with merges" in refusal(config, AutoTokenizer.from_pretrained(tiny_model_path("llama")))
    assert "has no name for how it splits texts (a, ByteLevel without regex)" in refusal(config, bpe_tokenizer(split("a")))
    lower = bpe_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    assert "it changes texts by Lowercase" in refusal(config, lower)
    monkeypatch.setattr("rankup.grpo.cli.export.gguf_file.find_spec", lambda name: None)
    assert refusal(config, good) == '--gguf needs the package gguf: pip install "gguf>=0.17"'


def test_the_command_refuses_before_it_merges(make_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("gemma3", targets=["q_proj"])
    capsys.readouterr()
    assert main(["export", str(run), "--gguf"]) == 1
    assert capsys.readouterr().err.startswith("rankup: error: --gguf: models of the kind gemma3_text are not supported")
    assert not (run / "export").exists()


def test_the_command_prints_how_to_serve_the_file(make_run, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("llama")
    assert main(["export", str(run), "--gguf", "--dtype", "float16"]) == 0
    output = run / "export" / "gguf"
    assert f"serve it: llama-server -m {output / 'mine.gguf'}" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert "llama-server -m mine.gguf" in card and "library_name: gguf" in card and "stored in float16" in card


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_embedded_model(tmp_path: Path) -> None:
    from rankup.grpo.common.model_files import resolve_model

    path = Path(resolve_model("smollm2-135m-instruct"))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(path)
    check_supported(model.config, tokenizer)
    write_gguf(model, tokenizer, tmp_path / "a.gguf", dtype="bfloat16", name="smollm2")
    found = read_back(tmp_path / "a.gguf")
    torch.testing.assert_close(logits(found), logits(model.float()), rtol=1e-5, atol=1e-4)
    ours = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert all(ours(text).input_ids == tokenizer(text).input_ids for text in TEXTS)
