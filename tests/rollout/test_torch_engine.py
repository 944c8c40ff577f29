"""The engine in plain torch: sampling options, seeds, ends, waves; and that vLLM samples the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from tiny_models import tiny_tokenizer

from rankup.grpo.data.groups import Group
from rankup.grpo.data.prompts import Prompt
from rankup.grpo.model.packing import pack
from rankup.grpo.model.policy import Policy
from rankup.grpo.model.prove import trainer_logprobs
from rankup.rollout.config import SamplingConfig
from rankup.rollout.torch_engine import TorchEngine, check_cache, eos_token_ids
from rankup.rollout.torch_requests import sample_inverse_cdf, warpers
from rankup.rollout.types import PromptGroup

PROMPTS = [[5, 9, 14, 3], [7, 21, 40], [11, 12, 13, 14, 15]]
EOS, UNK = 2, 3
Make = Callable[..., TorchEngine]


@pytest.fixture
def make(make_policy, tiny_model_path) -> Make:
    """A torch engine of a kind of tiny model, with a strong random adapter."""

    def made(kind: str = "llama", *, max_num_seqs: int = 32, max_model_length: int = 256, **policy: Any) -> TorchEngine:
        engine = TorchEngine(
            make_policy(kind, **policy),
            str(tiny_model_path(kind)),
            max_num_seqs=max_num_seqs,
            max_model_length=max_model_length,
        )
        engine.publish(engine._policy.write_slots)  # type: ignore[attr-defined]
        return engine

    return made


def policy_of(engine: TorchEngine) -> Policy:
    assert isinstance(engine._policy, Policy)
    return engine._policy


def settings(**changes: Any) -> SamplingConfig:
    return SamplingConfig(**{"num_generations": 4, "max_completion_length": 12, **changes})


def by_index(engine: Any, prompts: list[list[int]], sampling: SamplingConfig, **options: Any) -> list[PromptGroup]:
    return sorted(engine.rollout(prompts, sampling, **options), key=lambda group: group.index)


def p_value(observed: torch.Tensor, expected: torch.Tensor, degrees: int) -> float:
    """Pearson's chi-square test."""
    statistic = ((observed - expected) ** 2 / expected).sum().double()
    return torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), statistic / 2).item()


# ----------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "cohere", "granite"])
def test_log_probabilities_are_the_trainers(make: Make, kind: str) -> None:
    engine = make(kind)
    for group in engine.rollout(PROMPTS, settings(), seeds=[1, 2, 3]):
        sequences = [[*group.prompt_token_ids, *completion.token_ids] for completion in group.completions]
        prompt = len(group.prompt_token_ids) - 1
        assert engine.prompt_logprobs(sequences) == [
            pytest.approx(one, abs=1e-4) for one in trainer_logprobs(policy_of(engine), sequences)
        ]
        for completion, logprobs in zip(group.completions, engine.prompt_logprobs(sequences), strict=True):
            assert list(completion.logprobs) == pytest.approx(logprobs[prompt:], abs=1e-4)


def test_without_the_adapter_it_is_the_base_model(make: Make) -> None:
    engine = make()
    base, adapted = (engine.prompt_logprobs(PROMPTS, use_adapter=use)[0] for use in (False, True))
    assert base == pytest.approx(trainer_logprobs(policy_of(engine), PROMPTS, use_adapter=False)[0], abs=1e-4)
    assert base != pytest.approx(adapted, abs=0.1)
    (group,) = engine.rollout(PROMPTS[:1], settings(num_generations=1), seeds=[1], use_adapter=False)
    ids = [*group.prompt_token_ids, *group.completions[0].token_ids]
    (expected,) = engine.prompt_logprobs([ids], use_adapter=False)
    assert list(group.completions[0].logprobs) == pytest.approx(expected[3:], abs=1e-4)


