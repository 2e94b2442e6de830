"""Shared by the tests: each starts without plans of an earlier one."""

from __future__ import annotations

import pytest

import mlakit


@pytest.fixture(autouse=True)
def _fresh_plan_cache() -> None:
    mlakit.clear_plan_cache()
