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


def printable(text: str) -> str:
    """A name as one line: control characters, line breaks and what UTF-8 has no bytes for, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
