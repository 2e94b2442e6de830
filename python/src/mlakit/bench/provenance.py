"""Where a benchmark's result comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(script: str) -> str | None:
    """The commit that a script's checkout is at; None outside a checkout."""
    git = subprocess.run(
        ["git", "-C", str(Path(script).parent), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or None
