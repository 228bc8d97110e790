"""Every error clora raises, and the one sentence structure they share. No other module composes such a message."""

from __future__ import annotations


class CloraError(Exception):
    """Base of all errors that clora raises on purpose."""


class ShapeError(CloraError, ValueError):
    """Arrays whose shapes do not fit together."""


class RankError(ShapeError):
    """A rank of zero, or above what the layer or the operation allows."""


class DTypeError(CloraError, TypeError):
    """A dtype the mathematics does not take, or several dtypes in one call."""


class NamespaceError(CloraError, TypeError):
    """Something that is not an array, or arrays of several libraries in one call."""


class DeviceError(CloraError, ValueError):
    """Arrays on several devices in one call, or on a device where they can't be used without a copy."""


class OptionError(CloraError, ValueError):
    """An option with a value that does not exist: a scheme, form, method, suite, gradient name."""


class InvalidValueError(CloraError, ValueError):
    """Values that break an invariant (NaN, infinity, an indefinite second moment); only eager checks raise it."""


class FormatError(CloraError, ValueError):
    """A folder or file that is not what its format says: truncated, altered, contradictory, of an unknown version."""


class StateError(CloraError, RuntimeError):
    """A verb called when it makes no sense: two tasks open at once, restoring an unknown task, factors that moved."""


class MomentsIncomplete(StateError):
    """A drift or protection asked of second moments that do not cover every routed direction."""


class MissingDependencyError(CloraError, ImportError):
    """An optional package that is not installed."""


def message(where: str, what: str, *, got: object, needed: object, cause: str, fix: str) -> str:
    """One message: what and where, what was got, what is needed, the usual cause, the fix. Never values of arrays."""
    return f"{where}: {what}. Got {got}; needed {needed}. Usual cause: {cause}. Fix: {fix}."
