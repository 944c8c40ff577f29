"""Which layers compute together: recognised by what they compute, listed if they compute something else, equal results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.llama.modeling_llama import LlamaMLP as GatedMLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from rankup.grpo.config import LoraConfig
from rankup.grpo.memory.step_memory import fake_tensors
from rankup.grpo.model.fusing import Fusion, _activation, fuse
from rankup.grpo.model.lora_layers import ADAPTER, FusedLoRALinear, FusedMLP
from rankup.grpo.model.policy import Policy
from rankup.kernels.device import paths_of_cuda
from rankup.rollout.slots import AdapterSlot


class PlainMLP(nn.Module):
    """SwiGLU, with a factor that makes it something else unless it is 1."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class RoutedMLP(PlainMLP):
    """Takes a second input."""

    def forward(self, x: torch.Tensor, routing: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


class SizedMLP(PlainMLP):
    """Takes one width only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).view(-1, 5), self.up_proj(x).view(-1, 5)
        return self.down_proj((silu(gate) * up).view(*x.shape[:-1], -1))


class Mixer(nn.Module):
    """Something with q, k and v; `crossed`: k and v read another tensor than q."""

    def __init__(self, *, crossed: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.crossed = crossed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = x + 1 if self.crossed else x
        return self.q_proj(x) * self.k_proj(memory) + self.v_proj(memory)


class Block(nn.Module):
    def __init__(self, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.mixer(x))


ALL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def adapted(block: Block, targets: tuple[str, ...] = ALL) -> Block:
    """The block with PEFT's layers in it, a random adapter, and published slots."""
    torch.manual_seed(0)
    ranks = {name: rank for name, rank in (("k_proj", 2), ("up_proj", 3)) if name in targets}
    config = PeftLoraConfig(r=4, lora_alpha=8, target_modules=list(targets), rank_pattern=ranks)
    config._register_custom_module({nn.Linear: FusedLoRALinear})
    get_peft_model(block.double(), config)  # type: ignore[arg-type]
    for layer in block.modules():
        if isinstance(layer, FusedLoRALinear):
            nn.init.normal_(layer.master_b)
            rank, scaling = layer.rank, layer.scaling[ADAPTER]
            (rows, columns), dtype = layer.base_weight.shape, torch.float64
            layer.slot = AdapterSlot(a=torch.zeros(8, columns, dtype=dtype), b=torch.zeros(rows, 8, dtype=dtype))
            layer.slot.a[:rank] = layer.master_a.data
            layer.slot.b[:, :rank] = scaling * layer.master_b.data
    return block


def outputs_and_gradients(block: Block, x: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in block.parameters() if p.requires_grad]
    y = block(x)
    return [y, *torch.autograd.grad(y.square().sum(), parameters)]


def fused_and_compared(block: Block) -> Fusion:
    """Fuse, and compare outputs and all gradients with those of before."""
    x = torch.randn(5, 8, dtype=torch.float64)
    names, before = [name for name, _ in block.named_parameters()], outputs_and_gradients(block, x)
    fusion = fuse(block, lambda: block(x))
    assert [name for name, _ in block.named_parameters()] == names
    torch.testing.assert_close(outputs_and_gradients(block, x), before)
    return fusion


def test_layers_that_read_the_same_tensor_and_a_plain_mlp_are_fused() -> None:
    block = adapted(Block(Mixer(), PlainMLP()))
    fusion = fused_and_compared(block)
    assert (fusion.qkv, fusion.mlp, fusion.single, fusion.not_fused) == (["mixer"], ["mlp"], [], {})
    assert isinstance(block.mlp, FusedMLP)
    assert fusion.summary == "fused: 1 q/k/v, 1 MLPs, 0 single layers, 0 norms"


@pytest.mark.parametrize(
    ("targets", "qkv", "mlp", "single"),
    [
        (("q_proj", "v_proj", "up_proj"), ["mixer"], ["mlp"], []),
        (("k_proj", "down_proj"), [], ["mlp"], ["mixer.k_proj"]),
        (("q_proj", "k_proj"), ["mixer"], [], []),
        (("gate_proj",), [], ["mlp"], []),
    ],
)
def test_any_subset_of_the_projections(
    targets: tuple[str, ...], qkv: list[str], mlp: list[str], single: list[str]
) -> None:
    fusion = fused_and_compared(adapted(Block(Mixer(), PlainMLP()), targets))
    assert (fusion.qkv, fusion.mlp, fusion.single, fusion.not_fused) == (qkv, mlp, single, {})


@pytest.mark.parametrize(
    ("mlp", "reason"), [(PlainMLP(factor=2.0), "its output is not"), (RoutedMLP(), "it takes more than one input")]
)
def test_an_mlp_that_does_something_else_is_left_alone_and_listed(mlp: nn.Module, reason: str) -> None:
    block = adapted(Block(Mixer(), mlp))
    fusion = fused_and_compared(block)
    assert block.mlp is mlp and fusion.mlp == []
    assert fusion.not_fused["mlp"].startswith(reason)
    assert fusion.single == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert f"not fused: mlp ({reason}" in fusion.summary


def test_an_mlp_that_takes_one_width_only_is_left_alone() -> None:
    block = nn.ModuleDict({"mlp": SizedMLP()})
    block["mlp"].gate_proj, block["mlp"].up_proj = (nn.Linear(8, 15) for _ in range(2))
    block["mlp"].down_proj = nn.Linear(15, 8)
    config = PeftLoraConfig(r=4, target_modules=["down_proj"])
    config._register_custom_module({nn.Linear: FusedLoRALinear})
    get_peft_model(block, config)  # type: ignore[arg-type]
    fusion = fuse(block, lambda: None)
    assert fusion.mlp == [] and fusion.not_fused["mlp"].startswith("its output is not")


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()])
def test_activations_are_distinguished(act: nn.Module) -> None:
    mlp = GatedMLP(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2))
    mlp.act_fn = act
    expected = {"SiLU()": "silu", "GELU(approximate='none')": "gelu", "GELU(approximate='tanh')": "gelu_tanh"}
    assert _activation(mlp) == expected.get(repr(act))


