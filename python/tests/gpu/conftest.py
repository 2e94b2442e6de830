"""Every test here needs a Hopper GPU; a hang ends the process instead of the machine."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from hopper import WHY_NOT  # noqa: E402

SECONDS_OF_A_TEST = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # The modules import torch and load the library: without a GPU only the one that says so is collected.
    is_test = collection_path.name.startswith("test_") and HERE in collection_path.parents
    return True if is_test and WHY_NOT and collection_path.name != "test_device.py" else None


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    faulthandler.dump_traceback_later(SECONDS_OF_A_TEST, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
