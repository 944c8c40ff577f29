#!/usr/bin/env python3
"""Train two steps of a tiny random model of each family, and check the result against stock PEFT and stock vLLM.

For each family, in a process of its own and in fp32: a run of two steps with vLLM; `rankup check` for each adapted projection;
loss and adapter gradients against those of stock PEFT with one row a completion; log-probabilities of the saved adapter in
stock PEFT and in stock vLLM; and whether the tokens of one completion change the log-probabilities of others. One line for each
family. The exit status is 0 only if every family is trained, or refused with a reason.

examples:
  scripts/zoo.py                                        all families, about seven minutes on an idle core
  scripts/zoo.py --family gemma3 --family qwen3.5       some of them
  scripts/zoo.py --json zoo.json --docs docs/models.md  also write the figures, and the table of a page
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from common import markdown, replace_tables, script_parser, versions

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    from rankup.grpo.config import LoraConfig
    from rankup.grpo.model.fusing import Fusion

PRELOADED = ["rankup.grpo.trainer", "rankup.rollout.engine", "family_checks"]
TIMEOUT = 600.0  # seconds of a family
LEAK_LIMIT = 1e-5
LOGPROB_LIMIT = 1e-3  # vLLM computes in fp32 too, by other kernels
ROUNDINGS = 3.0  # where vLLM has no kernels for fp32: as often the difference of stock PEFT in bf16 to itself in fp32
TABLE = "zoo"


@dataclass(kw_only=True)
class Result:
    """What was found about a family. None: not reached.

    Attributes:
        special: what is special about it.
        dtype: of vLLM.
        trained: whether a run of two steps came to its end.
        plain_reason: why prompts are not shared; empty if they are.
        targets: the kinds of layers with an adapter.
        layers: their number.
        fused: what computes as one function: q/k/v, MLPs, norms; all other adapted layers do so by themselves.
        left_out: what `all-linear` leaves out, and notes about vLLM.
        check: the worst gap between trainer and vLLM under an adapter on one projection, as a share of its bound.
        gradient, gradient_limit: the largest relative difference of loss and gradients to stock PEFT's, and its bound.
        peft, vllm: the largest difference of log-probabilities between stock PEFT and the trainer, and stock vLLM.
        vllm_limit: the bound of the latter.
        leak: the most that other completions' log-probabilities change with the tokens of one.
        reason: why something was refused, or failed.
        broken: whether it failed otherwise than with an error for users.
    """

    family: str
    special: str = ""
    dtype: str = "float32"
    trained: bool = False
    plain_reason: str | None = None
    targets: list[str] = field(default_factory=list)
    layers: int | None = None
    fused: str = ""
    left_out: list[str] = field(default_factory=list)
    check: float | None = None
    gradient: float | None = None
    gradient_limit: float = 0.0
    peft: float | None = None
    vllm: float | None = None
    vllm_limit: float = LOGPROB_LIMIT
    leak: float | None = None
    seconds: float = 0.0
    reason: str = ""
    broken: bool = False

    @property
    def is_green(self) -> bool:
        """Whether all comparisons were made and hold."""
        limits = (
            *((self.check, 1.0), (self.gradient, self.gradient_limit), (self.leak, LEAK_LIMIT)),
            *((self.peft, LOGPROB_LIMIT), (self.vllm, self.vllm_limit)),
        )
        return self.trained and not self.reason and all(value is not None and value <= limit for value, limit in limits)

    @property
    def verdict(self) -> str:
        """One word."""
        if self.is_green:
            return "trained"
        return "broken" if self.broken else "refused" if not self.trained else "failed"

    @property
    def figures(self) -> list[str]:
        """The cells behind the family's name."""
        shared = "" if self.plain_reason is None else "no" if self.plain_reason else "yes"
        numbers = [_number(value) for value in (self.check, self.gradient, self.peft, self.vllm, self.leak)]
        return [self.verdict, shared, self.fused, "" if self.layers is None else str(self.layers), *numbers]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value >= 0.01 else f"{value:.0e}"


