"""The `clora` command: its libraries come with an extra and are imported only when it runs."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command, or say in one line what to install."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"clora: {error.name} is not installed; run: python -m pip install 'clora[cli]'", file=sys.stderr)
        return 1
    app()
    return 0


if __name__ == "__main__":
    sys.exit(main())
