"""jax arrays in, jax arrays out, without a copy. Runs where jax is installed."""

from __future__ import annotations

import numpy as np
import pytest

import mlakit
from mlakit import testing

jax = pytest.importorskip("jax")


@pytest.mark.parametrize("name", ["mixed", "fp16", "fp32"])
def test_jax_in_gives_jax_out(name: str) -> None:
    case = testing.NAMED_CASES[name]
    inputs = testing.make_inputs(case)
    arguments = [jax.numpy.asarray(np.ascontiguousarray(array)) for array in inputs.positional]
    out, lse = mlakit.mla_decode(*arguments, **inputs.keywords)
    assert isinstance(out, jax.Array)
    assert out.dtype == arguments[0].dtype
    inputs.out, inputs.lse = np.asarray(out), np.asarray(lse)
    testing.check_decode(case, inputs)
