"""Whether this machine can run the GPU tests: the one test that is collected where it cannot."""

import pytest

import conftest


def test_this_machine_has_a_hopper_gpu() -> None:
    if conftest.WHY_NOT:
        pytest.skip(conftest.WHY_NOT)
