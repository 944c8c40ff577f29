"""`rankup check`: the proof of `prove.py` for every projection of a model, with its progress printed."""

from __future__ import annotations

from ..common.log import log_to
from ..common.model_files import resolve_model
from ..common.quiet import quiet_stderr
from ..config import GRPOConfig
from ..data.run_inputs import with_fitting_prompts
from ..memory.decide import decide_memory
from ..model.prove import prove_slots
from ..update.device import prepared_device
from ..update.session import base_note, engine_and_policy


def check_slots(config: GRPOConfig) -> int:
    """Prove the slot map for all projections of `config.model`; print the result and return the exit status."""
    with quiet_stderr(), log_to(print):
        model_path = resolve_model(config.model.name, revision=config.model.revision)
    config = with_fitting_prompts(config, model_path)
    name = "vLLM" if config.rollout.engine == "vllm" else "the torch engine"
    print(f"starting {name} with {config.model.name}", flush=True)
    with log_to(print):
        config, _ = decide_memory(config, model_path)
    with prepared_device(config), engine_and_policy(config, model_path) as (engine, policy):
        print(base_note(policy, config.rollout.engine), flush=True)
        print(f"publishing a random adapter to each of {len(policy.layers)} projections alone", flush=True)
        try:
            with log_to(lambda text: print(text, flush=True)):
                proofs = prove_slots(policy, engine, each=True)
        except RuntimeError as error:
            print(f"rankup: {error}")
            return 1
    worst = max(proofs, key=lambda proof: proof.gap / proof.bound)
    print(f"all {len(proofs)} comparisons passed: trainer and {name} compute the same policy (worst: {worst})")
    return 0
