"""Errors of this package whose usual cause is the same in many places. clora_core composes the messages."""

from __future__ import annotations

from clora_core.errors import FormatError, OptionError, StateError, message


def bad(where: str, what: str, got: object, needed: object, *, cause: str = "", fix: str = "") -> FormatError:
    """A file or folder that is not what it should be."""
    cause = cause or "a copy or download that was cut off, or a damaged disk"
    fix = fix or "copy or download the file again, or take it from a backup"
    text = message(where, what, got=got, needed=needed, cause=cause, fix=fix)
    return FormatError(text.encode("utf-8", "backslashreplace").decode())  # names may hold what can't be printed


def option_error(where: str, what: str, got: str, needed: str, fix: str) -> OptionError:
    """A name or option that does not fit what it is used on."""
    cause = "names or options of another model"
    return OptionError(message(where, what, got=got, needed=needed, cause=cause, fix=fix))


def state_error(where: str, what: str, got: str, needed: str, fix: str) -> StateError:
    """A folder, disk or model that is in no state for this."""
    cause = "a folder or disk that is in use for something else"
    return StateError(message(where, what, got=got, needed=needed, cause=cause, fix=fix))
