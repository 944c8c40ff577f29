#!/usr/bin/env python3
"""How fast completions are sampled with a rank-64 adapter, against stock vLLM with the same adapter and without LoRA.

`ratio_to_stock` and `ratio_to_base` compare tokens per second of full rollouts of the quick start: 128 sequences (8 prompts x
16 completions of 24 tokens), an empty prefix cache, temperature 1, the log-probability of every sampled token. They have no
seeds, because vLLM 0.32 on CPU fails if the prompt of a request with a seed is computed in two parts. Stock vLLM with the
adapter takes minutes for a rollout, so it is measured once.

`decoding` uses one-token prompts, so that a run is decoding only and no side gains or loses by how it computes prompts. There
the base model benefits from vLLM's compiled graph, which vLLM disables on CPU when LoRA is on.

Repeats are interleaved. Each engine has a separate process that sleeps while another is measured; the processor time of the
sleeping ones is in the result. Before measuring, rankup and stock vLLM must agree on the log-probabilities under the adapter,
and differ from the base model.

examples:
  scripts/bench/rollout.py --json rollout.json            about six minutes on two idle cores
  scripts/bench/rollout.py --repeats 1 --tokens 8         a quick look
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from common import Result, command_line, markdown, run, summarise
from workers import Turns, Worker

PROMPTS, COMPLETIONS, RANK = 8, 16, 64
PUBLISHES = 20
STOCK_SHARE = 8  # stock vLLM with the adapter samples this many times fewer tokens when it decodes
MAX_DIFFERENCE = 0.35  # of rankup and stock that rounding explains, as a share of the adapter's effect
SIDES = {
    "rankup": "rankup, rank-64 adapter",
    "base": "vLLM, base model without LoRA",
    "stock": "stock vLLM, the same adapter",
}
SINGLE_TOKENS = [[1000 + index] for index in range(PROMPTS)]


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = command_line(__doc__, repeats=5, what="measured runs of each engine")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="tokens of a completion (default 24)")
    options = parser.parse_args()
    if not 1 <= options.tokens <= 64:
        parser.error("--tokens must be from 1 to 64")
    run(options, measure, report)


def measure(options: argparse.Namespace) -> Result:
    """Start the engines, compare their policies, then measure decoding, rollouts and publishing."""
    with ExitStack() as stack:
        adapter = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rankup-bench-"))) / "adapter"
        workers: dict[str, Worker] = {}

        def start(name: str, side: str, adapter_folder: Path | None, **settings: object) -> None:
            worker = Worker(SIDES[name], f"rollout_sides:{side}", rank=RANK, adapter_folder=adapter_folder, **settings)
            workers[name] = stack.enter_context(worker)

        start("rankup", "RankupSide", adapter)
        about: Result = workers["rankup"].call("describe")
        stock = {"model_path": about.pop("model_path"), "kv_cache_bytes": about["kv_cache_bytes"]}
        start("base", "StockSide", None, **stock)
        start("stock", "StockSide", adapter, **stock)
        return _measure(workers, about, repeats=options.repeats, tokens=options.tokens)


def _measure(workers: dict[str, Worker], about: Result, *, repeats: int, tokens: int) -> Result:
    prompts: list[list[int]] = workers["rankup"].call("quickstart_prompts", PROMPTS)
    agreement = _agreement(workers, prompts[0])
    lengths = {"rankup": tokens, "base": tokens, "stock": max(1, tokens // STOCK_SHARE)}
    turns = Turns()

    def decode(name: str) -> float:
        return _tokens_per_second(workers[name], SINGLE_TOKENS, lengths[name])

    def roll_out(name: str) -> float:
        workers[name].call("clear_prefix_cache")
        return _tokens_per_second(workers[name], prompts, about["completion_length"], seeded=False)

    print("warming up", flush=True)
    for name, worker in workers.items():
        _tokens_per_second(worker, SINGLE_TOKENS, max(1, lengths[name] // 4))
    decoding = turns.interleave(workers, repeats, decode)
    rollouts = turns.interleave({name: workers[name] for name in ("rankup", "base")}, (repeats + 1) // 2, roll_out)
    rollouts["stock"] = [roll_out("stock")]
    publish = summarise([workers["rankup"].call("publish") for _ in range(PUBLISHES)])
    rates, decoding_rates = ({name: summarise(found[name]) for name in SIDES} for found in (rollouts, decoding))
    return {
        **_ratios(rates),
        "publish_ms": publish["median"],
        "tokens_per_second": rates,
        "decoding": decoding_rates | _ratios(decoding_rates),
        "publish": publish,
        "agreement": agreement,
        "idle_engines_cpu_share": turns.idle_share,
        "settings": {
            "prompt_lengths": [len(ids) for ids in prompts],
            "tokens_per_completion": {"rollouts": about["completion_length"], "decoding": lengths},
            "sampling": "temperature 1, logprobs=0, ignore_eos, when decoding a seed per prompt; the same on all sides",
            "processes": "engine in the calling process, all cores; rankup and base keep freed memory",
            "rankup": about,
            **{name: workers[name].call("describe") for name in ("base", "stock")},
        },
    }


def _ratios(rates: Result) -> dict[str, float]:
    return {f"ratio_to_{name}": rates["rankup"]["median"] / rates[name]["median"] for name in ("stock", "base")}


def _agreement(workers: dict[str, Worker], prompt: list[int]) -> dict[str, float]:
    """Compare log-probabilities of a prompt. Exits if rankup and stock vLLM do not sample from the same policy."""
    logprobs = {name: worker.call("prompt_logprobs", prompt) for name, worker in workers.items()}

    def difference(other: str) -> float:
        return statistics.fmean(abs(a - b) for a, b in zip(logprobs["rankup"], logprobs[other], strict=True))

    agreement = {"rankup_to_stock": difference("stock"), "rankup_to_base": difference("base")}
    if agreement["rankup_to_stock"] > MAX_DIFFERENCE * agreement["rankup_to_base"]:
        raise SystemExit(f"rankup and stock vLLM do not compute the same policy: {agreement}")
    return agreement


def _tokens_per_second(worker: Worker, prompts: list[list[int]], length: int, *, seeded: bool = True) -> float:
    """The rate of one run: `COMPLETIONS` of `length` tokens for each prompt."""
    seeds = [1000 + index * COMPLETIONS for index in range(len(prompts))] if seeded else None
    sampled, seconds = worker.call("sample", prompts, COMPLETIONS, length, seeds)
    assert sampled == len(prompts) * COMPLETIONS * length, "every completion has the full length"
    return sampled / seconds


# -------------------------------------------------------------------------------------------------------------- report


def report(result: Result) -> str:
    """The table, the cost of a publish, and how quiet the idle engines were."""
    publish = result["publish"]
    spread = f"{publish['min']:.1f} to {publish['max']:.1f}"
    idle = f"- idle engines used at most {result['idle_engines_cpu_share']:.1%} of a core"
    published = f"- publish: {publish['median']:.1f} ms ({spread})"
    return "\n".join([table(result), "", published, idle])


def table(result: Result) -> str:
    """A row per engine: tokens per second of full rollouts and of decoding alone, and speed of rankup relative to it."""
    rows = []
    for name, label in SIDES.items():
        ratios = ["" if name == "rankup" else f"{of[f'ratio_to_{name}']:.2f} ×" for of in (result, result["decoding"])]
        full, alone = (_rate(rates[name]["median"]) for rates in (result["tokens_per_second"], result["decoding"]))
        rows.append([label, full, ratios[0], alone, ratios[1]])
    return markdown(["", "rollouts, tokens/s", "rankup's speed", "decoding alone", "rankup's speed"], rows, left=1)


def _rate(rate: float) -> str:
    """Three digits, or all before the decimal point: 795, 55.8."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def draw(result: Result, out: Path) -> None:
    """Tokens per second by engine: full rollouts, and decoding alone."""
    from plots import OURS, SUBTITLE, THEIRS, bars, measured

    kinds = {"rollouts of the quick start": result["tokens_per_second"], "decoding alone": result["decoding"]}
    with measured(out, "Sampling with a rank-64 adapter", result, panels=len(kinds)) as panels:
        for panel, (title, rates) in zip(panels, kinds.items(), strict=True):
            labels = [label.replace(", ", ",\n") if panel is panels[0] else "" for label in SIDES.values()]
            values = [rates[name] for name in SIDES]
            bars(panel, labels, values, [_rate(one["median"]) for one in values], color=[OURS, THEIRS, THEIRS])
            panel.set_xlabel("tokens per second")
            panel.set_title(title, **SUBTITLE)


if __name__ == "__main__":
    main()
