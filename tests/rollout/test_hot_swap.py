"""Known failures of adapter swapping in other projects, tested on real vLLM with tiny random models.

In fp32, so that rounding errors are far smaller than the effect of any mistake.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from rankup.grpo.model.prove import Proof, prove_slots, trainer_logprobs
from rankup.rollout.config import SamplingConfig
from rankup.rollout.slots import AdapterSlot
from rankup.rollout.vllm_compat import collections_skipped

pytestmark = pytest.mark.engine

KINDS = ["qwen2", "qwen3", "llama"]  # the tests that follow share the engine of the last one
SEQUENCES = [[5, 9, 14, 3, 77, 60, 31, 8], [7, 21, 40, 2, 90, 55]]
GREEDY = SamplingConfig(num_generations=1, max_completion_length=12, temperature=0.0)
EXACT = 3e-4  # fp32 on both sides, different kernels


def flat(logprobs: list[list[float]]) -> torch.Tensor:
    return torch.tensor([lp for sequence in logprobs for lp in sequence])


def assert_engine_holds(engine, policy):
    """The engine samples with the policy's adapter, and the adapter has an effect."""
    engine_lp = flat(engine.prompt_logprobs(SEQUENCES))
    assert engine_lp == pytest.approx(flat(trainer_logprobs(policy, SEQUENCES)), abs=EXACT)
    base_lp = flat(engine.prompt_logprobs(SEQUENCES, use_adapter=False))
    assert (engine_lp - base_lp).abs().mean() > 100 * EXACT


def masters(policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.masters]


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_of_each_projection_reaches_its_slot(make_engine, make_policy, kind):
    """Gate and up, q, k and v, biased and grouped: 7 projections a layer, one after another."""
    engine, policy = make_engine(kind), make_policy(kind)
    policy.attach(engine.slots)
    proofs = prove_slots(policy, engine, each=True)
    assert len(proofs) == 3 + len(policy.layers) == 3 + 7 * policy.model.config.num_hidden_layers
    assert all(proof.gap <= 0.01 * proof.effect for proof in proofs), max(proofs, key=lambda p: p.gap / p.effect)


class CorruptedEngine:
    """The engine with slots that are corrupted after each publish."""

    def __init__(self, engine, corrupt) -> None:
        self._engine, self._corrupt = engine, corrupt

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def publish(self, write_slots):
        return self._engine.publish(lambda: (write_slots(), self._corrupt(self._engine.slots)))


def scaled(factor):
    def corrupt(slots):
        for slot in slots.values():
            slot.b.mul_(factor)

    return corrupt


def gate_for_up(slots):
    for name, slot in slots.items():
        if name.endswith("gate_proj"):
            other = slots[name.replace("gate_proj", "up_proj")]
            for one, two in ((slot.a, other.a), (slot.b, other.b)):
                one_before = one.clone()
                one.copy_(two)
                two.copy_(one_before)


def one_publish_late():
    late: list[torch.Tensor] = []

    def corrupt(slots):
        now = [t for slot in slots.values() for t in (slot.a, slot.b)]
        fresh = [t.clone() for t in now]
        for tensor, before in zip(now, late or [torch.zeros_like(t) for t in now], strict=True):
            tensor.copy_(before)
        late[:] = fresh

    return corrupt


@pytest.mark.parametrize("corrupt", [scaled(2.0), scaled(0.5), gate_for_up, one_publish_late()])
def test_corrupted_slots_are_detected_before_a_run(make_engine, make_policy, corrupt):
    """Trainer and engine have separate slots here, so that only the engine's are wrong."""
    engine, policy = make_engine(), make_policy()

    def write_both():
        policy.write_slots()
        for name, layer in policy.layers.items():
            engine.slots[name].a.copy_(layer.slot.a)
            engine.slots[name].b.copy_(layer.slot.b)

    policy.attach({name: AdapterSlot(slot.a.clone(), slot.b.clone()) for name, slot in engine.slots.items()})
    wrong = CorruptedEngine(engine, corrupt)
    publish = wrong.publish
    wrong.publish = lambda write_slots: publish(write_both)
    with pytest.raises(RuntimeError, match="does not sample from the policy"):
        prove_slots(policy, wrong)  # type: ignore[arg-type]
    wrong.publish = lambda write_slots: engine.publish(write_both)
    prove_slots(policy, wrong)  # type: ignore[arg-type]


