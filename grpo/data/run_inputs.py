"""The inputs of a run besides its configuration: the model's folder, the tokenizer, the prompts.

    inputs = load_run_inputs(config)
    inputs.train_prompts.rows, inputs.eval_prompts, inputs.tokenizer
    inputs.fingerprint()                        # changes if a resumed run has other data
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..common.errors import first_line
from ..common.model_files import resolve_model
from ..common.quiet import quiet_stderr
from ..config import GRPOConfig
from .prompts import Prompt, PromptData, prepare_prompts
from .sources import DataSource, load_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """See the module's docstring. `eval_prompts` is None for a run without evaluation data."""

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
    train_dataset: DataSource | None = None,
    eval_dataset: DataSource | None = None,
) -> RunInputs:
    """Find the model, then read and tokenize the data sets, by default those of the configuration. Writes nothing.

    Raises:
        ValueError, FileNotFoundError: missing or invalid data, no such model; the message says what to do.
    """
    train_rows = _rows(config, train_dataset, config.data.train, split=config.data.train_split)
    eval_rows = _rows(config, eval_dataset, config.data.eval, split=config.data.eval_split)
    if train_rows is None:
        raise ValueError("no training data: set data.train, or pass train_dataset to GRPOTrainer")
    with quiet_stderr():
        model_path = resolve_model(config.model.name, revision=config.model.revision)
        tokenizer = _tokenizer(config, model_path)

    def prepare(rows: list[dict[str, Any]]) -> PromptData:
        return prepare_prompts(rows, tokenizer, config.data, max_prompt_length=config.rollout.max_prompt_length)

    return RunInputs(
        model_path=model_path,
        tokenizer=tokenizer,
        train_prompts=prepare(train_rows),
        eval_prompts=None if eval_rows is None else prepare(eval_rows[: config.data.eval_rows]),
    )


def _tokenizer(config: GRPOConfig, model_path: str) -> PreTrainedTokenizerBase:
    name = config.model.tokenizer
    try:
        return AutoTokenizer.from_pretrained(name or model_path)
    except (OSError, ValueError) as error:  # transformers' errors for a folder or an id that has none
        if name is None:
            raise
        raise ValueError(f"model.tokenizer: no tokenizer in {name}: {first_line(error)}") from error


def _fingerprint(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Number and hash of the rows: tokens and columns in order; for values that JSON cannot represent, only their type."""
    digest = hashlib.blake2b(digest_size=16)
    for row in prompts:
        # Not the text of such a value: it may contain a memory address, which changes from run to run.
        columns = json.dumps(row.columns, skipkeys=True, default=lambda value: type(value).__name__)
        digest.update(f"{row.token_ids}{columns}\n".encode())
    return {"rows": len(prompts), "hash": digest.hexdigest()}


def _rows(config: GRPOConfig, dataset: DataSource | None, configured: str | None, *, split: str) -> list[dict[str, Any]] | None:
    source = configured if dataset is None else dataset
    if source is None:
        return None
    takes_options = isinstance(source, str) and ":" in source
    return load_rows(
        source,
        split=split,
        subset=config.data.subset,
        options=config.data.options if takes_options else None,
    )
