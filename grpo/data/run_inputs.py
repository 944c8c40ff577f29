"""What a run is made from besides its configuration: the model's folder, the tokenizer, the prompts.

    inputs = load_run_inputs(config)
    inputs.train_prompts.rows, inputs.eval_prompts, inputs.tokenizer
    inputs.fingerprint()                        # tells whether a resumed run still has the same data
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..common.model_files import resolve_model
from ..common.quiet import quiet_stderr
from ..config import GRPOConfig
from .prompts import Prompt, PromptData, prepare_prompts
from .sources import load_rows

if TYPE_CHECKING:
    from datasets import Dataset

    Source = str | Dataset | Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """See the module's docstring. `eval_prompts` is None where the run has no evaluation data."""

    model_path: str
    tokenizer: PreTrainedTokenizerBase
    train_prompts: PromptData
    eval_prompts: PromptData | None

    def fingerprint(self) -> dict[str, Any]:
        """Number and hash of the rows of both data sets."""
        return {
            "training data": _fingerprint(self.train_prompts.rows),
            "evaluation data": None if self.eval_prompts is None else _fingerprint(self.eval_prompts.rows),
        }


def load_run_inputs(
    config: GRPOConfig,
    train_dataset: Source | None = None,
    eval_dataset: Source | None = None,
) -> RunInputs:
    """Read and tokenise the data (those given, else the configured) and find the model. Nothing is written.

    Raises:
        ValueError, FileNotFoundError: no or bad data, no such model; with what to do about it.
    """
    train_rows = _rows(config, train_dataset, config.data.train, split=config.data.train_split)
    eval_rows = _rows(config, eval_dataset, config.data.eval, split=config.data.eval_split)
    if train_rows is None:
        raise ValueError("no training data: set data.train, or hand train_dataset to GRPOTrainer")
    with quiet_stderr():
        model_path = resolve_model(config.model.name, revision=config.model.revision)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    return RunInputs(
        model_path=model_path,
        tokenizer=tokenizer,
        train_prompts=_prompts(config, train_rows, tokenizer),
        eval_prompts=None if eval_rows is None else _prompts(config, eval_rows[: config.data.eval_rows], tokenizer),
    )


def _fingerprint(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Tokens and columns of the rows in their order; of values that JSON has not, only the type."""
    digest = hashlib.blake2b(digest_size=16)
    for row in prompts:
        # Not the text of such a value: it may hold the place in memory, which changes from run to run.
        columns = json.dumps(row.columns, skipkeys=True, default=lambda value: type(value).__name__)
        digest.update(f"{row.token_ids}{columns}\n".encode())
    return {"rows": len(prompts), "hash": digest.hexdigest()}


def _rows(config: GRPOConfig, given: Any, configured: str | None, *, split: str) -> list[dict[str, Any]] | None:
    source = configured if given is None else given
    if source is None:
        return None
    takes_options = isinstance(source, str) and ":" in source
    return load_rows(
        source,
        split=split,
        subset=config.data.subset,
        options=config.data.options if takes_options else None,
        base_dir=config.base_dir,
    )


def _prompts(config: GRPOConfig, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> PromptData:
    return prepare_prompts(
        rows,
        tokenizer,
        prompt_column=config.data.prompt_column,
        system_prompt=config.data.system_prompt,
        max_prompt_length=config.rollout.max_prompt_length,
        chat_template_kwargs=config.data.chat_template_kwargs,
    )