def test_the_tolerance_for_a_projection_with_little_effect_is_its_rounding_error():
    assert Proof(what="k_proj", gap=0.069, effect=0.127, noise=0.060).holds, "measured with correct slots"
    assert not Proof(what="all", gap=0.069, effect=0.127).holds
    assert not Proof(what="k_proj", gap=0.180, effect=0.127, noise=0.060).holds, "the adapter of another projection"
    assert not Proof(what="k_proj", gap=0.069, effect=0.070, noise=0.060).holds, "no effect beyond rounding"
    assert not Proof(what="k_proj", gap=0.0, effect=0.0, noise=0.0).holds


@pytest.mark.parametrize("first, second", [("gate_proj", "up_proj"), ("k_proj", "v_proj")])
def test_two_swapped_slots_of_equal_shape_are_detected(make_engine, make_policy, first, second):
    engine, policy = make_engine(), make_policy()
    slots = dict(engine.slots)
    for name in [n for n in slots if n.endswith(first)]:
        other = name.replace(first, second)
        assert slots[name].b.shape == slots[other].b.shape, "equal shapes: no other check detects this"
        slots[name], slots[other] = slots[other], slots[name]
    policy.attach(slots)
    with pytest.raises(RuntimeError, match="does not sample from the policy"):
        prove_slots(policy, engine)


def test_a_trainer_without_the_engines_slots_is_detected(make_engine, make_policy):
    """Otherwise the engine would sample from the base model while all metrics look normal."""
    engine, policy = make_engine(), make_policy()
    for slot in engine.slots.values():
        slot.b.zero_()
    with pytest.raises(RuntimeError, match="does not sample from the policy"):
        prove_slots(policy, engine)


def test_proving_does_not_change_the_policy(make_engine, make_policy):
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    before = masters(policy)
    prove_slots(policy, engine)
    assert all(torch.equal(a, b) for a, b in zip(before, masters(policy), strict=True))
    assert_engine_holds(engine, policy)


def test_publishing_repeatedly_changes_neither_master_weights_nor_policy(make_engine, make_policy):
    """A scaling that was multiplied in place would compound with every publish."""
    engine, policy = make_engine(), make_policy(rank=16, alpha=64)
    policy.attach(engine.slots)
    owned = {p.untyped_storage().data_ptr() for p in policy.masters}
    shared = {t.untyped_storage().data_ptr() for s in engine.slots.values() for t in (s.a, s.b)}
    assert not owned & shared
    before = masters(policy)
    engine.publish(policy.write_slots)
    first = engine.prompt_logprobs(SEQUENCES)
    for _ in range(20):
        engine.publish(policy.write_slots)
    assert engine.prompt_logprobs(SEQUENCES) == first
    assert all(torch.equal(a, b) for a, b in zip(before, masters(policy), strict=True))


def test_the_scaling_is_applied_exactly_once(make_engine, make_policy):
    engine = make_engine()
    at_four, at_one = make_policy(rank=16, alpha=64), make_policy(rank=16, alpha=16)
    with torch.no_grad():
        for one, four in zip(at_one.layers.values(), at_four.layers.values(), strict=True):
            one.lora_A["default"].weight.copy_(four.lora_A["default"].weight)
            one.lora_B["default"].weight.copy_(4.0 * four.lora_B["default"].weight)
    answers = []
    for policy in (at_four, at_one):
        policy.attach(engine.slots)
        engine.publish(policy.write_slots)
        assert_engine_holds(engine, policy)
        answers.append(flat(engine.prompt_logprobs(SEQUENCES)))
    assert answers[0] == pytest.approx(answers[1], abs=EXACT)


