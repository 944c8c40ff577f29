"""Proof that trainer and sampler compute the same function of the same adapter.

A wrong map between PEFT's projections and vLLM's buffers is hard to see in training: shapes often fit, and losses stay finite.
So strong random adapters are published, and the engine's log-probabilities are compared with the trainer's: those of some token
sequences, and those that come with tokens that it samples. Rounding causes small differences. A misplaced, unscaled or stale
adapter causes differences about as large as the effect of the adapter, so that effect is the unit.

    prove_slots(policy, engine)                    # all projections together, distinct adapters; sampling; about a second
    prove_slots(policy, engine, each=True)         # also every projection alone (`rankup check`)
    prove_slots(policy, engine, episodes=True)     # also what the engine stores of episodes, which continue behind given tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...rollout.config import SamplingConfig
from ...rollout.generation_kwargs import GenerationKwargs
from ...rollout.protocol import Engine
from ...rollout.turns import Play, Request, Turn, play
from ...rollout.types import Completion
from ..common.log import logger
from ..data.groups import Group
from ..data.prompts import Prompt
from ..episodes.stream import Stream
from .lora_layers import ADAPTER
from .packing import by_completion, pack, pad
from .policy import Policy

# Strength of a random adapter: the norm of its update relative to that of the base weight. The fewer layers are adapted at
# once, the stronger each has to be: at 0.05, thirty q_proj change SmolLM2-135M by no more than rounding does.
MIN_STRENGTH, MAX_STRENGTH = 0.05, 4.0
TOTAL_STRENGTH = 10.5  # divided among the layers
PROOF_PROMPTS, PROOF_LENGTH = 4, 16  # sequences of the proof, and tokens sampled after each one's prompt
SAMPLED_PROMPTS, SAMPLED_LENGTH = 8, 8  # the same for what is sampled with adapters
EPISODES, TURN_LENGTH, GIVEN_LENGTH = 8, 4, 3  # of the proof: their number, and tokens of each of two turns and between them
# The largest gap that counts as rounding, relative to the effect of the adapter. In bf16 rounding causes up to 0.35 (k_proj of
# SmolLM2-135M); a scale that is wrong by a factor of 2 causes 0.5, a misplaced adapter about 1.4.
TOLERANCE = 0.42
SAMPLING = ("sampling with an adapter on all projections", "sampling with another one")
# For a projection alone, relative to the gap without adapters: the largest gap, and the smallest effect that is evidence then.
NOISE_TOLERANCE, MIN_EFFECT = 1.25, 1.5

NOT_A_NUMBER = (
    "the base model's log-probabilities are not finite: it cannot be trained like this. In model.dtype=float16 its activations "
    "leave the range, which ends at 65504: set bfloat16 or float32"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One comparison, as mean absolute differences of log-probabilities.

    Attributes:
        what: the projections with an adapter, or one of `SAMPLING`.
        gap: between trainer and engine.
        effect: between the engine with and without the adapter; of sampled tokens, between the engine with it and the trainer
            without.
        noise: for a projection alone, the gap without any adapter, which is rounding; else 0.
    """

    what: str
    gap: float
    effect: float
    noise: float = 0.0

    @property
    def bound(self) -> float:
        """The largest gap that passes.

        If a projection changes the log-probabilities little more than rounding does, the rounding decides: a misplaced adapter
        would add its effect to that more than once.
        """
        relative = TOLERANCE * self.effect
        return max(relative, NOISE_TOLERANCE * self.noise) if self.effect >= MIN_EFFECT * self.noise else relative

    @property
    def holds(self) -> bool:
        """Whether the adapter changed the engine's log-probabilities, and as much as the trainer's."""
        return self.effect > 0 and self.gap <= self.bound

    def __str__(self) -> str:
        return f"{self.what}: difference {self.gap:.4f}, bound {self.bound:.4f}, effect of the adapter {self.effect:.4f}"


def prove_slots(policy: Policy, engine: Engine, *, each: bool = False, episodes: bool = False) -> list[Proof]:
    """Compare trainer and engine under random adapters, then publish the policy's adapter again; not if the engine fails.

    Args:
        each: also compare under an adapter on each projection alone, and log every comparison that fails.
        episodes: also sample episodes of two turns, and compare what is stored of them.

    Raises:
        RuntimeError: a comparison failed: the engine does not sample from the policy that the trainer trains; or the base
            model's log-probabilities are not finite.
        EngineError: the engine failed.
    """
    # Completions of random tokens by the base model: likely text, on which rounding errors are small. Needs no tokenizer.
    of_base = _sampled(policy, engine, PROOF_PROMPTS, PROOF_LENGTH, use_adapter=False)
    sequences = [[*group.prompt.token_ids, *group.completions[0].token_ids] for group in of_base]
    base = engine.prompt_logprobs(sequences, use_adapter=False)
    noise = _difference(base, trainer_logprobs(policy, sequences, use_adapter=False))
    if not math.isfinite(noise):
        raise RuntimeError(NOT_A_NUMBER)
    saved = [p.detach().clone() for p in policy.masters]
    proofs = []
    try:
        targets: list[tuple[str, list[str]]] = [("all projections", list(policy.layers))]
        if each:
            targets += [(name, [name]) for name in policy.layers]
        for seed, (what, names) in enumerate(targets):
            _publish_random_adapters(policy, engine, names, seed)
            of_engine = engine.prompt_logprobs(sequences)
            gap, effect = _difference(of_engine, trainer_logprobs(policy, sequences)), _difference(of_engine, base)
            proofs.append(Proof(what=what, gap=gap, effect=effect, noise=noise if len(names) == 1 else 0.0))
            if episodes and not seed:  # all projections
                _prove_episodes(policy, engine)
            if each and not proofs[-1].holds:
                logger.warning("FAILED %s", proofs[-1])
        proofs += [_prove_sampling(policy, engine, seed, what) for seed, what in enumerate(SAMPLING)]
    finally:
        with torch.no_grad():
            for master, before in zip(policy.masters, saved, strict=True):
                master.copy_(before)
    engine.publish(policy.write_slots)  # not after an error: an engine that failed would raise another one here
    _check(proofs)
    return proofs


