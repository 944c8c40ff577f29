"""The inputs of a run besides its configuration: the model's folder, the tokenizer, the prompts.

    inputs = load_run_inputs(config)
    inputs.train_prompts.rows, inputs.eval_prompts, inputs.tokenizer
    inputs.fingerprint()                        # changes if a resumed run has other data

There may be several evaluation sets, each with a name. Their prompts are one list, and each knows its set (`Prompt.eval_set`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ...rewards.runner import Scorer
from ...rollout.model_limits import prompt_length
from ..common.exact_json import encode
from ..common.log import logger
from ..common.model_files import check_model, resolve_model
from ..common.quiet import quiet_stderr
from ..config import DataConfig, GRPOConfig, with_options
from ..config.data import EvalSet, check_set_names
from .prompts import Prompt, PromptData, ToolsOfRow, prepare_prompts
from .row_checks import check_rows
from .sources import DataSource, EvalSource, is_stream, load_rows, take_rows, takes_options
from .templates import template_text
from .tokenizers import load_tokenizer, vocab_size_of
from .values import check_column_types

NO_TRAINING_DATA = "no training data: set data.train, or pass train_dataset to GRPOTrainer"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """See the module's docstring. `eval_prompts` is None for a run without evaluation data. Without training data, which only
    an evaluation can do without, `train_prompts` has the first evaluation prompt."""

    model_path: str
    tokenizer: PreTrainedTokenizerBase
    train_prompts: PromptData
    eval_prompts: PromptData | None
    has_training_data: bool = True
    vocab_size: int | None = None
    """Rows of the model's embedding; None: not known."""
    tools: ToolsOfRow | None = None
    """The schemas of the tools of a row; None: the run has none."""
    has_environment: bool = False
    """Whether completions act in an environment, whose `reset` may return the prompts."""

    def counts(self) -> dict[str, Any]:
        """What became of the rows of the training data and of the evaluation data; see `PromptData.counts`."""
        return {
            "training": self.train_prompts.counts(),
            "evaluation": None if self.eval_prompts is None else self.eval_prompts.counts(),
        }

    def check_rows(self, scorer: Scorer, set_scorers: Mapping[str, Scorer] | None = None) -> None:
        """Raise ValueError for the first row that records or the reward functions cannot use."""
        check_rows(scorer, self.train_prompts.rows, "training data")
        if self.eval_prompts is not None:
            check_rows(scorer, self.eval_prompts.rows, "evaluation data", set_scorers)

    def fingerprint(self) -> dict[str, Any]:
        """Number and hash of the rows of the training data and of each evaluation set."""
        prompts = [] if self.eval_prompts is None else self.eval_prompts.rows
        names = dict.fromkeys(prompt.eval_set for prompt in prompts)
        of_sets = {name: _fingerprint([prompt for prompt in prompts if prompt.eval_set == name]) for name in names}
        return {
            "training data": _fingerprint(self.train_prompts.rows),
            "evaluation data": of_sets.get(None, of_sets or None),  # a single set has no name
        }


