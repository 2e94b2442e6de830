"""What the other library takes and mlakit does not: refused by name, never ignored."""

from __future__ import annotations

from typing import Any


def refuse_given(function: str, reason: str, **arguments: Any) -> None:
    """NotImplementedError for the first argument that is neither None nor False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            shown = f"a tensor of shape {list(value.shape)}" if hasattr(value, "shape") else repr(value)
            raise NotImplementedError(f"{name}: {function} of mlakit takes no {name} ({reason}), got {shown}: leave it out")
