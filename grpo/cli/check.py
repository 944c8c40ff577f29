"""`rankup check`: the proof of `prove.py` for every projection of a model, with its progress printed."""

from __future__ import annotations

from ...rollout.engine import RolloutEngine
from ..common.log import log_to
from ..common.model_files import resolve_model
from ..common.quiet import quiet_stderr
from ..config import GRPOConfig
from ..model.prove import prove_slots
from ..update.session import base_note, engine_settings, make_policy


def check_slots(config: GRPOConfig) -> int:
    """Prove the slot map for all projections of `config.model`; print the result and return the exit status."""
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
        try:
            with log_to(lambda text: print(text, flush=True)):
                proofs = prove_slots(policy, engine, each=True)
        except RuntimeError as error:
            print(f"rankup: {error}")
            return 1
    finally:
        engine.close()
    worst = max(proofs, key=lambda proof: proof.gap / proof.bound)
    print(f"all {len(proofs)} comparisons passed: trainer and vLLM compute the same policy (worst: {worst})")
    return 0
