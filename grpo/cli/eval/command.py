"""The command `rankup eval`: rewards, pass@k and maj@n of a run, a checkpoint, an adapter or a model, with intervals.

    rankup eval runs/quickstart                                         # the run's adapter on its evaluation data
    rankup eval runs/quickstart --checkpoint best --samples 8           # 8 completions of each prompt: pass@k, maj@n
    rankup eval run.yaml                                                # what training would start from
    rankup eval path/to/adapter --data test.jsonl --reward last_number  # any adapter in PEFT's format, any model

The results of all prompts are written as JSON (docs/evaluation.md): into the folder `evaluations` of a run, else where
`--output` says.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from ...config import GRPOConfig, eval_sampling
from ...run.evaluation_files import EVALUATIONS, read_evaluation
from ..command import add_command
from .options import config_for
from .table import results_text
from .target import Target, find_target

EXAMPLES = """examples:
  rankup eval runs/quickstart                                   the run's adapter on its evaluation data
  rankup eval runs/quickstart --checkpoint best --samples 8     8 completions each: pass@k and maj@8
  rankup eval runs/quickstart --samples 8 --temperature 0.7 --top-p 0.95
  rankup eval configs/quickstart.yaml                           what training would start from: the base model
  rankup eval runs/quickstart/adapter --data test.jsonl --reward last_number
  rankup eval Qwen/Qwen2.5-1.5B-Instruct --data gsm8k=openai/gsm8k --reward gsm8k=last_number \\
      data.subset=main data.eval.gsm8k.prompt_column=question
"""


def add_eval_command(commands: Any) -> None:
    """Add `eval` to the subcommands of a parser (what `add_subparsers` returns)."""
    text = "rewards, pass@k and maj@n of a run, a checkpoint, an adapter or a model, with intervals"
    parser = add_command(commands, "eval", text, examples=EXAMPLES, run=evaluate)
    add = parser.add_argument
    add("what", metavar="RUN|FILE|ADAPTER|MODEL", help="a run folder or a checkpoint in it, a run file, an adapter or a model")
    add("overrides", nargs="*", metavar="section.field=value", help="override a setting")
    add("--checkpoint", metavar="best|last|STEP", help="of a run: this checkpoint instead of its final adapter")
    add("--samples", type=int, metavar="N", help="completions of each prompt (data.eval_samples)")
    add("--temperature", type=float, metavar="T", help="sampling temperature, 0 is greedy (data.eval_temperature)")
    add("--top-p", type=float, metavar="P", help="probability mass to sample from (data.eval_top_p)")
    source = "evaluation data in place of data.eval: SOURCE, or several of NAME=SOURCE"
    add("--data", action="append", default=[], metavar="[NAME=]SOURCE", help=source)
    function = "reward function in place of rewards.functions: of all sets, or NAME=FUNCTION of one; may be repeated"
    add("--reward", action="append", default=[], metavar="[NAME=]FUNCTION", help=function)
    add("--split", metavar="SPLIT", help="split of the data (data.eval_split)")
    add("--rows", type=int, metavar="N", help="the first rows of each set only (data.eval_rows)")
    add("--max-completion-length", type=int, metavar="N", help="in tokens (rollout.max_completion_length)")
    add("--output", type=Path, metavar="FILE.json", help="where to write the results (default: in the run folder)")


def evaluate(options: argparse.Namespace) -> int:
    """`rankup eval RUN|FILE|ADAPTER|MODEL [section.field=value ...]`"""
    target = find_target(options.what, checkpoint=options.checkpoint, has_data=bool(options.data))
    config = config_for(target, options)
    output: Path | None = options.output or _default_output(target, config)
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file in it")
    from ...trainer import GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        # Not the folder of a run, which may hold the adapter: nothing is trained, and nothing of it is replaced.
        logging = config.logging.model_copy(update={"output_dir": Path(folder) / "run"})
        file = output or Path(folder) / "results.json"
        with GRPOTrainer(args=config.model_copy(update={"logging": logging})) as trainer:
            trainer.evaluate(adapter=target.adapter, output_file=file)
        record = read_evaluation(file)
    start = config.lora.start_from
    name = target.name if start is None or target.config_file is None else f"{target.name} with {start}"
    print(results_text(name, record))
    if output is not None:
        print(f"results: {output}")
    return 0


def _default_output(target: Target, config: GRPOConfig) -> Path | None:
    """A new file in the run folder, named after what is evaluated and how; None if there is no run."""
    if target.run is None:
        return None
    sampling = eval_sampling(config)
    how = "greedy" if sampling.temperature == 0 else f"{sampling.num_generations}_at_{sampling.temperature:g}"
    name = f"eval_{target.label}_{how}"
    for number in itertools.count(1):
        path = target.run / EVALUATIONS / f"{name}{f'_{number}' if number > 1 else ''}.json"
        if not path.exists():
            return path
    raise AssertionError("there are infinitely many numbers")
