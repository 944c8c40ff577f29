"""Loading the frozen base: the same model whether its weights come from its files or from somebody else's memory."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_groups import random_groups
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankup.grpo.common.errors import BaseWeightsModifiedError
from rankup.grpo.config import LoraConfig
from rankup.grpo.model.base_model import load_base, nf4_names, round_to_nf4
from rankup.grpo.model.lora_layers import Nf4Linear
from rankup.grpo.model.packing import pack
from rankup.grpo.model.policy import Policy
from rankup.kernels.nf4 import BLOCKSIZE, Nf4Weight

KINDS = ["llama", "qwen2", "qwen3", "gemma2", "cohere", "granite"]
IDS = torch.arange(5, 25)[None]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plain(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_weights_of_another_model_it_computes_the_same_bits(tiny_model_path, kind: str) -> None:
    other = plain(tiny_model_path(kind))
    weights = {name: p.detach() for name, p in other.named_parameters()}
    base = load_base(tiny_model_path(kind), dtype=torch.float32, shared=weights)
    assert torch.equal(logits(base.model), logits(other))
    assert base.unshared == () and base.unshared_bytes == 0
    assert base.shared_bytes == sum(4 * p.numel() for p in weights.values())
    assert {name: p.data_ptr() for name, p in base.model.named_parameters()} == {n: w.data_ptr() for n, w in weights.items()}
    assert base.model.config.to_dict() == other.config.to_dict()
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_offered_or_do_not_fit_come_from_the_files(tiny_model_path, kind: str) -> None:
    other = plain(tiny_model_path(kind))
    offered = {name: p.detach() for name, p in other.named_parameters() if "mlp" not in name}
    offered["model.norm.weight"] = offered["model.norm.weight"].double()
    wrong = next(name for name in offered if name.endswith("o_proj.weight"))
    offered[wrong] = offered[wrong][:-1]
    base = load_base(tiny_model_path(kind), dtype=torch.float32, shared=offered)
    assert {name for name in base.unshared if "mlp" not in name} == {"model.norm.weight", wrong}
    assert torch.equal(logits(base.model), logits(other))
    assert base.unshared_bytes + base.shared_bytes == sum(4 * p.numel() for p in other.parameters())


def test_weights_in_several_files(tiny_model_path, tmp_path: Path) -> None:
    plain(tiny_model_path("qwen2")).save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    base = load_base(str(tmp_path / "parts"), dtype=torch.float32, load_in="nf4")
    from_files = load_base(tiny_model_path("qwen2"), dtype=torch.float32, load_in="nf4")
    assert torch.equal(logits(base.model), logits(from_files.model))


def test_a_shared_weight_that_is_not_that_of_the_files_is_not_taken(tiny_model_path) -> None:
    """As where vLLM keeps a norm's weight plus 1: the same shape, and it would agree with itself."""
    other = plain(tiny_model_path("llama"))
    offered = {name: p.detach().clone() for name, p in other.named_parameters()}
    offered["model.norm.weight"] += 1
    offered["model.layers.1.mlp.up_proj.weight"][-1] = 0
    base = load_base(tiny_model_path("llama"), dtype=torch.float32, shared=offered)
    assert set(base.unshared) == {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    assert torch.equal(logits(base.model), logits(other))


@pytest.mark.parametrize("load_in", [None, "nf4"])
def test_an_untied_head_stays_untied_despite_the_configuration(tiny_model_path, tmp_path: Path, load_in: Any) -> None:
    """The configuration ties it, the files have two: transformers and vLLM take them apart, if they differ."""
    for scale in (1.0, 2.0):
        folder = tmp_path / str(scale)
        shutil.copytree(tiny_model_path("llama"), folder)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = scale * weights["model.embed_tokens.weight"].flip(0 if scale == 2.0 else ())
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shared = {name: p.detach() for name, p in plain(folder).named_parameters() if "proj" not in name}
        model = load_base(str(folder), dtype=torch.float32, load_in=load_in, shared=shared).model
        reference = plain(folder)
        if load_in == "nf4":
            round_to_nf4(reference, str(folder), torch.float32)
        assert torch.equal(logits(model), logits(reference))
        assert (model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")) is (scale == 1.0)


# ---------------------------------------------------------------------------------------------------------- in 4 bits


@pytest.mark.parametrize("kind", KINDS)
def test_in_4_bits_it_computes_with_the_rounded_weights(tiny_model_path, kind: str) -> None:
    base = load_base(tiny_model_path(kind), dtype=torch.float32, load_in="nf4")
    names = nf4_names(tiny_model_path(kind))
    assert {name.split(".")[-2] for name in names} == set(LINEAR) and len(names) == 2 * len(LINEAR)
    rounded = plain(tiny_model_path(kind))
    for name in names:
        weight = rounded.get_parameter(name)
        weight.data = Nf4Weight.quantise(weight.data).dense()
        assert isinstance(base.model.get_submodule(name.removesuffix(".weight")), Nf4Linear)
    assert torch.equal(logits(base.model), logits(rounded))
    sizes = [rounded.get_parameter(name).numel() for name in names]
    others = sum(p.numel() for p in rounded.parameters()) - sum(sizes)
    assert base.unshared_bytes == sum(math.ceil(n / 2) + 4 * math.ceil(n / BLOCKSIZE) for n in sizes) + 4 * others


def test_shared_weights_are_not_quantised(tiny_model_path) -> None:
    other = plain(tiny_model_path("llama"))
    offered = {name: p.detach() for name, p in other.named_parameters() if "layers.1" not in name}
    base = load_base(tiny_model_path("llama"), dtype=torch.float32, load_in="nf4", shared=offered)
    kinds = {name: type(base.model.get_submodule(f"model.layers.{n}.mlp.up_proj")) for n, name in enumerate(("shared", "own"))}
    assert kinds == {"shared": torch.nn.Linear, "own": Nf4Linear}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_a_policy_on_4_bits_has_the_gradients_of_one_on_the_rounded_weights(
    tiny_model_path, tmp_path: Path, targets: str | list[str]
) -> None:
    """Adapted or not, fused or not: layers multiply with the same numbers, so nothing differs by a bit."""
    shutil.copytree(tiny_model_path("qwen2"), tmp_path / "rounded")
    file = tmp_path / "rounded" / "model.safetensors"
    weights = load_file(file)
    for name in nf4_names(str(tmp_path / "rounded")):
        weights[name] = Nf4Weight.quantise(weights[name]).dense()
    save_file(weights, file, metadata={"format": "pt"})
    lora = LoraConfig(rank=8, targets=targets, init_lora_weights="gaussian")
    (one,) = pack(random_groups([(5, [4, 1, 6]), (3, [7])]), tokens_per_pack=1000)
    gradients = []
    packed = Policy(str(tiny_model_path("qwen2")), lora=lora, dtype="float32", load_in="nf4")
    for policy in (packed, Policy(str(tmp_path / "rounded"), lora=lora, dtype="float32")):
        with torch.no_grad():
            for master in policy.masters:
                master.copy_(torch.randn(master.shape, generator=torch.Generator().manual_seed(len(master))) / 9)
        policy.write_slots()
        _, logprobs, _ = policy.backward(one, lambda logprobs_N, *_: -logprobs_N)
        gradients.append([logprobs, *(master.grad for master in policy.masters)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().sum() > 0 for g in gradients[0])


def test_files_that_name_weights_otherwise(tiny_model_path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_path("llama"), tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    save_file({f"backbone.{name}": weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"name the weights differently from transformers \(no model\.embed_tokens\.weight\)"):
        load_base(str(tmp_path / "other"), dtype=torch.float32, load_in="nf4")
    with pytest.raises(ValueError, match=r"model\.load_in: .* \(no model\.layers\.0\."):
        nf4_names(str(tmp_path / "other"))
    file.unlink()
    with pytest.raises(ValueError, match="has no safetensors"):
        nf4_names(str(tmp_path / "other") + "/.")


# -------------------------------------------------------------------------------------------- writes into base weights


def test_writes_into_base_weights_are_found(make_policy) -> None:
    policy = make_policy()
    policy.write_slots()
    assert policy.base.written() == []
    with torch.no_grad():
        policy.model.get_submodule("model.layers.1.mlp.up_proj").get_base_layer().weight[3, 4] += 1
    with pytest.raises(BaseWeightsModifiedError, match=r"1 base weights were modified.*layers\.1\.mlp\.up_proj.* resume"):
        policy.write_slots()


def test_writes_that_torch_does_not_count_are_found_when_the_adapter_is_saved(make_policy, tmp_path: Path) -> None:
    policy = make_policy()
    policy.save_adapter(tmp_path / "before")
    policy.model.get_submodule("model.layers.1.mlp.up_proj").get_base_layer().weight.data[3, 4] += 1
    policy.write_slots()
    with pytest.raises(BaseWeightsModifiedError, match="base weights were modified"):
        policy.save_adapter(tmp_path / "after")
    assert policy.base.written(thoroughly=True) == ["model.layers.1.mlp.up_proj.weight"]
    assert not (tmp_path / "after").exists()


def test_an_adapter_is_not_merged_into_the_base(make_policy) -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="rankup export RUN --merge"):
        policy.peft_model.merge_adapter()
    assert policy.base.written() == []
