"""Says why the GPU tests do not run: the one test that is collected on every machine."""

import pytest
from hopper import WHY_NOT


def test_this_machine_has_a_hopper_gpu() -> None:
    if WHY_NOT:
        pytest.skip(WHY_NOT)