# --------------------------------------------------------------------------------------------------------------- parent


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--family", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, beside others")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="replace the table of this page")
    options = parser.parse_args()
    from families import FAMILIES

    names = options.family or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        sys.exit(f"zoo: no family {unknown[0]}; the families are {', '.join(FAMILIES)}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo", *PRELOADED])  # which takes half of the time of a family
    known = _read(options.json)
    for name in names:
        known[name] = _in_process(name, context)
        if options.json is not None:
            _write(options.json, [known[family] for family in FAMILIES if family in known])
    results = [known[family] for family in FAMILIES if family in known]
    if options.docs is not None:
        page = options.docs.read_text(encoding="utf-8")
        options.docs.write_text(replace_tables(page, {TABLE: table(results)}), encoding="utf-8")
    count = sum(result.is_green for result in results)
    print(f"{count} of {len(results)} families trained, all comparisons hold")
    return 0 if all(result.is_green or result.verdict == "refused" for result in results) else 1


def _read(file: Path | None) -> dict[str, Result]:
    """The figures of an earlier call, by family."""
    if file is None or not file.exists():
        return {}
    return {figures["family"]: Result(**figures) for figures in json.loads(file.read_text())["families"]}


def _write(file: Path, results: Sequence[Result]) -> None:
    figures = {"families": [asdict(result) for result in results], "versions": versions()}
    file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _in_process(name: str, context: ForkServerContext) -> Result:
    """Check a family in a process of its own, and print its line."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        file, log = Path(folder, "result.json"), Path(folder, "log")
        process = context.Process(target=_check_quietly, args=(name, file, log))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
        result = Result(**json.loads(file.read_text())) if file.exists() else Result(family=name)
        if process.exitcode != 0:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            result.broken, result.reason = True, lines[-1] if process.exitcode == 1 else f"exit status {process.exitcode}"
            print("\n".join(lines[-25:]), file=sys.stderr)
    result.seconds = time.perf_counter() - start
    cells = "  ".join(f"{cell:>7}" for cell in result.figures)
    print(f"{name:16}{cells}  {result.seconds:4.0f} s  {result.reason or '; '.join(result.left_out)}", flush=True)
    return result


def table(results: Sequence[Result]) -> str:
    """The table of docs/models.md."""
    heads = ["family", "special", "", "prompts shared", "fused", "layers", "check", "gradients", "PEFT", "vLLM", "leak"]
    rows = [[result.family, result.special, *result.figures] for result in results]
    notes = [f"- **{r.family}**: {text}" for r in results if (text := "; ".join(filter(None, [r.reason, *r.left_out])))]
    return "\n".join([markdown(heads, rows, left=5), "", *notes])


# ---------------------------------------------------------------------------------------------------------- one family


def _check_quietly(name: str, file: Path, log: Path) -> None:
    """`check_family`, with its output in a file."""
    with log.open("w") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    check_family(name, file)


def check_family(name: str, file: Path) -> None:
    """Check one family and write what was found, also if it comes to no end."""
    from families import FAMILIES, make_family

    from rankup.grpo.common.quiet import quiet_loggers

    quiet_loggers()
    result = Result(family=name, special=FAMILIES[name].special, dtype=FAMILIES[name].dtype)
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        model = make_family(Path(folder, "model"), name)
        try:
            adapter, lora = _train_and_prove(model, Path(folder), result)
            _compare(model, adapter, lora, result)
        except (ValueError, RuntimeError) as error:
            result.reason = str(error).splitlines()[0]
            if type(error) not in (ValueError, RuntimeError):  # of vLLM, pydantic or torch: no message for users
                result.reason, result.broken = f"{type(error).__name__}: {result.reason}", True
        finally:
            file.write_text(json.dumps(asdict(result)))


def _train_and_prove(model: Path, folder: Path, result: Result) -> tuple[Path, LoraConfig]:
    """Two steps of training, then a proof of each projection with the same engine; returns the adapter's folder."""
    from tiny_runs import ROWS, many_low_ids, tiny_config

    from rankup import GRPOTrainer
    from rankup.grpo.model.prove import prove_slots
    from rankup.grpo.update.resolve import engine_settings
    from rankup.grpo.update.session import make_policy
    from rankup.rollout.engine import RolloutEngine
    from rankup.rollout.model_limits import wider_windows

    config = tiny_config(folder / "run", model=str(model), engine="vllm", dtype=result.dtype, max_num_seqs=16)
    trainer = GRPOTrainer(reward_funcs=many_low_ids, args=config, train_dataset=ROWS)
    engine = RolloutEngine(engine_settings(trainer.args, str(model)))
    try:
        trainer.train(engine=engine)
        adapter = trainer.args.logging.output_dir / "adapter"
        trainer.close()
        result.trained = True
        policy = make_policy(trainer.args, str(model), engine)
        policy.load_adapter(adapter)
        result.plain_reason = policy.plain_reason or ""
        result.left_out = [*policy.target_notes, *wider_windows(str(model), trainer.args.rollout)]
        result.fused, result.layers = _fused(policy.fusion), len(policy.layers)
        result.targets = sorted({name.rpartition(".")[2] for name in policy.layers})
        result.check = max(proof.gap / proof.bound for proof in prove_slots(policy, engine, each=True))
    finally:
        engine.close()
    return adapter, trainer.args.lora


