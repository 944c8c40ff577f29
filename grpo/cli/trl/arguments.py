"""The class that takes the place of TRL's `GRPOConfig` in a script: a dataclass, so that `TrlParser` and `HfArgumentParser` can
make options of a command line from it. Calling it gives a configuration of rankup, never an instance of it.

    args = GRPOConfig("out", learning_rate=1e-5, use_vllm=False)        # a ScriptConfig
    args.learning_rate, args.use_vllm, args.push_to_hub                 # 1e-5, False, and TRL's default: False
    args.model_init_kwargs = {"dtype": "float32"}                       # until a trainer has read it

    @dataclass
    class MyConfig(GRPOConfig):                                         # more fields are attributes of the configuration
        chat_template: str | None = None
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from pydantic import PrivateAttr

from ...config import GRPOConfig as RankupConfig
from ...config.trl.arguments import Arguments
from ...config.trl.fields import FIELDS, OLDER_NAMES, TrlField

Value = Any
"""A value as a script wrote it."""

NO = "no_"
"""The beginning of an option that switches another one off."""


class ScriptConfig(RankupConfig):
    """rankup's configuration, with the script's own fields; it can be changed until a trainer has read it."""

    _written: dict[str, Value] = PrivateAttr(default_factory=dict)
    _more: dict[str, Value] = PrivateAttr(default_factory=dict)
    _is_read: bool = PrivateAttr(default=False)

    def __init__(self, **values: Unpack[Arguments]) -> None:
        super().__init__(**values)
        self._written = dict(values)

    def with_more(self, more: Mapping[str, Value]) -> Self:
        """The same object, with fields of the script's own as attributes."""
        self._more = dict(more)
        return self

    def model_copy(self, *, update: Mapping[str, Value] | None = None, deep: bool = False) -> Self:
        """A copy that does not change any more: a trainer makes it."""
        copied = super().model_copy(update=update, deep=deep)
        copied._is_read = True
        return copied

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Value:
            if name.startswith("_"):
                return super().__getattr__(name)
            if name in self._more:
                return self._more[name]
            return super().__getattr__(name)

        def __setattr__(self, name: str, value: Value) -> None:
            if name.startswith("_"):
                super().__setattr__(name, value)
            elif self._is_read:
                raise ValueError(f"{name}: a trainer has read its configuration: set it before GRPOTrainer(...)")
            elif name in self._more:
                self._more[name] = value
            else:
                self._become(type(self)(**{**self._written, name: value}))

    def _become(self, other: ScriptConfig) -> None:
        more = self._more
        for attribute in ("__dict__", "__pydantic_fields_set__", "__pydantic_private__"):
            object.__setattr__(self, attribute, getattr(other, attribute))
        self._more = more


def _new(cls: type, *positional: Value, **named: Value) -> ScriptConfig:
    """What calling the dataclass gives. A parser passes all fields, as None those that nobody has set."""
    _refuse_methods(cls)
    values = {**dict(zip(FIELDS, positional, strict=False)), **named}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        is_changed = name not in _FIELDS or field.default is not _FIELDS[name].default
        if is_changed and name not in values:
            values[name] = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if values.keys() >= FIELDS.keys():
        values = {name: value for name, value in values.items() if value is not None or name not in _FIELDS}
    for name in [name for name in values if name.startswith(NO) and name in _FIELDS]:
        values[name.removeprefix(NO)] = not values.pop(name)
    more = {name: values.pop(name) for name in fields if name not in _FIELDS and name in values}
    if taken := [name for name in more if name in RankupConfig.model_fields]:
        raise ValueError(f"{cls.__name__}.{taken[0]}: is the name of a section of the configuration; rename this field")
    return ScriptConfig(**cast(Arguments, values)).with_more(more)


def _refuse_methods(cls: type) -> None:
    """Methods of a subclass would never be called: what its call gives is no instance of it."""
    for owner in cls.__mro__[: cls.__mro__.index(GRPOConfig)]:
        for name, value in vars(owner).items():
            is_method = callable(value) or isinstance(value, property | classmethod | staticmethod)
            is_field = name in getattr(owner, "__dataclass_fields__", ())
            if name == "__post_init__" or (is_method and not is_field and not name.startswith("__")):
                raise ValueError(
                    f"{cls.__name__}.{name}: `rankup trl` supports fields in a subclass of GRPOConfig, not methods: make it a "
                    "function of the script"
                )


def _options(name: str, field: TrlField) -> Iterator[tuple[str, type, Any]]:
    """Fields that are None if nobody has set them, so that a parser passes nothing on: the name, and `no_...` of a switch that
    is on in TRL, for which its parsers have an option too."""
    text = field.note if field.kind != "mapped" or field.converts else f"sets {field.to[0]}{field.note and '; ' + field.note}"
    help_text = f"{text} [{field.kind}]".replace("%", "%%")
    yield name, _type(field.type), dataclasses.field(default=None, metadata={"help": help_text})
    if field.default is True:
        yield f"{NO}{name}", bool, dataclasses.field(default=None, metadata={"help": f"{name}=false"})


def _type(written: str) -> type:
    """The type of the option: of mappings and of several types it is text, which the configuration reads."""
    simple = {"bool": bool, "int": int, "float": float, "list[str]": list[str], "list[float]": list[float]}
    name, is_optional = written.removesuffix(" | None"), written.endswith(" | None")
    found = simple.get(name, str)
    return cast(type, found | None if is_optional and found is bool else found)


GRPOConfig = dataclasses.make_dataclass(
    "GRPOConfig",
    [option for name, field in {**FIELDS, **OLDER_NAMES}.items() for option in _options(name, field)],
    namespace={"__new__": _new, "__module__": __name__, "__doc__": __doc__},
)
"""See the module's docstring."""

_FIELDS = {field.name: field for field in dataclasses.fields(GRPOConfig)}
