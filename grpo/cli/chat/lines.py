"""The lines of a chat: typed at a terminal with readline, or read from a pipe.

    for line in typed_lines(["/help", "/quit"]): ...        # until Ctrl-D or Ctrl-C
    for line in piped_lines(sys.stdin): ...

A line that ends with a backslash goes on with the next one. Pasted lines are one line with line breaks in it, if the terminal
marks what is pasted (bracketed paste).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

PROMPT, CONTINUED = "> ", "… "


def typed_lines(words: Sequence[str]) -> Iterator[str]:
    """Lines typed at the terminal, with history and editing. `words`: what Tab completes at the start of a line."""
    _prepare_readline(words)
    while True:
        try:
            line = input(PROMPT)
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input(CONTINUED)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def piped_lines(stream: Iterable[str]) -> Iterator[str]:
    """The lines of a stream."""
    held = ""
    for line in stream:
        held += line.removesuffix("\n")
        if held.endswith("\\"):
            held = held[:-1] + "\n"
            continue
        yield held
        held = ""
    if held:
        yield held


def _prepare_readline(words: Sequence[str]) -> None:
    try:
        import readline
    except ImportError:  # Python was built without it: lines are typed without history
        return

    def complete(text: str, state: int) -> str | None:
        found = [word for word in words if text.startswith("/") and word.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