def load_run_inputs(
    config: GRPOConfig,
    train_dataset: DataSource | None = None,
    eval_dataset: EvalSource | None = None,
    tools: ToolsOfRow | None = None,
    *,
    has_environment: bool = False,
) -> RunInputs:
    """Find the model, then read and tokenize the data sets, by default those of the configuration. Writes nothing.

    Of training data without a length, only as many rows are read as the steps of the run have prompts.

    Args:
        tools: the schemas of the tools of a row, which go into its prompt.
        has_environment: rows may have no prompts: `reset` of the environment returns them.

    Raises:
        ValueError, FileNotFoundError: missing or invalid data, no such model; the message says what to do.
    """
    data = config.data
    train_source = data.train if train_dataset is None else train_dataset
    eval_source = data.eval if eval_dataset is None else eval_dataset
    if train_source is None and eval_source is None:
        raise ValueError(NO_TRAINING_DATA)
    check_model(config.model.name, revision=config.model.revision)
    train_rows = None
    if train_source is not None:
        train_rows = _load(data, train_source, data.train_split, lambda: _rows_of_all_steps(config))
        check_column_types(train_rows, data.column_types)
    eval_sets = _load_eval(data, eval_source)
    with quiet_stderr():
        model_path = resolve_model(config.model.name, revision=config.model.revision)
        vocab_size = vocab_size_of(config, model_path)
        tokenizer = load_tokenizer(config, model_path)
    config = with_fitting_prompts(config, model_path)

    def prepare(rows: _Rows, eval_set: str | None = None) -> PromptData:
        return _prepare(config, rows, tokenizer, vocab_size, eval_set, tools, has_environment)

    train_prompts = None if train_rows is None else prepare(_Rows(train_rows, data))
    eval_prompts = _joined({name: prepare(rows, name) for name, rows in eval_sets.items()}) if eval_sets else None
    if train_prompts is None:
        assert eval_prompts is not None, "there are data of one kind"
        train_prompts = replace(eval_prompts, rows=eval_prompts.rows[:1])
    return RunInputs(
        model_path=model_path,
        tokenizer=tokenizer,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        has_training_data=train_rows is not None,
        vocab_size=vocab_size,
        tools=tools,
        has_environment=has_environment,
    )


def with_fitting_prompts(config: GRPOConfig, model_path: str) -> GRPOConfig:
    """The configuration with a default of `rollout.max_prompt_length` that the model's context has room for."""
    fitting = prompt_length(config.rollout, model_path)
    if fitting == config.rollout.max_prompt_length:
        return config
    note = f"rollout.max_prompt_length is {fitting}, less than its default, as the model's context is short"
    return with_options(config, {"rollout": {"max_prompt_length": fitting}}, notes=[note])


def load_eval_prompts(config: GRPOConfig, eval_dataset: EvalSource, inputs: RunInputs) -> PromptData:
    """Evaluation data other than the run's, whose inputs are `inputs`.

    Raises:
        ValueError, FileNotFoundError: missing or invalid data.
    """
    sets = _load_eval(config.data, eval_dataset).items()

    def prepare(rows: _Rows, name: str | None) -> PromptData:
        return _prepare(config, rows, inputs.tokenizer, inputs.vocab_size, name, inputs.tools, inputs.has_environment)

    return _joined({name: prepare(rows, name) for name, rows in sets})


def with_template_text(config: GRPOConfig) -> GRPOConfig:
    """The configuration with the text of `data.chat_template` in the place of its file, so that a run keeps what it used.

    Raises:
        FileNotFoundError: no such file.
    """
    template = config.data.chat_template
    if template is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"chat_template": template_text(template)})})