def test_tokens_depend_on_the_seed_and_not_on_what_is_sampled_beside_them(make: Make) -> None:
    groups = by_index(make(), PROMPTS, settings(), seeds=[1, 2, 3])
    assert len({completion.token_ids for completion in groups[0].completions}) > 1
    for max_num_seqs in (1, 4, 9):
        again = by_index(make(max_num_seqs=max_num_seqs), PROMPTS, settings(), seeds=[1, 2, 3])
        assert [[c.token_ids for c in g.completions] for g in again] == [[c.token_ids for c in g.completions] for g in groups]
    (alone,) = make().rollout(PROMPTS[1:2], settings(), seeds=[2])
    assert [c.token_ids for c in alone.completions] == [c.token_ids for c in groups[1].completions]
    other = by_index(make(), PROMPTS, settings(), seeds=[4, 5, 6])
    assert [c.token_ids for c in other[0].completions] != [c.token_ids for c in groups[0].completions]


def test_a_model_with_gradient_checkpointing_samples_the_same_also_in_training_mode(make: Make, make_policy) -> None:
    engine = make()
    expected = by_index(engine, PROMPTS, settings(), seeds=[1, 2, 3])
    policy_of(engine).model.gradient_checkpointing_enable()
    policy_of(engine).model.train()
    assert by_index(engine, PROMPTS, settings(), seeds=[1, 2, 3]) == expected


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 20, "top_p": 0.8, "temperature": 2}],
)
def test_sampled_frequencies_are_the_probabilities(options: dict[str, float]) -> None:
    logits_1V = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    unused: Any = torch.zeros(1, 1, dtype=torch.long)
    logprobs_1V = warpers(settings(**options))(unused, cast(torch.FloatTensor, logits_1V)).log_softmax(-1)
    count = 40_000
    uniforms_B = torch.rand(count, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tokens_B = sample_inverse_cdf(logprobs_1V.expand(count, -1), uniforms_B)
    observed, expected = tokens_B.bincount(minlength=40), logprobs_1V[0].double().exp() * count
    possible = expected > 0
    assert observed[~possible].sum() == 0, "tokens that an option excludes are never sampled"
    assert p_value(observed[possible], expected[possible], int(possible.sum()) - 1) > 1e-4


def test_the_ends_of_the_unit_interval_pick_possible_tokens() -> None:
    logprobs_BV = torch.tensor([[-torch.inf, 0.5, 0.5, -torch.inf]]).log_softmax(-1).expand(2, -1)
    tokens_B = sample_inverse_cdf(logprobs_BV, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert tokens_B.tolist() == [1, 2]


def test_groups_are_handed_on_as_they_finish_and_the_rest_can_be_left(make: Make) -> None:
    engine = make(max_num_seqs=2)
    iterator: Any = engine.rollout([[5], [6], [7]], settings(num_generations=1, max_completion_length=3), seeds=[1, 2, 3])
    assert next(iterator).index in (0, 1)
    with policy_of(engine).packed():  # the trainer may compute meanwhile
        assert policy_of(engine).model.config._attn_implementation == "rankup_shared_prompt"
    iterator.close()


def test_greedy_sampling_draws_no_random_numbers(make: Make) -> None:
    engine, before = make(), torch.get_rng_state()
    groups = by_index(engine, PROMPTS, settings(num_generations=2, temperature=0.0))
    assert torch.get_rng_state().equal(before)
    assert all(group.completions[0].token_ids == group.completions[1].token_ids for group in groups)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}),
        ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    ],
)
def test_a_model_with_other_layers_than_attention_is_refused(name: str, sizes: dict[str, int]) -> None:
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(vocab_size=50, **sizes))
    with pytest.raises(ValueError, match=r"rollout\.engine=torch runs models with attention layers only"):
        check_cache(model)


# ---------------------------------------------------------------------------------------------------------------- ends


