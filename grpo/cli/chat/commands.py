"""The commands of a chat, lines that begin with `/`: what they do to a session, and what they answer.

    commands = Commands(session)
    commands.run("/temperature 0")      # "temperature 0: greedy"
    is_command("/help"), is_command("// is a comment")      # True, False
"""

from __future__ import annotations

from collections.abc import Callable
from os.path import expanduser
from pathlib import Path

from ...display.view_text import decimal
from .adapters import BASE, StoredAdapter
from .saving import save
from .session import SIDES, ChatSession


class QuitChat(Exception):  # noqa: N818  # it is no error
    """`/quit`."""


HELP = {
    "/help": "this list",
    "/temperature T": "0 is greedy",
    "/top_p P": "probability mass to sample from, up to 1",
    "/max N": "most tokens of an answer",
    "/seed N": "the same answers each time; `/seed none`: other ones",
    "/system TEXT": "set the system prompt, and start a new conversation; `/system none`: without one",
    "/checkpoint NAME": "final, last, best, a number of steps, or base; without a name: list them",
    "/only SIDE": "base, trained or both",
    "/reset": "start a new conversation",
    "/save FILE": "write the conversation to FILE.json or FILE.jsonl",
    "/quit": "leave, like Ctrl-D",
}
NOTES = (
    "Without a value, a command shows the current one.",
    "A line that ends with a backslash goes on with the next one; pasted lines are one message.",
    "Ctrl-C stops an answer. A message that begins with / is written with //.",
)


def is_command(line: str) -> bool:
    """Whether a line is a command and no message. `//` begins a message with a single slash."""
    return line.startswith("/") and not line.startswith("//")


def as_message(line: str) -> str:
    """The message in a line that is no command."""
    return line[1:] if line.startswith("//") else line


class Commands:
    """See the module's docstring."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._written: set[Path] = set()
        self._by_name: dict[str, Callable[[str], str]] = {
            "help": self._help,
            "temperature": self._temperature,
            "top_p": self._top_p,
            "max": self._max,
            "seed": self._seed,
            "system": self._system,
            "checkpoint": self._checkpoint,
            "only": self._only,
            "reset": self._reset,
            "save": self._save,
            "quit": self._quit,
        }

    @property
    def names(self) -> list[str]:
        """All commands, with the slash."""
        return [f"/{name}" for name in self._by_name]

    def run(self, line: str) -> str:
        """Run a command; returns what to show.

        Raises:
            ValueError: there is no such command, or its value is wrong. Nothing has changed then.
            QuitChat: the user leaves.
        """
        name, _, value = line[1:].partition(" ")
        found = self._by_name.get(name.strip().lower())
        if found is None:
            raise ValueError(f"no command /{name}: /help lists them, and a message that begins with / is written with //")
        return found(value.strip())

    # ------------------------------------------------------------------------------------------------------ sampling

    def _temperature(self, value: str) -> str:
        if value:
            self._session.change(temperature=_number(value, "temperature"))
        temperature = self._session.settings.temperature
        return f"temperature {temperature:g}" + (": greedy" if temperature == 0 else "")

    def _top_p(self, value: str) -> str:
        if value:
            self._session.change(top_p=_number(value, "top_p"))
        return f"top_p {self._session.settings.top_p:g}"

    def _max(self, value: str) -> str:
        if value:
            self._session.change(max_tokens=_integer(value, "max", least=1))
        return f"at most {self._session.settings.max_tokens} tokens for an answer"

    def _seed(self, value: str) -> str:
        if value:
            self._session.change(seed=None if value.lower() == "none" else _integer(value, "seed", least=0))
        seed = self._session.settings.seed
        return "no seed: other answers each time" if seed is None else f"seed {seed}"

    # -------------------------------------------------------------------------------------------------- conversation

    def _system(self, value: str) -> str:
        session = self._session
        if value:
            session.set_system(None if value.lower() == "none" else value)
            return "new conversation " + ("without a system prompt" if session.system is None else "with this system prompt")
        return "no system prompt" if session.system is None else f"system prompt: {session.system}"

    def _reset(self, value: str) -> str:
        _no_value(value, "reset")
        self._session.reset()
        return "new conversation"

    def _save(self, value: str) -> str:
        if not value:
            raise ValueError("/save needs the name of a file that ends in .json or .jsonl")
        file = Path(expanduser(value))
        if file.exists() and file.resolve() not in self._written:
            raise ValueError(f"{value} exists already: give another name")
        save(self._session, file)
        self._written.add(file.resolve())
        return f"written: {value}"

    # ---------------------------------------------------------------------------------------------------------- sides

    def _only(self, value: str) -> str:
        session = self._session
        wanted = value.lower()
        if wanted and session.target.adapters is None and wanted != BASE:
            raise ValueError(f"{session.target.name} is a model without an adapter: there is only one side")
        if wanted == "both":
            session.shown = SIDES
        elif wanted in SIDES:
            session.shown = tuple(side for side in SIDES if side == wanted)
        elif wanted:
            raise ValueError(f"/only takes base, trained or both (got {value})")
        if len(session.shown) > 1:
            return "both sides answer"
        return f"only the {''.join(session.shown)} side answers; the conversation of the other one stays as it is"

    def _checkpoint(self, value: str) -> str:
        session = self._session
        if value:
            switch = session.select(value)
            read = "" if switch.read_seconds is None else f", read in {switch.read_seconds:.2f} s"
            published = "" if switch.label == BASE else f" (published in {1e3 * switch.publish_seconds:.0f} ms{read})"
            return f"the trained side answers with {switch.label}{published}"
        if session.target.adapters is None:
            return f"{session.target.name} is a model without an adapter"
        lines = [_line(BASE, "the model without an adapter", session.checkpoint == BASE)]
        lines += [_line(one.name, _about(one), one.label == session.checkpoint) for one in session.target.adapters.listed()]
        return "\n".join(lines)

    # ----------------------------------------------------------------------------------------------------------- rest

    def _help(self, value: str) -> str:
        width = max(map(len, HELP))
        return "\n".join([*(f"{usage:<{width}}  {text}" for usage, text in HELP.items()), *NOTES])

    def _quit(self, value: str) -> str:
        raise QuitChat


def _line(name: str, about: str, is_selected: bool) -> str:
    return f"{'*' if is_selected else ' '} {name:<8} {about}".rstrip()


def _about(saved: StoredAdapter) -> str:
    if saved.problem is not None:
        return f"cannot be read: {saved.problem}"
    if saved.checkpoint is None:
        return str(saved.folder)
    return "checkpoint" + ("" if saved.reward is None else f", reward {decimal(saved.reward, 3)}")


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: must be a number (got {text})") from None


def _integer(text: str, name: str, *, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name}: must be an integer (got {text})") from None
    if value < least:
        raise ValueError(f"{name}: must be at least {least} (got {text})")
    return value


def _no_value(text: str, name: str) -> None:
    if text:
        raise ValueError(f"/{name} takes no value (got {text})")