def test_the_engine_follows_the_policy_over_several_steps(make_engine, make_policy):
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    answers = []
    for _ in range(3):
        engine.publish(policy.write_slots)
        assert_engine_holds(engine, policy)
        answers.append(engine.prompt_logprobs(SEQUENCES))
        with torch.no_grad():
            for master in policy.masters:
                master += 0.05 * torch.randn_like(master)
    assert answers[0] != answers[1] != answers[2]


def test_cached_keys_and_values_of_the_previous_policy_are_not_reused(make_engine, make_policy):
    engine, first, second = make_engine(), make_policy(seed=1), make_policy(seed=2)
    long_prompt = [(7 * i) % 90 + 5 for i in range(130)]  # several cache blocks
    first.attach(engine.slots)
    engine.publish(first.write_slots)
    list(engine.rollout([long_prompt], GREEDY))
    second.attach(engine.slots)
    second.write_slots()  # without a publish: the cache still holds the first policy's keys
    (stale,) = engine.rollout([long_prompt], GREEDY)
    engine.publish(second.write_slots)
    (fresh,) = engine.rollout([long_prompt], GREEDY)
    ids = [*long_prompt, *fresh.completions[0].token_ids]
    expected = trainer_logprobs(second, [ids])[0][len(long_prompt) - 1 :]
    assert list(fresh.completions[0].logprobs) == pytest.approx(expected, abs=EXACT)
    assert stale.completions[0].logprobs[0] != pytest.approx(fresh.completions[0].logprobs[0], abs=10 * EXACT)


def test_nothing_is_read_or_written_while_publishing_and_sampling(make_engine, make_policy):
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    list(engine.rollout(SEQUENCES, GREEDY))
    opened: list[str] = []
    listening = True

    def hook(event: str, arguments: tuple) -> None:
        if listening and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)  # cannot be removed, only disabled
    for _ in range(3):
        engine.publish(policy.write_slots)
        list(engine.rollout(SEQUENCES, GREEDY))
    listening = False
    assert [path for path in opened if not path.startswith(("/proc", "/sys"))] == []


def test_an_evicted_adapter_is_restored(make_engine, make_policy):
    """vLLM would refill the buffers with the zero adapter that was registered."""
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)

    def evict(model):
        return model.lora_manager.deactivate_adapter(1)

    assert engine._apply_model(evict)
    assert_engine_holds(engine, policy)


def test_another_adapter_cannot_evict_the_pinned_one(make_engine, make_policy, tmp_path):
    from vllm.lora.request import LoRARequest

    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    policy.save_adapter(tmp_path / "adapter")
    with pytest.raises(Exception, match=r"(?i)pinned|no free"):
        engine._engine.add_lora(LoRARequest("other", 2, str(tmp_path / "adapter")))
    assert_engine_holds(engine, policy)


def test_an_empty_slot_has_the_shapes_of_a_vllm_slot(make_engine):
    slot = next(iter(make_engine().slots.values()))
    empty = AdapterSlot.empty(
        max_rank=slot.max_rank,
        in_features=slot.a.shape[1],
        out_features=slot.b.shape[0],
        dtype=slot.a.dtype,
        device="cpu",
    )
    assert (empty.a.shape, empty.b.shape, empty.a.dtype) == (slot.a.shape, slot.b.shape, slot.a.dtype)


@pytest.mark.parametrize("max_rank, ranks", [(64, (64, 16, 40)), (128, (128, 96, 16))])
def test_publishing_a_smaller_rank_clears_the_larger_one(make_engine, make_policy, max_rank, ranks):
    engine = make_engine(max_rank=max_rank)
    for rank in ranks:
        policy = make_policy(rank=rank, max_rank=max_rank)
        policy.attach(engine.slots)
        engine.publish(policy.write_slots)
        assert_engine_holds(engine, policy)
        assert all(not s.a[rank:].any() and not s.b[:, rank:].any() for s in engine.slots.values())


