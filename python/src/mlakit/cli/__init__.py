"""The command `mlakit`. typer and rich are imported only when it runs; they come with the extra `cli`."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"mlakit's command line needs {' and '.join(missing)}: pip install 'mlakit[cli]'")
    from ._app import app

    try:
        app()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        sys.exit(f"mlakit: {error}")
