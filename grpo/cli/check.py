"""`rankup check`: the proof of `prove.py` for every projection of a model, shown as it goes."""

from __future__ import annotations

from ...rollout.engine import RolloutEngine
from ..common.log import log_to
from ..common.model_files import resolve_model
from ..common.quiet import quiet_stderr
from ..config import GRPOConfig
from ..model.prove import Proof, prove_slots
from ..update.session import base_note, engine_settings, make_policy


def check_slots(config: GRPOConfig) -> int:
    """Prove the slot map for all projections of `config.model`; prints the outcome and returns the exit status."""
    with quiet_stderr():
        with log_to(print):
            model_path = resolve_model(config.model.name, revision=config.model.revision)
        print(f"starting vLLM with {config.model.name}", flush=True)
        engine = RolloutEngine(engine_settings(config, model_path))
    try:
        with quiet_stderr():
            policy = make_policy(config, model_path, engine)
        print(base_note(policy), flush=True)
        print(f"publishing a random adapter to each of {len(policy.layers)} projections alone", flush=True)

        def report(proof: Proof) -> None:
            if not proof.holds:
                print(f"FAILED {proof.what}: gap {proof.gap:.4f}, effect {proof.effect:.4f}", flush=True)

        try:
            proofs = prove_slots(policy, engine, each=True, report=report)
        except RuntimeError as error:
            print(f"rankup: {error}")
            return 1
    finally:
        engine.close()
    worst = max(proofs, key=lambda proof: proof.gap / proof.effect)
    print(
        f"{len(proofs)} of {len(proofs)} comparisons hold: trainer and vLLM compute the same policy "
        f"(worst: {worst.what}, difference {worst.gap:.4f} where the adapter changes {worst.effect:.4f})"
    )
    return 0