def _fused(fusion: Fusion) -> str:
    parts = (("q/k/v", fusion.qkv), ("MLP", fusion.mlp), ("norms", fusion.norms))
    return ", ".join(name for name, modules in parts if modules) or "single layers"


def _compare(model: Path, adapter: Path, lora: LoraConfig, result: Result) -> None:
    """The saved adapter in the trainer, in stock PEFT and in stock vLLM."""
    import family_checks as checks
    import torch
    from sample_groups import random_groups

    from rankup.grpo.model.policy import Policy

    groups = random_groups(checks.SHAPES)
    policy = Policy(str(model), lora=lora, dtype="float32")
    policy.load_adapter(adapter)
    policy.write_slots()
    own, stock = checks.own_pass(policy, groups), checks.stock_pass(model, adapter, groups)
    result.gradient, result.peft = checks.gradient_error(own, stock), checks.logprob_error(own, stock)
    result.gradient_limit = checks.gradient_limit(own)
    if result.dtype == "bfloat16":
        rounded = checks.stock_pass(model, adapter, groups, dtype=torch.bfloat16)
        result.vllm_limit = ROUNDINGS * checks.logprob_error(rounded, stock)
    result.leak = checks.leak(policy, groups)
    sequences = {
        (place, index): [*group.prompt.token_ids, *completion.token_ids]
        for place, group in enumerate(groups)
        for index, completion in enumerate(group.completions)
    }
    of_vllm = _stock_vllm(model, adapter, result, list(sequences.values()))
    pairs = zip(of_vllm, stock.logprobs.values(), strict=True)
    result.vllm = max(abs(a - b) for row, of in pairs for a, b in zip(row[-len(of) :], of.tolist(), strict=True))


def _stock_vllm(
    model: Path, adapter: Path, result: Result, sequences: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Log-probabilities of all tokens but the first by vLLM's own `LLM`, with the adapter as a request.

    Without names of layers vLLM 0.32 would wrap the head too, and fail on CPU when it computes log-probabilities of prompts.
    Two other faults of its CPU kernels are mended (`vllm_compat.cpu_kernels`): else no adapter works with experts, nor LFM2.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from rankup.rollout.text_models import register_text_model
    from rankup.rollout.vllm_compat import cpu_kernels

    register_text_model(str(model))
    with cpu_kernels():
        llm = LLM(
            str(model),
            dtype=result.dtype,  # type: ignore[arg-type]
            enable_lora=True,
            max_lora_rank=8,
            lora_target_modules=result.targets,
            max_model_len=128,
            max_num_seqs=16,
            kv_cache_memory_bytes=2**26,
            enforce_eager=True,  # compiling takes most of the time
            language_model_only="vision tower" in result.special,  # the tiny checkpoints have no processor of images
            disable_log_stats=True,
        )
    outputs = llm.generate(
        [{"prompt_token_ids": list(ids)} for ids in sequences],
        SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
        lora_request=LoRARequest("adapter", 1, str(adapter.resolve())),
        use_tqdm=False,
    )
    found = []
    for output, ids in zip(outputs, sequences, strict=True):
        assert output.prompt_logprobs is not None
        found.append([of[id].logprob for of, id in zip(output.prompt_logprobs[1:], ids[1:], strict=True) if of is not None])
    return found


if __name__ == "__main__":
    sys.exit(main())
