"""Imports that an install may lack, with the one command that helps."""

from __future__ import annotations

import importlib.util

from clora_core.errors import MissingDependencyError, message


def need(*packages: str, where: str, extra: str) -> None:
    """Raise unless these packages are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            message(
                where,
                f"{' and '.join(missing)} not installed",
                got="an import",
                needed=", ".join(packages),
                cause="an install without the extra",
                fix=f"python -m pip install 'clora[{extra}]'",
            )
        )
