"""Joined LoRA buffers: one pair for each projection of transformers, and the same output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankup.rollout.lora_slices import join_slices

RANK, D_IN = 4, 6
PACKED = {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"], "in_proj": ["in_proj"], "qkv_proj": ["q_proj", "k_proj"]}


def make_layer(*slices: int) -> Any:
    """What `join_slices` uses of vLLM's layers."""
    layer = SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(1, 1, RANK, D_IN) for _ in slices),
        lora_b_stacked=tuple(torch.zeros(1, 1, width, RANK) for width in slices),
        output_slices=slices,
        n_slices=len(slices),
    )

    def reset_lora(index: int) -> None:
        for buffer in (*layer.lora_a_stacked, *layer.lora_b_stacked):
            buffer[index] = 0

    layer.reset_lora = reset_lora
    return layer


def widths_of(layer: Any) -> list[int]:
    assert len(layer.lora_a_stacked) == len(layer.lora_b_stacked) == layer.n_slices
    assert all(a.shape == (1, 1, RANK, D_IN) for a in layer.lora_a_stacked)
    assert tuple(b.shape[2] for b in layer.lora_b_stacked) == layer.output_slices
    return list(layer.output_slices)


def test_slices_of_a_projection_are_joined():
    delta_net, mamba = make_layer(2, 2, 5, 5), make_layer(3, 7, 1)
    widths = {"m.0.in_proj_qkv": 9, "m.0.in_proj_z": 5, "m.1.in_proj": 11}
    join_slices({"m.0.in_proj_qkvz": delta_net, "m.1.in_proj": mamba}, PACKED, lambda: widths)
    assert widths_of(delta_net) == [9, 5]
    assert widths_of(mamba) == [11]


def test_layers_that_fit_are_left_alone():
    layer, head = make_layer(4, 2), SimpleNamespace(lora_a_stacked=torch.zeros(1, 1, RANK, D_IN))
    buffers = layer.lora_a_stacked

    def no_widths() -> dict[str, int]:
        raise AssertionError("the model is built for them")

    join_slices({"m.0.qkv_proj": layer, "logits_processor": head}, PACKED, no_widths)
    assert layer.lora_a_stacked is buffers and widths_of(layer) == [4, 2]


@pytest.mark.parametrize("widths", [{}, {"m.0.in_proj_qkv": 9}, {"m.0.in_proj_qkv": 8, "m.0.in_proj_z": 5}])
def test_a_layer_whose_projections_are_unknown_is_left_alone(widths: dict[str, int]):
    layer = make_layer(2, 2, 5, 5)
    join_slices({"m.0.in_proj_qkvz": layer}, PACKED, lambda: widths)
    assert widths_of(layer) == [2, 2, 5, 5]


def test_a_joined_layer_takes_adapters_of_files():
    layer, one = make_layer(2, 2, 5, 5), make_layer(3, 7, 1)
    widths = {"in_proj_qkv": 9, "in_proj_z": 5, "in_proj": 11}
    join_slices({".in_proj_qkvz": layer, ".in_proj": one}, PACKED, lambda: {f".{name}": w for name, w in widths.items()})
    a, b = torch.randn(2, D_IN), torch.randn(9, 2)
    layer.set_lora(0, [a, None], [b, None])
    assert torch.equal(layer.lora_a_stacked[0][0, 0, :2], a) and torch.equal(layer.lora_b_stacked[0][0, 0, :, :2], b)
    assert not layer.lora_a_stacked[1].any() and not layer.lora_b_stacked[1].any()
    layer.set_lora(0, [None, None], [None, None])
    assert not layer.lora_b_stacked[0].any(), "nothing is left of an earlier adapter"
    whole = torch.randn(11, 2)
    one.set_lora(0, a, whole)
    assert torch.equal(one.lora_b_stacked[0][0, 0, :, :2], whole)
