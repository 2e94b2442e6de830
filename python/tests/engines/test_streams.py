"""Which stream a producer without DLPack's C exchange API is asked to export for: the one that the work runs on.

A producer that is asked for another stream than its current one records an event and makes that stream wait, which costs time,
and makes the capture of a CUDA graph fail. The producers here say that they are CUDA tensors and hand out host memory, so that
the whole call can run on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

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


class NoWorkspace:
    """A framework that must not be asked."""


class OwnWorkspace:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    def workspace(self, like: Any, nbytes: int, stream: int | None) -> torch.Tensor:
        self.asked.append((nbytes, stream))
        memory = torch.empty(nbytes + 256, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 256 :][:nbytes]


@pytest.mark.parametrize(("kind", "stream"), [("torch", None), ("torch", 0), ("numpy", None)])
def test_where_a_workspace_comes_from(kind: str, stream: int | None) -> None:
    """From torch's allocator, without a tensor in Python, for its own current stream; from the framework's Python side otherwise.

    Plans for the CPU keep their own scratch, and this is how those for a GPU ask for theirs.
    """
    case = testing.mla_case([3000, 7], q_heads=4)
    inputs = testing.make_inputs(case, kind)
    plan = mlakit.Plan(case.problem, mlakit.Context(num_threads=2))
    assert plan.info.scratch_bytes > 0
    schedule = plan.schedule(inputs.cache_seqlens)
    framework: Any = NoWorkspace() if kind == "torch" and stream is None else OwnWorkspace()
    plan._native.decode(
        *(inputs.q, None, inputs.kv_cache, None, inputs.block_table, inputs.cache_seqlens, None, None, inputs.out, inputs.lse),
        *(schedule.buffer, None, framework, stream),
    )
    testing.check_decode(case, inputs)
    assert getattr(framework, "asked", []) == ([] if kind == "torch" and stream is None else [(plan.info.scratch_bytes, stream)])