def test_all_end_tokens_of_the_model_end_a_completion(make: Make, tiny_model_path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_path("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(100, 110)]}))
    engine = make()
    engine._eos_token_ids = eos_token_ids(str(folder), engine._tokenizer)
    assert engine._eos_token_ids == {2, *range(100, 110)}
    completions = [c for g in engine.rollout(PROMPTS, settings(), seeds=[1, 2, 3]) for c in g.completions]
    for completion in completions:
        ends = [place for place, token in enumerate(completion.token_ids) if token in engine._eos_token_ids]
        if completion.finish_reason == "stop":
            assert ends == [len(completion.token_ids) - 1]
            assert completion.text == engine._tokenizer.decode(list(completion.token_ids[:-1]), skip_special_tokens=True)
        else:
            assert not ends and len(completion.token_ids) == 12
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_of_stop_strings_that_end_together_the_first_one_listed_counts(make: Make) -> None:
    engine = make()
    (free,) = engine.rollout(PROMPTS[:1], settings(num_generations=8), seeds=[1])
    pairs = [(c.text, at) for c in free.completions for at in range(1, len(c.text)) if c.text[: at + 1].isascii()]
    text, at = next((text, at) for text, at in pairs if text.index(text[at]) == at)
    short, long = text[at], text[at - 1 : at + 1]
    for stop, expected in (([short, long], text[:at]), ([long, short], text[: at - 1])):
        (stopped,) = engine.rollout(PROMPTS[:1], settings(num_generations=8, stop=stop), seeds=[1])
        assert expected in {c.text for c in stopped.completions}


def test_a_stop_string_ends_a_completion_and_its_text(make: Make) -> None:
    engine = make()
    (free,) = engine.rollout(PROMPTS[:1], settings(num_generations=8), seeds=[1])
    stop = next(text for c in free.completions for text in c.text[2:8] if text.isascii() and text.isprintable())
    (stopped,) = engine.rollout(PROMPTS[:1], settings(num_generations=8, stop=[stop, "never there"]), seeds=[1])
    for before, after in zip(free.completions, stopped.completions, strict=True):
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        if stop in before.text:
            assert after.finish_reason == "stop" and after.text == before.text[: before.text.index(stop)]
        else:
            assert after == before
    assert any(stop in completion.text for completion in free.completions)


X = tiny_tokenizer().convert_tokens_to_ids("x")
STOPS: list[dict[str, Any]] = [
    {"stop": ["<unk>"]},
    {"stop": ["g", "<unk>", "<eos>", "never there"]},
    {"generation_kwargs": {"stop_token_ids": [X, UNK]}},
    {"generation_kwargs": {"stop_token_ids": [X], "ignore_eos": True}, "stop": ["<eos>", "aa", "g"]},
]


@pytest.mark.parametrize("options", STOPS)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("includes", [True, False])
def test_a_completion_ends_at_what_comes_first(make: Make, options: dict[str, Any], skip: bool, includes: bool) -> None:
    """Against the definition, from completions that nothing ends."""
    engine, many = make(), {"num_generations": 32, "max_completion_length": 40}
    (free,) = engine.rollout(PROMPTS[:1], settings(**many, generation_kwargs={"ignore_eos": True}), seeds=[1])
    sampling = settings(**many, **options, skip_special_tokens=skip, include_stop_str_in_output=includes)
    (stopped,) = engine.rollout(PROMPTS[:1], sampling, seeds=[1])
    kwargs = sampling.generation_kwargs
    ends = {*kwargs.stop_token_ids, *(() if kwargs.ignore_eos else (EOS,))}
    ends |= {{"<unk>": UNK, "<eos>": EOS}.get(string, -1) for string in sampling.stop}
    assert {c.finish_reason for c in stopped.completions} == {"stop", "length"}
    for before, after in zip(free.completions, stopped.completions, strict=True):
        text = ""
        for count in range(1, 41):
            ids = list(before.token_ids[:count])
            text = str(engine._tokenizer.decode(ids, skip_special_tokens=skip))
            if ids[-1] in ends:
                shown = str(engine._tokenizer.decode(ids if includes else ids[:-1], skip_special_tokens=skip))
                named = {UNK: "<unk>", EOS: "<eos>"}.get(ids[-1], "")
                expected = shown + named if includes and skip and named in sampling.stop and named else shown
                break
            if found := [text.index(stop) + len(stop) * includes for stop in sampling.stop if stop in text]:
                expected = text[: min(found)]
                break
        else:
            assert (after.token_ids, after.finish_reason, after.text) == (before.token_ids, "length", text)
            continue
        assert (list(after.token_ids), after.finish_reason, after.text) == (ids, "stop", expected)


def test_an_engine_refuses_what_it_cannot_sample(make: Make) -> None:
    for options in ({"temperature": 1e-4}, {"repetition_penalty": 2.0}, {"generation_kwargs": {"min_tokens": 3}}):
        with pytest.raises(ValueError, match=r"^rollout\."):
            list(make().rollout(PROMPTS, settings(**options)))


@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.1, 2.0, 50.0])
def test_log_probabilities_at_any_temperature_are_the_trainers(make: Make, temperature: float) -> None:
    engine = make()
    (sampled,) = engine.rollout(PROMPTS[:1], settings(temperature=temperature), seeds=[3])
    prompt = Prompt(content="", token_ids=sampled.prompt_token_ids)
    group = Group(prompt=prompt, completions=sampled.completions, advantages=(0.0,) * 4)
    (one,) = pack([group], tokens_per_pack=4096)
    trainers = policy_of(engine).logprobs(one, temperature=temperature)[0]
    log_w = trainers - one.sampler_logprobs_N
    assert (log_w.exp() - 1 - log_w).mean().item() < 1e-5, "the divergence of sampler and trainer"