def test_without_values_every_family_is_recognised_as_with_values(tiny_model_path, make_policy) -> None:
    """On the code paths of CUDA too: a miniature has values and takes those of the CPU."""
    for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma3"):
        path = str(tiny_model_path(kind))
        with fake_tensors(), paths_of_cuda():
            fake = Policy(path, lora=LoraConfig(rank=16))
        assert fake.fusion == make_policy(kind).fusion


def test_projections_of_different_tensors_are_left_alone_and_listed() -> None:
    fusion = fused_and_compared(adapted(Block(Mixer(crossed=True), PlainMLP())))
    assert fusion.qkv == [] and fusion.single == ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj"]
    assert fusion.not_fused == {"mixer": "q, k and v do not read the same tensor"}


@pytest.mark.parametrize(
    ("norm", "fused"),
    [(LlamaRMSNorm(8), True), (Gemma3RMSNorm(8), True), (nn.LayerNorm(8, bias=False), False)],
)
def test_norms_are_fused_only_if_they_compute_rms_norm(norm: nn.Module, fused: bool) -> None:
    model = nn.Sequential(norm).bfloat16().requires_grad_(False)
    nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    x = torch.randn(5, 8).bfloat16()
    before = model(x)
    fusion = fuse(model, lambda: model(x))
    assert (fusion.norms, "0" in fusion.not_fused) == (["0"] if fused else [], not fused)
    assert torch.equal(model(x), before)


def test_nothing_of_a_pass_is_kept_beyond_it() -> None:
    block = adapted(Block(Mixer(), PlainMLP()))
    fuse(block, lambda: block(torch.randn(5, 8, dtype=torch.float64)))
    shared = block.mixer.get_submodule("q_proj").shared_input
    assert not shared.has_unread_outputs and shared._x is None  # type: ignore[union-attr]


@pytest.mark.parametrize("norm", [Qwen3NextRMSNormGated, GraniteMoeHybridRMSNormGated])
def test_a_norm_with_a_gate_is_left_alone(norm: type[nn.Module]) -> None:
    """Also if it computes a plain norm without one."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x, x)

    model = Gated().requires_grad_(False)
    x = torch.randn(5, 8)
    before = model(x)
    assert fuse(model, lambda: model(x)).not_fused == {"norm": "its forward takes further arguments"}
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_every_family_is_fused_and_keeps_pefts_names(make_policy, tiny_model_path, tmp_path: Path, kind: str) -> None:
    policy: Policy = make_policy(kind)
    attention, mlp = ([f"model.layers.{i}.{part}" for i in range(2)] for part in ("self_attn", "mlp"))
    single = [f"{name}.o_proj" for name in attention]
    assert (policy.fusion.qkv, policy.fusion.mlp, policy.fusion.single) == (attention, mlp, single)
    per_layer = {"qwen3": 4, "gemma3": 6}.get(kind, 2)  # both norm queries and keys too; Gemma also norms what layers put out
    assert len(policy.fusion.norms) == 2 * per_layer + 1 and policy.fusion.not_fused == {}
    activation = policy.model.get_submodule(mlp[0]).activation
    assert activation == ("gelu_tanh" if kind == "gemma3" else "silu")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path(kind))
    stock = get_peft_model(base, PeftLoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *ALL[3:]]))
    assert set(policy.peft_model.state_dict()) == set(stock.state_dict())
