"""The options of `rankup eval` as values of a configuration.

    config = config_for(target, options)    # of `rankup eval runs/mine --data gsm8k=openai/gsm8k --reward gsm8k=last_number`
    config.data.eval                        # {"gsm8k": EvalSet(source="openai/gsm8k")}
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import yaml

from ...config import GRPOConfig, load_config
from ...config.files import make_config
from ...config.loading import parse_yaml
from .target import Target

NAMED = re.compile(r"([^\s/:={}]+)=(.+)", re.DOTALL)
"""`NAME=SOURCE`, `NAME=FUNCTION`."""

OPTIONS = {
    "samples": ("data", "eval_samples"),
    "temperature": ("data", "eval_temperature"),
    "top_p": ("data", "eval_top_p"),
    "split": ("data", "eval_split"),
    "rows": ("data", "eval_rows"),
    "max_completion_length": ("rollout", "max_completion_length"),
}
"""Options of the command line, and what they set."""


def config_for(target: Target, options: argparse.Namespace) -> GRPOConfig:
    """The configuration of an evaluation: that of the target, with the options, with the overrides, which come last.

    Raises:
        ValueError, FileNotFoundError: invalid options or data; the message says what to do.
    """
    changes: dict[str, dict[str, Any]] = {section: dict(values) for section, values in target.values.items()}
    for name, (section, option) in OPTIONS.items():
        if (value := getattr(options, name)) is not None:
            changes.setdefault(section, {})[option] = value
    data, rewards = changes.setdefault("data", {}), changes.setdefault("rewards", {})
    if options.data:
        data["eval"] = _sets(options.data)
        rewards["eval_functions"] = {}
    if options.reward:
        rewards |= _functions(options.reward)
    if target.adapter is not None:
        changes["lora"] = {"start_from": None}  # the run's adapter needs no other one
    if target.config_file is None:
        config = make_config(changes, options.overrides)
    else:
        config = load_config(target.config_file, options.overrides, changes=changes)
    if config.data.eval is None:
        raise ValueError("no evaluation data: set data.eval, or give --data")
    rollout = config.rollout.model_copy(update={"routed_experts": "ignore"})  # nothing is trained on them
    # An environment may decide about the rows; else the training data need not exist any more.
    data = config.data if rollout.environment is not None else config.data.model_copy(update={"train": None})
    return config.model_copy(update={"data": data, "rollout": rollout})


def _sets(sources: Sequence[str]) -> str | dict[str, dict[str, str]]:
    """`data.eval`, from `SOURCE` or `NAME=SOURCE`, of which there may be several.

    Raises:
        ValueError: several without names, or a name twice.
    """
    named = [match for source in sources if (match := NAMED.fullmatch(source))]
    if not named:
        if len(sources) > 1:
            raise ValueError("--data: several sets need names: --data easy=easy.jsonl --data hard=hard.jsonl")
        return sources[0]
    if len(named) < len(sources) or len({match[1] for match in named}) < len(named):
        raise ValueError("--data: give each set its own name: --data easy=easy.jsonl --data hard=hard.jsonl")
    return {match[1]: {"source": match[2]} for match in named}


def _functions(rewards: Sequence[str]) -> dict[str, Any]:
    """Options of the section `rewards`, from `FUNCTION`, for all sets, or `NAME=FUNCTION`, for one; a function is a name or a
    mapping in YAML.

    Raises:
        ValueError: invalid YAML.
    """
    of_sets: dict[str, list[Any]] = {}
    of_all: list[Any] = []
    for text in rewards:
        match = None if text.lstrip().startswith("{") else NAMED.fullmatch(text)
        (of_all if match is None else of_sets.setdefault(match[1], [])).append(_function(match[2] if match else text))
    return {"eval_functions": of_sets, **({"functions": of_all, "weights": None} if of_all else {})}


def _function(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--reward: {text!r} is not valid YAML: {' '.join(str(error).split())}") from error