def _check(proofs: Sequence[Proof]) -> None:
    failed = [proof for proof in proofs if not proof.holds]
    if not failed:
        return
    worst = max(failed, key=lambda proof: proof.gap / max(proof.effect, 1e-12))
    if all(proof.what in SAMPLING for proof in failed):
        advice = (
            "Only what it samples is wrong, not what it computes of prompts: on CUDA it samples with captured graphs, which "
            "may read old memory. Try rollout.enforce_eager=true, which samples without them, and please report this"
        )
    else:
        advice = "This model cannot be trained here"
    where = worst.what if worst.what in SAMPLING else f"with an adapter on {worst.what}"
    raise RuntimeError(
        f"the engine does not sample from the policy that is trained: {where}, trainer and engine differ by {worst.gap:.4f} in "
        f"mean log-probability (bound {worst.bound:.4f}), while the adapter changes it by {worst.effect:.4f} ({len(failed)} of "
        f"{len(proofs)} comparisons failed). {advice}"
    )


def trainer_logprobs(policy: Policy, sequences: Sequence[Sequence[int]], *, use_adapter: bool = True) -> list[list[float]]:
    """Log-probability of every token after the first of each sequence, by the trainer's forward at temperature 1."""
    streams = (Stream(tuple(ids[:1]), token_ids=list(ids[1:]), logprobs=[0.0] * (len(ids) - 1)) for ids in sequences)
    return _of_trainer(policy, [_group(stream) for stream in streams], use_adapter=use_adapter)


def _of_trainer(policy: Policy, groups: Sequence[Group], *, use_adapter: bool = True) -> list[list[float]]:
    """The trainer's log-probabilities of all sampled tokens."""
    if policy.shares_prompts:
        packs = pack(groups, tokens_per_pack=4096, device=policy.device)
    else:
        packs = pad(groups, tokens_per_pack=4096, pad_token_id=0, device=policy.device)
    logprobs = [policy.logprobs(one, use_adapter=use_adapter)[0] for one in packs]
    return [values.tolist() for values in by_completion(packs, logprobs)]


def _group(stream: Stream) -> Group:
    """A group of one completion."""
    completion = Completion(
        token_ids=tuple(stream.token_ids),
        logprobs=tuple(stream.logprobs),
        text="",
        finish_reason="stop",
        policy_version=0,
        given=tuple(stream.given),
    )
    return Group(prompt=Prompt(content="", token_ids=stream.prompt), completions=(completion,), advantages=(0.0,))


def _prove_sampling(policy: Policy, engine: Engine, seed: int, what: str) -> Proof:
    """Compare the log-probabilities that come with sampled tokens, under a random adapter on all projections.

    The engine computes a prompt all at once, but samples token by token: on CUDA by captured graphs, on CPU by other kernels.
    What still reads an earlier adapter there fails under the second of two adapters at the latest.
    """
    _publish_random_adapters(policy, engine, list(policy.layers), seed)
    groups = _sampled(policy, engine, SAMPLED_PROMPTS, SAMPLED_LENGTH, use_adapter=True)
    stored = [list(group.completions[0].logprobs) for group in groups]
    of_trainer, of_base = (_of_trainer(policy, groups, use_adapter=use) for use in (True, False))
    # The first token is sampled with the prompt.
    stored, of_trainer, of_base = ([row[1:] for row in rows] for rows in (stored, of_trainer, of_base))
    return Proof(what=what, gap=_difference(stored, of_trainer), effect=_difference(stored, of_base))


