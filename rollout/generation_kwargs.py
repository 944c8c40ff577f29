"""`rollout.generation_kwargs`: the arguments of vLLM's SamplingParams that have no option of their own here. Imports no torch.

    kwargs = GenerationKwargs(min_tokens=8, structured_outputs=StructuredOutputs(regex=r"-?[0-9]+"))
    kwargs.that_change_the_distribution     # ["min_tokens", "structured_outputs"]

Names, meanings and limits are vLLM's, and a test holds the tables of this module complete against the installed version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, field_validator, model_validator

from ..section import Section

TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]

OPTIONS = {
    "n": "rollout.num_generations",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "min_p": "rollout.min_p",
    "repetition_penalty": "rollout.repetition_penalty",
    "stop": "rollout.stop",
    "max_tokens": "rollout.max_completion_length",
    "skip_special_tokens": "rollout.skip_special_tokens",
    "include_stop_str_in_output": "rollout.include_stop_str_in_output",
    "seed": "seed",
}
"""Arguments of vLLM that are options here, and the option."""

DECIDED_HERE = frozenset(
    {"logprobs", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "flat_logprobs"}
    | {"detokenize", "spaces_between_special_tokens", "output_kind", "stream_interval", "skip_clone"}
    | {"output_text_buffer_length", "skip_reading_prefix_cache", "routed_experts_prompt_start", "trace_decode_token_ids"}
)
"""Arguments of vLLM about what it returns and how, which training depends on."""

UNSUPPORTED = {
    "thinking_token_budget": "it needs a reasoning parser, which this engine has not",
    "repetition_detection": "a completion ends with a token, a stop string or at the length limit; use the reward function "
    "repetition_penalty",
    "watermarking": "this engine has no watermark",
    "extra_args": "this engine has no custom logits processors",
}
"""Arguments of vLLM that this engine cannot use, and why."""

IGNORED_BY_VLLM = frozenset({"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"})
"""Arguments of vLLM's StructuredOutputsParams that its engines ignore: they read those of their own configuration."""


class StructuredOutputs(Section):
    """What completions must match, exactly one of these. vLLM samples only tokens that can still lead to a match."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_alias=True, validate_by_name=True)

    json_schema: Text | dict[str, JsonValue] | None = Field(default=None, alias="json")
    """A JSON schema, as a mapping or as text."""

    regex: Text | None = None
    """A regular expression for the complete text."""

    choice: list[Text] | None = Field(default=None, min_length=1)
    """The texts to choose from."""

    grammar: Text | None = None
    """A context-free grammar, in EBNF or Lark."""

    json_object: Literal[True] | None = None
    """Any JSON object."""

    structural_tag: Text | None = None
    """Tags whose contents have a schema, as JSON text; see vLLM."""

    @model_validator(mode="before")
    @classmethod
    def _object_of_vllm(cls, values: Any) -> Any:
        """The fields of a `StructuredOutputsParams` that are set, as TRL's scripts have it."""
        if dataclasses.is_dataclass(values) and not isinstance(values, type):
            fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(values) if field.init}
            values = {name: value for name, value in fields.items() if value not in (None, False)}
        known = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = [name for name in values if name not in (*known, "json_schema")] if isinstance(values, Mapping) else []
        if unknown:
            raise ValueError("; ".join(_problem_with_outputs(str(name), known) for name in unknown))
        return values

    @field_validator("json_schema", mode="before")
    @classmethod
    def _text_or_mapping(cls, schema: object) -> object:
        if not isinstance(schema, str | dict | None):
            raise ValueError(f"must be a JSON schema, as a mapping or as text (got {schema!r})")
        return schema

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        names = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        values = (self.json_schema, self.regex, self.choice, self.grammar, self.json_object, self.structural_tag)
        given = [name for name, value in zip(names, values, strict=True) if value is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(names)} (got {' and '.join(given) or 'none'})")
        return self


class GenerationKwargs(Section):
    """Further arguments of vLLM's SamplingParams, by its names. The options of `rollout` are not among them."""

    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logits of tokens that the completion has, [-2, 2]."""

    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logit of a token, times its number in the completion, [-2, 2]."""

    min_tokens: int = Field(default=0, ge=0)
    """Tokens before which a completion cannot end, at most `rollout.max_completion_length`."""

    bad_words: list[Text] = Field(default=[])
    """Texts that are never completed: the last of their tokens is not sampled after the others."""

    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field(default={})
    """Added to the logits of tokens, by token id, [-100, 100]."""

    allowed_token_ids: list[TokenId] | None = Field(default=None, min_length=1)
    """The only tokens that are sampled. None: all."""

    structured_outputs: StructuredOutputs | None = None
    """What completions must match: a mapping with one of `json` (a schema), `regex`, `choice` (a list of texts), `grammar`,
    `json_object` (true) and `structural_tag`. None: anything."""

    stop_token_ids: list[TokenId] = Field(default=[])
    """Tokens that end a completion, in addition to those of the model. Both engines."""

    ignore_eos: bool = False
    """Do not end a completion at the end-of-sequence tokens of the model. Both engines."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            problems = [_problem(str(name)) for name in values if name not in cls.model_fields]
            if problems:
                raise ValueError("; ".join(problems))
        return values

    @model_validator(mode="after")
    def _a_grammar_says_it_all(self) -> GenerationKwargs:
        """Together they can leave no token at all, and without the end of sequence nothing ends a match."""
        others = ("min_tokens", "bad_words", "allowed_token_ids", "ignore_eos")
        conflicting = [name for name in others if name in self.given]
        if self.structured_outputs is not None and conflicting:
            raise ValueError(
                f"structured_outputs does not go with {' and '.join(conflicting)}: let the expression or grammar say which "
                "texts there are, and how long"
            )
        return self

    @property
    def given(self) -> list[str]:
        """The arguments that have another value than their default."""
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]

    @property
    def that_change_the_distribution(self) -> list[str]:
        """The given arguments with which tokens are drawn from another distribution than the policy's."""
        return [name for name in self.given if name not in IN_BOTH_ENGINES]


IN_BOTH_ENGINES = ("stop_token_ids", "ignore_eos")
"""Arguments that say where a completion ends, and nothing about its tokens."""


def _problem(name: str) -> str:
    """Why there is no such argument."""
    if name in OPTIONS:
        return f"{name} is an option of its own: set {OPTIONS[name]}"
    if name in DECIDED_HERE:
        return f"{name} cannot be set: training needs what it decides"
    if name in UNSUPPORTED:
        return f"{name} is not supported: {UNSUPPORTED[name]}"
    return _unknown(name, [*GenerationKwargs.model_fields], options=OPTIONS)


def _problem_with_outputs(name: str, known: Sequence[str]) -> str:
    """Why there is no such key of `structured_outputs`."""
    if name in IGNORED_BY_VLLM:
        return f"{name} has no effect on a request in vLLM: leave it out; a grammar can say it"
    return _unknown(name, known)


def _unknown(name: str, known: Sequence[str], *, options: Mapping[str, str] | None = None) -> str:
    """A suggestion for a name that is none of the known ones, nor of those that are options."""
    options = options or {}
    near = get_close_matches(name, [*known, *options], n=1, cutoff=0.7)
    suggestion = f"did you mean {options.get(near[0], near[0])}?" if near else f"known are {', '.join(known)}"
    return f"{name} is unknown; {suggestion}"
