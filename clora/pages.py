"""Files that are written whole or not at all, and pages whose figures a command replaces between two marks."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

BEGIN, END = b"<!-- figures -->", b"<!-- end of figures -->"


def write(file: Path, data: bytes) -> None:
    """Write a file whole or not at all; one that was there keeps its mode."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file, since it is replaced in one step only within a file system.
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as copy:
        try:
            copy.write(data)
            copy.flush()
            os.fsync(copy.fileno())
            os.chmod(copy.name, file.stat().st_mode if file.exists() else 0o644)
            os.replace(copy.name, file)
        except BaseException:
            os.unlink(copy.name)
            raise


def fault(file: Path) -> str | None:
    """Why a page cannot take figures, with the fix; one that does not exist can: it is made."""
    if not file.exists():
        return None if file.absolute().parent.is_dir() else f"{file}: there is no folder {file.parent}; make it"
    text = file.read_bytes()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return f"{file} must have the line {BEGIN.decode()} and, below it, {END.decode()}, once each; add them"
    return None


def write_figures(file: Path, figures: str) -> None:
    """Put figures between the marks of a page; every other byte of it stays.

    Raises
    ------
    ValueError
        The page has no marks.
    """
    if (reason := fault(file)) is not None:
        raise ValueError(reason)
    old = file.read_bytes() if file.exists() else BEGIN + b"\n" + END + b"\n"
    write(file, old[: old.index(BEGIN)] + BEGIN + f"\n\n{figures.strip()}\n\n".encode() + old[old.index(END) :])
