"""Where the commands print: results on standard output, everything else on standard error."""

import io
import sys

from rich.console import Console

for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):  # what an old terminal or a pipe can't show is escaped, and no error
        _stream.reconfigure(errors="backslashreplace")


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, emoji=False)
    return made if made.is_terminal else Console(stderr=stderr, emoji=False, width=200)  # a file has no 80 columns


console, messages = _console(stderr=False), _console(stderr=True)


def heat(value: float) -> str:
    """A colour for a value in [-1, 1]: red for positive, blue for negative, white for 0."""
    fade = round(255 * (1 - min(1.0, abs(value))))
    return f"rgb(255,{fade},{fade})" if value >= 0 else f"rgb({fade},{fade},255)"


def printable(text: str) -> str:
    """A name as one line: control characters, line breaks and what UTF-8 has no bytes for, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
