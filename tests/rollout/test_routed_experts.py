"""The experts that vLLM says it chose: those of transformers, for every token, cached or not; and what cannot be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family
from routing import LAYERS, ROUTERS, TOP_K
from transformers import AutoModelForCausalLM

from rankup.grpo.episodes.stream import Stream
from rankup.rollout.config import RolloutConfig, SamplingConfig
from rankup.rollout.routed_experts import has_experts, use_of_experts
from rankup.rollout.turns import Play, Request, Turn, play

PROMPTS = [tuple(range(10, 80)), tuple(range(100, 133)), (5, 6, 7)]
"""Of more than two blocks of the prefix cache, of one, and of none."""
SAMPLING = SamplingConfig(num_generations=5, max_completion_length=40)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family to the folder of a tiny model of it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return get


@pytest.fixture
def engine_of(make_engine, folder_of: Callable[[str], Path]) -> Callable[..., Any]:
    def get(family: str, **changes: Any) -> Any:
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        return make_engine(model=str(folder_of(family)), target_modules=attention, **{"returns_experts": True, **changes})

    return get


class Chosen:
    """The experts that transformers chooses for a sequence: sets of shape [tokens, layers, top_k], sorted."""

    def __init__(self, family: str, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._found: dict[int, torch.Tensor] = {}
        for name, module in self._model.named_modules():
            if isinstance(module, ROUTERS[family][0]):
                layer = int(name.split("layers.")[1].partition(".")[0])
                module.register_forward_hook(lambda *call, layer=layer: self._found.__setitem__(layer, call[-1][2]))

    def of(self, token_ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            self._model(input_ids=torch.tensor([list(token_ids)]))
        experts = np.zeros((len(token_ids), LAYERS, TOP_K), dtype=np.uint8)
        for layer, chosen in self._found.items():
            experts[:, layer] = chosen.numpy()
        return np.sort(experts, -1)


def share_of_differences(one: np.ndarray | None, other: np.ndarray) -> float:
    assert one is not None and one.dtype == np.uint8
    assert one.shape == other.shape
    return float((np.sort(one, -1) != other).any(-1).mean())


@pytest.mark.engine
@pytest.mark.parametrize("family", ROUTERS)
def test_every_token_has_the_experts_that_transformers_chooses(
    engine_of: Callable[..., Any], folder_of: Callable[[str], Path], family: str
) -> None:
    engine, chosen = engine_of(family), Chosen(family, folder_of(family))
    for _ in range(2):  # the second time most prompts are cached
        groups = list(engine.rollout(PROMPTS, SAMPLING, seeds=[1, 2, 3]))
        completions = [(group.prompt_token_ids, one) for group in groups for one in group.completions]
        found = [share_of_differences(c.routed_experts, chosen.of((*p, *c.token_ids[:-1]))) for p, c in completions]
        assert len(found) == 15 and max(found) < 0.02, "rounding decides where two experts score alike"
        assert np.mean(found) < 0.002
    engine.publish(lambda: None)  # forgets all prefixes
    (group,) = engine.rollout(PROMPTS[:1], SAMPLING, seeds=[1])
    one = group.completions[0]
    assert share_of_differences(one.routed_experts, chosen.of((*PROMPTS[0], *one.token_ids[:-1]))) < 0.02


@pytest.mark.engine
def test_the_turns_of_an_episode_have_the_experts_of_all_of_it(
    engine_of: Callable[..., Any], folder_of: Callable[[str], Path]
) -> None:
    engine, chosen = engine_of("qwen3-moe"), Chosen("qwen3-moe", folder_of("qwen3-moe"))

    def episode() -> Play[Stream]:
        stream = Stream(PROMPTS[0])
        for _ in range(3):
            turn: Turn = yield Request(prompt_token_ids=stream.all, max_tokens=20, seed=7, may_continue=True)
            stream.sampled(turn)
            stream.give((30, 31, 32))
        return stream

    with engine.requests(SAMPLING) as requests:
        ((_, stream),) = play(requests, [episode()])
    assert len(stream.given) == 3 and stream.routed_experts is not None
    inputs = stream.all[:-4]  # all before the last sampled token
    assert share_of_differences(stream.routed_experts, chosen.of(inputs)) < 0.02


@pytest.mark.engine
def test_stop_strings_and_preempted_requests_have_the_experts_of_their_tokens(
    engine_of: Callable[..., Any], folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has room for a few of the twelve sequences, so vLLM computes some of them again."""
    rollout = RolloutConfig(max_prompt_length=128, max_completion_length=128, kv_cache_gib=1 / 2048)
    engine, chosen = engine_of("qwen3-moe", rollout=rollout), Chosen("qwen3-moe", folder_of("qwen3-moe"))
    scheduler, preempted = engine._engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *args, **options: preempted.append(preempt(*args, **options)))
    sampling = SamplingConfig(num_generations=4, max_completion_length=120, stop=["ab", "e"])
    for group in engine.rollout(PROMPTS, sampling, seeds=[1, 2, 3]):
        for one in group.completions:
            inputs = (*group.prompt_token_ids, *one.token_ids[:-1])
            assert share_of_differences(one.routed_experts, chosen.of(inputs)) < 0.02
    assert preempted


@pytest.mark.engine
def test_an_engine_that_is_not_asked_returns_none(engine_of: Callable[..., Any]) -> None:
    (group,) = engine_of("qwen3-moe", returns_experts=False).rollout(PROMPTS[:1], SAMPLING, seeds=[1])
    assert all(one.routed_experts is None for one in group.completions)


def test_experts_are_compared_where_vllm_tells_them(folder_of: Callable[[str], Path], tiny_model_path: Any) -> None:
    moe, dense = str(folder_of("qwen3-moe")), str(tiny_model_path("llama"))
    assert has_experts(moe) and not has_experts(dense)
    auto, torch_engine = RolloutConfig(), RolloutConfig(engine="torch")
    assert use_of_experts(auto, moe, on_cpu=True) == "compare"
    nothing = [(auto, dense, True), (auto, moe, False), (torch_engine, moe, True)]
    assert {use_of_experts(rollout, model, on_cpu=on_cpu) for rollout, model, on_cpu in nothing} == {"ignore"}
    assert use_of_experts(RolloutConfig(routed_experts="ignore"), moe, on_cpu=True) == "ignore"
    v2 = RolloutConfig(routed_experts="replay", model_runner="v2")
    assert use_of_experts(v2, moe, on_cpu=False) == "replay"


@pytest.mark.parametrize(
    ("options", "kind", "on_cpu", "message"),
    [
        ({}, "llama", True, r"replay: the model has no experts: leave it out"),
        ({}, "granite4-hybrid", True, r"replay: .* on CPU for models with recurrent layers: leave it out"),
        ({"engine": "torch"}, "qwen3-moe", True, r"replay: the torch engine .* or set rollout\.engine=vllm"),
        ({}, "qwen3-moe", False, r"replay: on CUDA .* with rollout\.model_runner=v2 only: set it"),
    ],
)
def test_what_nothing_returns_cannot_be_replayed(
    folder_of: Callable[[str], Path], tiny_model_path: Any, options: dict[str, Any], kind: str, on_cpu: bool, message: str
) -> None:
    model = tiny_model_path(kind) if kind == "llama" else folder_of(kind)
    with pytest.raises(ValueError, match=rf"rollout\.routed_experts={message}"):
        use_of_experts(RolloutConfig(routed_experts="replay", **options), str(model), on_cpu=on_cpu)