def test_a_removed_adapter_is_an_error_and_not_the_base_model(make_engine, make_policy, engine_shelf):
    engine, policy = make_engine(max_rank=128), make_policy(max_rank=128)  # the engine of the last test: no other one uses it
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    engine._engine.remove_lora(1)
    with pytest.raises(RuntimeError, match="removed from vLLM"):
        list(engine.rollout(SEQUENCES, GREEDY))
    engine_shelf.close()  # other tests must not use this engine


def test_adapter_files_in_the_working_directory_are_not_loaded(make_engine, make_policy, engine_shelf, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 999}))
    monkeypatch.chdir(tmp_path)
    engine_shelf.close()
    engine, policy = make_engine(), make_policy(rank=16, alpha=8)
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    assert_engine_holds(engine, policy)
    policy.save_adapter(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (16, 8)


def test_base_weights_do_not_drift(make_engine, make_policy):
    engine, policy = make_engine(), make_policy()
    policy.attach(engine.slots)
    base = {n: p.detach().clone() for n, p in policy.model.named_parameters() if "lora_" not in n}
    before = engine.prompt_logprobs(SEQUENCES, use_adapter=False)
    for _ in range(10):
        with torch.no_grad():
            for master in policy.masters:
                master += 0.05 * torch.randn_like(master)
        engine.publish(policy.write_slots)
        list(engine.rollout(SEQUENCES, GREEDY))
    assert engine.prompt_logprobs(SEQUENCES, use_adapter=False) == before
    after = {n: p for n, p in policy.model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(base[name], after[name]) for name in base)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # irrelevant: nothing is merged
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *((kind, "all-linear") for kind in reversed(KINDS)),
        *((kind, ["embed_tokens", "v_proj", "lm_head"]) for kind in ("llama", "qwen3")),
    ],
)
def test_stock_peft_and_stock_vllm_compute_the_same_with_the_saved_adapter(
    make_engine, make_policy, engine_shelf, tiny_model_path, tmp_path: Path, kind, targets
):
    policy = make_policy(kind, alpha=64, targets=targets)
    engine = make_engine(kind) if targets == "all-linear" else make_engine(kind, target_modules=tuple(targets))
    if "embed_tokens" in targets:  # its A is initialized to zero
        torch.nn.init.normal_(policy.layers["model.embed_tokens"].master_a, generator=torch.Generator().manual_seed(0))
    policy.attach(engine.slots)
    engine.publish(policy.write_slots)
    groups = sorted(engine.rollout(SEQUENCES, GREEDY), key=lambda group: group.index)
    ours = [list(group.completions[0].token_ids) for group in groups]
    policy.save_adapter(tmp_path / "adapter")
    assert _stock_peft(tiny_model_path(kind), tmp_path / "adapter") == ours
    with collections_skipped():  # eight of half a second each
        engine_shelf.close()
        assert _stock_vllm(tiny_model_path(kind), tmp_path / "adapter") == ours


def _stock_peft(model: Path, adapter: Path) -> list[list[int]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    peft_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), str(adapter)
    )
    answers = []
    for ids in SEQUENCES:
        out = peft_model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


def _stock_vllm(model: Path, adapter: Path) -> list[list[int]]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(model), dtype="float32", enable_lora=True, max_lora_rank=64, max_model_len=64,
        kv_cache_memory_bytes=64 * 2**20, enforce_eager=True, use_tqdm_on_load=False,
    )  # fmt: skip
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in SEQUENCES],
        SamplingParams(temperature=0.0, max_tokens=12),
        lora_request=LoRARequest("saved", 1, str(adapter)),
        use_tqdm=False,
    )
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return answers