def read_streams(
    config: GRPOConfig, train_dataset: DataSource | None, eval_dataset: EvalSource | None
) -> tuple[DataSource | None, EvalSource | None]:
    """The data sets, but of every stream the rows that `load_run_inputs` would read, so that all workers have the same.

    Raises:
        ValueError: as `load_run_inputs` does for a stream.
    """

    def read(source: DataSource, split: str, stream_rows: Callable[[], int | None]) -> DataSource:
        if isinstance(source, datasets.IterableDatasetDict) and split in source:
            source = source[split]
        return take_rows(source, stream_rows()) if is_stream(source) else source

    data = config.data
    if train_dataset is not None:
        train_dataset = read(train_dataset, data.train_split, lambda: _rows_of_all_steps(config))
    eval_sets = {
        name: one if isinstance(one, EvalSet) else read(one, data.eval_split, lambda: data.eval_rows)
        for name, one in _eval_sets(eval_dataset).items()
    }
    if None in eval_sets:
        return train_dataset, eval_sets[None]
    return train_dataset, {str(name): one for name, one in eval_sets.items()} or None


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a data set, and the options that they are read with."""

    rows: list[dict[str, Any]]
    data: DataConfig


def _load(data: DataConfig, source: DataSource, split: str, stream_rows: Callable[[], int | None]) -> list[dict[str, Any]]:
    return load_rows(
        source,
        split=split,
        subset=data.subset,
        options=data.options if takes_options(source) else None,
        stream_rows=stream_rows,
        encoding=data.encoding,
        column_types=data.column_types,
    )


def _load_eval(data: DataConfig, source: EvalSource | None) -> dict[str | None, _Rows]:
    """The rows of each evaluation set."""
    return {name: _load_set(data, name, one) for name, one in _eval_sets(source).items()}


def _load_set(data: DataConfig, name: str | None, source: DataSource | EvalSet) -> _Rows:
    if isinstance(source, EvalSet):
        data, source = data.of_eval_set(source), source.source
    with _errors_about(name):
        return _Rows(_load(data, source, data.eval_split, lambda: data.eval_rows)[: data.eval_rows], data)


def _prepare(
    config: GRPOConfig,
    rows: _Rows,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None,
    eval_set: str | None,
    tools: ToolsOfRow | None,
    has_environment: bool,
) -> PromptData:
    with _errors_about(eval_set):
        return prepare_prompts(
            rows.rows,
            tokenizer,
            rows.data,
            max_prompt_length=config.rollout.max_prompt_length,
            vocab_size=vocab_size,
            tools=tools,
            has_environment=has_environment,
        )


def _rows_of_all_steps(config: GRPOConfig) -> int:
    """How many rows of a stream the run can use.

    Raises:
        ValueError: the run's length is given in epochs, which a stream does not have.
    """
    optim = config.optim
    if optim.num_train_epochs is not None:
        raise ValueError(
            "optim.max_steps must be set: the training data has no length (it is an iterator or an IterableDataset), so "
            f"optim.num_train_epochs={optim.num_train_epochs:g} is no number of steps"
        )
    rows = optim.max_steps * optim.prompts_per_step
    logger.info(f"reading at most {rows} rows of the training data, which has no length: the prompts of all steps")
    return rows


def _eval_sets(source: EvalSource | None) -> dict[str | None, DataSource | EvalSet]:
    """The evaluation sets by name; a single data set has none.

    Raises:
        ValueError: a name would make the names of metrics ambiguous; an empty mapping.
    """
    if source is None:
        return {}
    if not isinstance(source, Mapping):
        return {None: source}
    is_by_split = isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict)
    # A split may be a `datasets.Split`.
    by_name: dict[Any, DataSource | EvalSet] = {str(name) if is_by_split else name: one for name, one in source.items()}
    try:
        check_set_names(by_name)
    except ValueError as error:
        raise ValueError(f"eval_dataset: {error}") from None
    return {**by_name}


@contextmanager
def _errors_about(eval_set: str | None) -> Iterator[None]:
    """Put the name of the evaluation set before errors about its rows."""
    try:
        yield
    except ValueError as error:
        if eval_set is None:
            raise
        raise ValueError(f"evaluation set {eval_set!r}: {error}") from error


def _joined(sets: Mapping[str | None, PromptData]) -> PromptData:
    """The prompts of all evaluation sets, each with the name of its set and the columns of all sets."""
    columns = dict.fromkeys(name for data in sets.values() for name in data.rows[0].columns)
    rows = [
        replace(prompt, eval_set=name, columns={column: prompt.columns.get(column) for column in columns})
        for name, data in sets.items()
        for prompt in data.rows
    ]
    remarks = Counter[str]()
    for data in sets.values():
        remarks.update(data.remarks)
    return PromptData(
        rows=rows,
        dropped=sum(data.dropped for data in sets.values()),
        bad_rows=tuple(
            error if name is None else f"evaluation set {name!r}: {error}"
            for name, data in sets.items()
            for error in data.bad_rows
        ),
        remarks=dict(remarks),
    )


def _fingerprint(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Number and hash of the rows: tokens and columns in order; of an object with another type than `plain` makes, its type."""
    digest = hashlib.blake2b(digest_size=16)
    for row in prompts:
        # Not the text of such a value: it may contain a memory address, which changes from run to run.
        columns = encode(row.columns, default=lambda value: type(value).__name__)
        digest.update(f"{row.token_ids}{columns}\n".encode())
    return {"rows": len(prompts), "hash": digest.hexdigest()}
