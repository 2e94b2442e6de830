"""Which stream a producer without DLPack's C exchange API is asked to export for: the one that the work runs on.

A producer that is asked for another stream than its current one records an event and makes that stream wait, which costs time,
and makes the capture of a CUDA graph fail. The producers here say that they are CUDA tensors and hand out host memory, so that
the whole call can run on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mlakit
from mlakit import testing


class Producer:
    """An array that claims to be on a GPU and remembers for which streams it was exported."""

    def __init__(self, array: Any, asked: list[Any]) -> None:
        self.array, self.asked = array, asked
        self.shape = array.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None) -> Any:
        self.asked.append(stream)
        return self.array.__dlpack__(max_version=max_version)


@pytest.mark.parametrize(("given", "expected"), [(0x7F0, 0x7F0), (0, 1)])
def test_every_tensor_is_exported_for_the_given_stream(given: int, expected: int) -> None:
    """0 is the default stream, whose number in DLPack is 1."""
    case = testing.Case("dense:fp32:b2:q1:h4:k1:d576:v512:p64:l130", (130, 7))
    inputs = testing.make_inputs(case)
    asked: list[Any] = []
    plan = mlakit.Plan(case.problem)
    buffers = [np.zeros(n + 256, np.uint8) for n in (plan.info.schedule_bytes, plan.info.scratch_bytes)]
    schedule_memory, scratch = (b[-b.ctypes.data % 256 :][: b.size - 256] for b in buffers)
    wrapped = {
        name: Producer(getattr(inputs, name), asked) for name in ("q", "kv_cache", "block_table", "cache_seqlens", "out", "lse")
    }
    schedule = plan.schedule(wrapped["cache_seqlens"], buffer=Producer(schedule_memory, asked), stream=given)
    plan.decode(
        *(wrapped[name] for name in ("q", "kv_cache", "block_table")),
        schedule,
        out=wrapped["out"],
        lse=wrapped["lse"],
        scratch=Producer(scratch, asked),
        stream=given,
    )
    assert len(asked) >= 10
    assert set(asked) == {expected}
    testing.check_decode(case, inputs)


def test_one_call_looks_at_its_tensors_on_the_given_stream_too() -> None:
    """It finds its plan by the tensors' shapes, for which they are exported as well."""
    case = testing.Case("dense:fp32:b2:q1:h4:k1:d576:v512:p64:l130", (130, 7))
    inputs = testing.make_inputs(case)
    asked: list[Any] = []
    arrays = (Producer(array, asked) for array in inputs.positional)
    out, lse = (Producer(array, asked) for array in (inputs.out, inputs.lse))
    mlakit.mla_decode(*arrays, out=out, lse=lse, stream=0x7F0)
    assert set(asked) == {0x7F0}
    testing.check_decode(case, inputs)