def _prove_episodes(policy: Policy, engine: Engine) -> None:
    """Compare what is stored of episodes with the engine's log-probabilities of all their tokens, and with the trainer's.

    The first and the last tokens of the turns are compared each by themselves: a wrong place there must not vanish in the
    mean of all tokens.

    Raises:
        RuntimeError: they differ.
    """
    groups, lengths = _sampled_episodes(policy, engine)
    stored = [list(group.completions[0].logprobs) for group in groups]
    of_engine, of_base = (_of_engine(engine, groups, use_adapter=use) for use in (True, False))
    bound = TOLERANCE * _difference(stored, of_base)
    edges = [(0, first - 1, first, len(row) - 1) for first, row in zip(lengths, stored, strict=True)]
    for what, computed in (("engine", of_engine), ("trainer", _of_trainer(policy, groups))):
        gaps = [_difference(_picked(stored, edge), _picked(computed, edge)) for edge in zip(*edges, strict=True)]
        if not max(gaps) < bound:  # nor if they are no numbers
            raise RuntimeError(
                f"what is stored of an episode is not what the {what} computes for its tokens: at the ends of turns they "
                f"differ by up to {max(gaps):.4f} in mean log-probability (bound {bound:.4f}). Episodes of this model cannot "
                "be trained here"
            )


def _of_engine(engine: Engine, groups: Sequence[Group], *, use_adapter: bool) -> list[list[float]]:
    """The engine's log-probabilities of all sampled tokens of finished streams."""
    streams = [[*group.prompt.token_ids, *group.completions[0].token_ids] for group in groups]
    return [
        [row[len(group.prompt.token_ids) - 1 + place] for place in group.completions[0].sampled]
        for row, group in zip(engine.prompt_logprobs(streams, use_adapter=use_adapter), groups, strict=True)
    ]


def _picked(logprobs: Sequence[Sequence[float]], places: Sequence[int]) -> list[list[float]]:
    return [[row[place]] for row, place in zip(logprobs, places, strict=True)]


def _sampled_episodes(policy: Policy, engine: Engine) -> tuple[list[Group], list[int]]:
    """Episodes of two turns with random tokens between them, each as a group; and the lengths of the first turns."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = policy.model.config.get_text_config().vocab_size
    given: list[list[int]] = torch.randint(0, vocabulary, (EPISODES, 2 + GIVEN_LENGTH), generator=generator).tolist()

    def episode(index: int) -> Play[tuple[Stream, int]]:
        prompt, bridge = given[index][:2], given[index][2:]
        stream, first = Stream(tuple(prompt)), 0
        for number in range(2):
            turn: Turn = yield Request(
                prompt_token_ids=stream.all, max_tokens=TURN_LENGTH, seed=2 * index + number, group=index, may_continue=True
            )
            stream.sampled(turn)
            if number == 0:
                first = len(turn.token_ids)
                stream.give(bridge)
        return stream, first

    sampling = SamplingConfig(num_generations=1, max_completion_length=2 * TURN_LENGTH + GIVEN_LENGTH)
    # Some tokens end a turn: such a turn is continued from what the engine has kept of it.
    with engine.requests(sampling, stop_token_ids=range(0, vocabulary, 4)) as requests:
        played = dict(play(requests, [episode(index) for index in range(EPISODES)]))
    streams, lengths = zip(*(played[index] for index in range(EPISODES)), strict=True)
    return [_group(stream) for stream in streams], list(lengths)


def _sampled(policy: Policy, engine: Engine, count: int, length: int, *, use_adapter: bool) -> list[Group]:
    """Groups of one completion each, of random prompts of two tokens. No token ends a completion."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.model.config.get_text_config().vocab_size
    prompts = torch.randint(0, vocabulary, (count, 2), generator=generator).tolist()
    sampling = SamplingConfig(
        num_generations=1, max_completion_length=length, generation_kwargs=GenerationKwargs(ignore_eos=True)
    )
    groups = engine.rollout(prompts, sampling, seeds=range(count), use_adapter=use_adapter)
    ordered = sorted(groups, key=lambda group: group.index)
    completions = [(group.prompt_token_ids, group.completions[0]) for group in ordered]
    return [_group(Stream(tuple(ids), token_ids=list(c.token_ids), logprobs=list(c.logprobs))) for ids, c in completions]


def _publish_random_adapters(policy: Policy, engine: Engine, names: Sequence[str], seed: int) -> None:
    strength = min(MAX_STRENGTH, max(MIN_STRENGTH, TOTAL_STRENGTH / len(names)))
    _write_random_adapters(policy, names, seed, strength)
    engine.publish(policy.write_slots)


@torch.no_grad()
def _write_random_adapters(policy: Policy, names: Sequence[str], seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in policy.layers.values():
        layer.master_b.zero_()
    for name in names:
        layer = policy.layers[name]
        a, b = layer.master_a, layer.master_b
        a.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
        b.copy_(torch.randn(b.shape, generator=generator))
        base_norm = torch.linalg.vector_norm(layer.base_weight, dtype=torch.float32).item()
        b.mul_(strength * base_norm / (layer.scaling[ADAPTER] * _update_norm(a, b)))


def _update_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of `b @ a`, by tr(a^T b^T b a): for a head or an embedding the product would be as large as the layer."""
    return ((b.t() @ b) * (a @ a.t())).sum().sqrt().item()


def _difference(one: list[list[float]], other: list[list[float]]) -> float:
    """Mean absolute difference of log-probabilities."""
    a, b = (torch.tensor([lp for sequence in logprobs for lp in sequence]) for logprobs in (one, other))
    return (a - b).abs().mean().item()