def test_no_sequence_is_longer_than_the_model_length(make: Make) -> None:
    (group,) = make(max_model_length=7).rollout(PROMPTS[:1], settings(num_generations=2), seeds=[1])
    assert all(len(completion.token_ids) <= 3 for completion in group.completions)


def test_versions_count_publishes(make: Make) -> None:
    engine = make()
    assert engine.publish(policy_of(engine).write_slots) == engine.policy_version == 2
    assert {c.policy_version for g in engine.rollout(PROMPTS, settings()) for c in g.completions} == {2}


# ---------------------------------------------------------------------------------------------------------------- vLLM


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])  # the next test shares the engine of the last one
def test_greedy_tokens_are_vllms(make: Make, make_engine, kind: str) -> None:
    engine, vllm = make(kind, max_num_seqs=64), make_engine(kind)
    policy_of(engine).attach(vllm.slots)
    vllm.publish(policy_of(engine).write_slots)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (64,), generator=generator).tolist()
    prompts = [torch.randint(4, 260, (length,), generator=generator).tolist() for length in lengths]
    sampling = settings(temperature=0.0, num_generations=1, max_completion_length=24)
    ours, theirs = by_index(engine, prompts, sampling), by_index(vllm, prompts, sampling)
    for one, other in zip(ours, theirs, strict=True):
        a, b = one.completions[0], other.completions[0]
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


@pytest.mark.engine
@pytest.mark.parametrize("options", [*STOPS, {"stop": ["gg", "g", "<unk", "<unk>", "<u"]}])  # some begin others
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("includes", [True, False])
def test_texts_and_ends_are_vllms(make: Make, make_engine, options: dict[str, Any], skip: bool, includes: bool) -> None:
    engine, vllm = make(max_num_seqs=64), make_engine()
    policy_of(engine).attach(vllm.slots)
    vllm.publish(policy_of(engine).write_slots)
    texts = [f"{a}{b}c" for a in "abcdefgh" for b in "ijklmnop"]
    prompts = [tiny_tokenizer().encode(text, add_special_tokens=False) for text in texts]
    sampling = settings(
        temperature=0.0, num_generations=1, max_completion_length=24, **options, skip_special_tokens=skip,
        include_stop_str_in_output=includes,
    )  # fmt: skip
    ours, theirs = by_index(engine, prompts, sampling), by_index(vllm, prompts, sampling)
    for one, other in zip(ours, theirs, strict=True):
        a, b = one.completions[0], other.completions[0]
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
    assert {group.completions[0].finish_reason for group in ours} == {"stop", "length"}


@pytest.mark.engine
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01}])
def test_sampled_tokens_are_distributed_as_vllms(make: Make, make_engine, options: dict[str, float]) -> None:
    """The first token of many completions of a prompt: two samples of one distribution."""
    engine, vllm = make(max_num_seqs=2048), make_engine()
    policy_of(engine).attach(vllm.slots)
    vllm.publish(policy_of(engine).write_slots)
    sampling = settings(num_generations=2048, max_completion_length=1, **options)
    counts = []
    for sampler in (engine, vllm):
        (group,) = sampler.rollout(PROMPTS[:1], sampling, seeds=[11])
        tokens = torch.tensor([completion.token_ids[0] for completion in group.completions])
        counts.append(tokens.bincount(minlength=260))
    both = torch.stack(counts)
    frequent = both.sum(0) >= 10  # the others are counted as one
    table = torch.cat([both[:, frequent], both[:, ~frequent].sum(1, keepdim=True)], dim=1)
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 5
    assert p_value(table, table.sum(0).expand(2, -1) / 2, table.shape[1] - 1) > 1e-4
