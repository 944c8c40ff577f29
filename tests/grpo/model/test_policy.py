"""The policy: master weights and slots, the scale, ranks, saving and loading, seeds, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sample_groups import random_groups
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM

from rankup.grpo.config import LoraConfig
from rankup.grpo.model.packing import Pack, pack, pad
from rankup.grpo.model.policy import Policy
from rankup.kernels.logprob import chunk_rows
from rankup.rollout.slots import AdapterSlot

Make = Callable[..., Policy]


@pytest.fixture
def one() -> Pack:
    (only,) = pack(random_groups([(5, [4, 1, 6]), (3, [7])]), tokens_per_pack=1000)
    return only


@pytest.fixture
def new_policy(tiny_model_path) -> Make:
    """A policy as training makes it, B = 0, with any argument of `Policy`; `lora` takes a dictionary."""

    def make(kind: str = "llama", *, lora: dict[str, Any] | None = None, **arguments: Any) -> Policy:
        options: dict[str, Any] = {"rank": 16, "alpha": 8} | (lora or {})
        arguments = {"dtype": "float32"} | arguments
        return Policy(str(tiny_model_path(kind)), lora=LoraConfig(**options), **arguments)

    return make


def logprobs(policy: Policy, one: Pack) -> torch.Tensor:
    return policy.logprobs(one)[0]


def minus_logprob(logprobs_n: torch.Tensor, _entropy_n: torch.Tensor, _chunk: slice) -> torch.Tensor:
    return -logprobs_n


def foreign_slots(policy: Policy, *, max_rank: int = 64, fill: float = 9.0) -> dict[str, AdapterSlot]:
    """Slots such as an engine has: of a higher rank, with the remains of another adapter."""
    slots = {}
    for name, layer in policy.layers.items():
        sizes = {"max_rank": max_rank, "in_features": layer.in_features, "out_features": layer.out_features}
        slots[name] = AdapterSlot.empty(**sizes, dtype=torch.float32, device="cpu")
        slots[name].a.fill_(fill)
        slots[name].b.fill_(fill)
    return slots


def storages(tensors: list[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


# Master weights and slots


def test_a_new_policy_is_the_base_model(new_policy: Make, one: Pack) -> None:
    policy = new_policy(lora={"targets": ["embed_tokens", "q_proj", "lm_head"]})
    assert torch.equal(logprobs(policy, one), policy.logprobs(one, use_adapter=False)[0])
    begins = {name: (bool(layer.master_a.any()), bool(layer.master_b.any())) for name, layer in policy.layers.items()}
    assert begins.pop("model.embed_tokens") == (False, True), "as in PEFT"
    assert set(begins.values()) == {(True, False)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_fp32_masters_are_trained(new_policy: Make, dtype: str) -> None:
    policy = new_policy(dtype=dtype)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in policy.masters}
    assert len(policy.masters) == 2 * 7 * 2, "A and B of seven projections in two layers"
    assert {p.dtype for p in policy.masters} == {torch.float32}
    assert {layer.slot.a.dtype for layer in policy.layers.values()} == {getattr(torch, dtype)}


def test_every_master_weight_has_a_role_scale_and_rank(new_policy: Make) -> None:
    targets = ["embed_tokens", "q_proj", "lm_head"]
    policy = new_policy(lora={"targets": targets, "rank_pattern": {"embed_tokens": 2, "lm_head": 4}, "alpha": 8})
    assert all(master.parameter is parameter for master, parameter in zip(policy.master_roles, policy.masters, strict=True))
    assert [(master.role, tuple(master.parameter.shape), master.scaling, master.rank) for master in policy.master_roles] == [
        ("embedding", (2, VOCABULARY), 4.0, 2),
        ("embedding", (96, 2), 4.0, 2),
        *[("a", (16, 96), 0.5, 16), ("b", (128, 16), 0.5, 16)] * 2,
        ("a", (4, 96), 2.0, 4),
        ("b", (VOCABULARY, 4), 2.0, 4),
    ]


def test_masters_and_slots_share_no_memory(make_policy: Make) -> None:
    policy = make_policy()
    for slots in (None, foreign_slots(policy)):
        if slots is not None:
            policy.attach(slots)
        policy.write_slots()
        held = [t for layer in policy.layers.values() for t in (layer.slot.a, layer.slot.b)]
        assert storages(held).isdisjoint(storages(list(policy.masters)))
        assert len(storages(held)) == len(held), "and every projection has its own"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_fifty_publishes_leave_the_masters_as_they_are(make_policy: Make, dtype: str, use_rslora: bool) -> None:
    policy = make_policy(dtype=dtype, rank=16, alpha=40, use_rslora=use_rslora)
    before = [parameter.detach().clone() for parameter in policy.masters]
    for _ in range(50):
        policy.write_slots()
    assert all(map(torch.equal, before, policy.masters))
    scaling = 40 / (4 if use_rslora else 16)
    for layer in policy.layers.values():
        assert torch.equal(layer.slot.a[:16], layer.master_a.to(layer.slot.a.dtype))
        assert torch.equal(layer.slot.b[:, :16], (scaling * layer.master_b).to(layer.slot.b.dtype))


def test_alpha_of_four_ranks_equals_four_times_b(make_policy: Make, one: Pack) -> None:
    scaled, plain = make_policy(rank=16, alpha=64), make_policy(rank=16, alpha=16)
    with torch.no_grad():
        for layer, other in zip(scaled.layers.values(), plain.layers.values(), strict=True):
            layer.master_a.copy_(other.master_a)
            other.master_b.copy_(4 * layer.master_b)
    for policy in (scaled, plain):
        policy.write_slots()
    assert torch.equal(logprobs(scaled, one), logprobs(plain, one))
    assert (logprobs(scaled, one) - scaled.logprobs(one, use_adapter=False)[0]).abs().mean() > 0.1


@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens"]])
def test_the_forward_sees_an_update_only_once_it_is_published(make_policy: Make, one: Pack, targets: str | list[str]) -> None:
    policy = make_policy(targets=targets)
    with torch.no_grad():
        for parameter in policy.masters[::2]:
            parameter.add_(0.1)  # the embedding's A begins at zero
    policy.write_slots()
    published = logprobs(policy, one)
    with torch.no_grad():
        for parameter in policy.masters:
            parameter.mul_(1.1)
    assert torch.equal(logprobs(policy, one), published)
    policy.write_slots()
    assert not torch.allclose(logprobs(policy, one), published, atol=1e-3)


def test_rank_16_in_slots_of_64_that_held_another_adapter(make_policy: Make, one: Pack) -> None:
    policy = make_policy(rank=16)
    policy.write_slots()
    expected = logprobs(policy, one)
    slots = foreign_slots(policy)
    policy.attach(slots)
    assert not any(slot.a.any() or slot.b.any() for slot in slots.values())
    for _ in range(3):
        policy.write_slots()
        assert torch.equal(logprobs(policy, one), expected)
        assert not any(slot.a[16:].any() or slot.b[:, 16:].any() for slot in slots.values())
    # The forward multiplies with the attached slots themselves.
    slots["model.layers.0.self_attn.v_proj"].b.zero_()
    assert not torch.allclose(logprobs(policy, one), expected, atol=1e-3)


def test_slots_of_projections_that_are_not_trained_are_emptied(new_policy: Make, make_policy: Make) -> None:
    """Otherwise the sampler would continue with values left by an adapter of other targets."""
    slots = foreign_slots(make_policy())
    policy = new_policy(lora={"targets": "qkv"})
    for layer in policy.layers.values():
        torch.nn.init.ones_(layer.master_b)
    policy.attach(slots)
    policy.write_slots()
    filled = {name for name, slot in slots.items() if slot.a.any() or slot.b.any()}
    assert filled == set(policy.layers) == {name for name in slots if name[-6:] in ("q_proj", "k_proj", "v_proj")}


def test_a_missing_slot_is_refused_and_changes_nothing(make_policy: Make, one: Pack) -> None:
    policy = make_policy()
    policy.write_slots()
    expected = logprobs(policy, one)
    slots = foreign_slots(policy)
    del slots["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"no adapter slot for \['model.layers.1.mlp.up_proj'\] \(1 projections in all\)"):
        policy.attach(slots)
    assert torch.equal(logprobs(policy, one), expected)


@pytest.mark.parametrize(
    ("max_rank", "width", "out"), [(8, 96, 64), (64, 97, 64), (64, 96, 128)], ids=["rank", "input", "output"]
)
def test_a_slot_that_does_not_fit_is_refused_and_changes_nothing(
    make_policy: Make, one: Pack, max_rank: int, width: int, out: int
) -> None:
    policy = make_policy()
    policy.write_slots()
    expected = logprobs(policy, one)
    slots, name = foreign_slots(policy), "model.layers.1.self_attn.k_proj"
    slots[name] = AdapterSlot(a=torch.ones(max_rank, width), b=torch.ones(out, max_rank))
    message = rf"{name}: slot of shapes \[{max_rank}, {width}\] and \[{out}, {max_rank}\] .* rank 16 from 96 to 64"
    with pytest.raises(ValueError, match=message):
        policy.attach(slots)
    assert torch.equal(logprobs(policy, one), expected)
    assert all((slot.a != 0).all() for slot in slots.values())


# Seeds


def test_the_seed_alone_decides_the_adapter(new_policy: Make) -> None:
    adapters = []
    for noise, seed in [(1, 5), (2, 5), (2, 6)]:
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        policy = new_policy(seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "others' random numbers do not depend on it"
        adapters.append(policy.masters)
    assert all(map(torch.equal, adapters[0], adapters[1]))
    assert not torch.equal(adapters[0][0], adapters[2][0])


# Saving and loading


@pytest.mark.parametrize(
    ("alpha", "use_rslora"), [(8, False), (40, False), (2.5, False), (8, True)], ids=["half", "2.5", "fraction", "rslora"]
)
def test_a_saved_adapter_is_the_same_policy_in_stock_peft(
    make_policy: Make, tiny_model_path, tmp_path: Path, alpha: float, use_rslora: bool
) -> None:
    policy = make_policy(rank=16, alpha=alpha, use_rslora=use_rslora)
    policy.write_slots()
    policy.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, alpha, use_rslora)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path("llama"), dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
        with stock.disable_adapter():
            assert not torch.allclose(policy.model(ids).logits, stock(ids).logits, atol=0.1)


def test_saving_replaces_existing_files(make_policy: Make, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    make_policy(rank=32).save_adapter(folder)
    (folder / "stale.txt").write_text("of an earlier run")
    (tmp_path / ".adapter.partial").mkdir()  # left by a run that was killed
    policy = make_policy(rank=16)
    policy.save_adapter(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert not (folder / "stale.txt").exists()
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == len(policy.masters) and {t.dtype for t in saved.values()} == {torch.float32}
    assert torch.equal(
        saved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"],
        policy.layers["model.layers.0.self_attn.q_proj"].master_b,
    )


def test_loading_gives_back_the_same_bits(make_policy: Make, new_policy: Make, tmp_path: Path, one: Pack) -> None:
    saved = make_policy()
    saved.write_slots()
    saved.save_adapter(tmp_path / "adapter")
    loaded = new_policy(seed=9)
    loaded.load_adapter(tmp_path / "adapter")
    assert all(map(torch.equal, saved.masters, loaded.masters))
    assert all(parameter.requires_grad for parameter in loaded.masters)
    loaded.write_slots()
    assert torch.equal(logprobs(loaded, one), logprobs(saved, one))


@pytest.mark.parametrize(
    ("kind", "lora", "message"),
    [
        ("llama", {"rank": 32}, "its r is 16, not 32"),
        ("llama", {"alpha": 16}, "its lora_alpha is 8, not 16"),
        ("llama", {"use_rslora": True}, "its use_rslora is False, not True"),
        ("llama", {"targets": "qkv"}, r"lora.targets, see .*layers\.0\.mlp\.down_proj"),
        ("qwen2", {}, "does not fit this model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(
    make_policy: Make, new_policy: Make, tmp_path: Path, kind: str, lora: dict[str, Any], message: str
) -> None:
    make_policy().save_adapter(tmp_path / "adapter")
    policy = new_policy(kind, lora=lora)
    before = [parameter.detach().clone() for parameter in policy.masters]
    with pytest.raises(ValueError, match=message) as caught:
        policy.load_adapter(tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, policy.masters))


def test_a_folder_without_an_adapter(new_policy: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter in .*absent: adapter_model.safetensors is missing"):
        new_policy().load_adapter(tmp_path / "absent")


# Computing


def test_gradients_add_up(make_policy: Make, one: Pack) -> None:
    policy = make_policy()
    policy.write_slots()
    policy.backward(one, minus_logprob)
    once = [parameter.grad.clone() for parameter in policy.masters if parameter.grad is not None]
    policy.backward(one, minus_logprob)
    assert len(once) == len(policy.masters)
    for parameter, gradient in zip(policy.masters, once, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", "all-linear"), ("mistral", "all-linear"), ("llama", ["embed_tokens", "up_proj"])]
)
def test_gradient_checkpointing_changes_memory_alone(new_policy: Make, kind: str, targets: str | list[str]) -> None:
    groups = random_groups([(5, [4, 1, 6]), (3, [7])])
    gradients, passes = [], []
    for gradient_checkpointing in (False, True):
        policy = new_policy(kind, lora={"targets": targets}, gradient_checkpointing=gradient_checkpointing)
        with torch.no_grad():
            for layer in policy.layers.values():
                layer.master_b.copy_(torch.linspace(-0.1, 0.1, layer.master_b.numel()).view_as(layer.master_b))
        policy.write_slots()
        count: list[int] = []
        policy.layers["model.layers.0.mlp.up_proj"].register_forward_hook(lambda *_, count=count: count.append(1))
        share = policy.shares_prompts
        packs = pack(groups, tokens_per_pack=99) if share else pad(groups, tokens_per_pack=99, pad_token_id=0)
        for one in packs:
            policy.backward(one, minus_logprob)
        gradients.append([parameter.grad for parameter in policy.masters])
        passes.append(len(count))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert passes[1] == 2 * passes[0], "activations are computed again in the backward"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_pass_that_times_kernels_recomputes_activations_too(new_policy: Make, kind: str) -> None:
    policy = new_policy(kind, gradient_checkpointing=True)
    policy.any_pass()
    assert all(master.grad is None for master in policy.masters)


# Models


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_prompts_are_shared(new_policy: Make, kind: str) -> None:
    policy = new_policy(kind)
    assert (policy.plain_reason, policy.shares_prompts) == (None, True)


def test_norm_layers_are_refused(new_policy: Make) -> None:
    with pytest.raises(ValueError, match=r"^lora.targets: model.norm cannot be adapted: LoRA does not apply to norm layers"):
        new_policy(lora={"targets": ["q_proj", "norm"]})


def test_a_target_that_the_model_does_not_have(new_policy: Make) -> None:
    with pytest.raises(ValueError, match=r"^lora.targets: LlamaForCausalLM has no layer w_proj; name some of down_proj, "):
        new_policy(lora={"targets": ["q_proj", "w_proj"]})


@pytest.mark.parametrize(
    ("targets", "projections"), [("qkv", 3), ("attention", 4), ("all-linear", 7), (["o_proj", "mlp.up_proj"], 2)]
)
def test_targets(new_policy: Make, targets: str | list[str], projections: int) -> None:
    assert len(new_policy(lora={"targets": targets}).layers) == 2 * projections


def test_the_memory_for_logits_changes_no_result(new_policy: Make) -> None:
    """A vocabulary of 260 in fp32: a MiB holds 1,008 tokens, so that 1,200 targets take two chunks."""
    (one,) = pack(random_groups([(4, [400, 400, 400])]), tokens_per_pack=2000)
    gradients = []
    for logits_mib in (1, 2):
        policy: Policy = new_policy(logits_mib=logits_mib)
        assert -(-1200 // chunk_rows(VOCABULARY, 4, policy._logits_bytes)) == (2 if logits_mib == 1 else 1)
        policy.backward(one, lambda logprobs_n, _entropy_n, chunk: -one.advantages_N[chunk] * logprobs_n)
        gradients.append([master.grad for master in policy.masters])
    torch.testing.assert_close(gradients[0], gradients[1])
