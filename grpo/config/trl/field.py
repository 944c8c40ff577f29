"""A record of one field of TRL's `GRPOConfig`, and the five ways to make one.

    mapped("optim.learning_rate", "float", 1e-6)            # the value is that of an option of ours
    converted("model.dtype", "bool | None", None, note)     # `convert.py` computes the value
    other_default("optim.prompts_per_step", "int", 8, note) # the same, and TRL's default counts if the script does not set it
    moot("bool", False, note)                               # nothing to do here
    refused("bool", False, note)                            # an error with what to do instead, except for TRL's default

`type` and `default` are those of TRL; the type is that of editors too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["mapped", "other default", "no effect", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlField:
    """See the module's docstring.

    Attributes:
        to: the options of ours that the field sets, by their dotted names.
        converts: whether `convert.py` computes their values; otherwise the only one of `to` gets the value itself.
        note: how it is converted, why it has no effect, or what to do instead of it.
        is_reported: a run says that the field has no effect: its reader would expect one.
    """

    kind: Kind
    type: str
    default: object
    to: tuple[str, ...] = ()
    converts: bool = False
    note: str = ""
    is_reported: bool = False


def mapped(to: str, type: str, default: object, note: str = "") -> TrlField:
    """The value is that of an option of ours."""
    return TrlField(kind="mapped", type=type, default=default, to=(to,), note=note)


def converted(to: str, type: str, default: object, note: str) -> TrlField:
    """`convert.py` computes the values of one or several options of ours, separated by commas."""
    return TrlField(kind="mapped", type=type, default=default, to=tuple(to.split(", ")), converts=True, note=note)


def other_default(to: str, type: str, default: object, note: str) -> TrlField:
    """As `converted`. If a script names any field of the batch but not this one, TRL's default is used, not ours."""
    return TrlField(kind="other default", type=type, default=default, to=tuple(to.split(", ")), converts=True, note=note)


def moot(type: str, default: object, note: str, *, is_reported: bool = False) -> TrlField:
    """Accepted: there is nothing to do here, whatever the value."""
    return TrlField(kind="no effect", type=type, default=default, note=note, is_reported=is_reported)


def refused(type: str, default: object, note: str) -> TrlField:
    """An error, with what to do instead; only the default, which asks for nothing, is accepted."""
    return TrlField(kind="refused", type=type, default=default, note=note)
