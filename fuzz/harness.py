"""Runs cases through the C ABI for the properties, and remembers the last one for the failure report."""

from __future__ import annotations

import functools

import numpy as np

import abi
from mlakit import testing
from mlakit.testing import Case, Inputs

last_case: Case | None = None
only: str | None = None  # pytest --backend


@functools.cache
def dtypes(backend: str) -> tuple[str, ...]:
    """The element types that a backend takes, simplest first. The shapes of a problem are never a reason to refuse it."""
    taken = []
    for dtype in ("fp32", "bf16", "fp16"):
        try:
            abi.Plan(f"dense:{dtype}:b1:q1:h1:l1", backend).close()
            taken.append(dtype)
        except abi.Refused as refusal:
            if refusal.status != abi.UNSUPPORTED:
                raise
    assert taken, f"{backend} takes no element type"
    return tuple(taken)


def backends(case: Case) -> tuple[str, ...]:
    """The backends that take a case. A property tries each example on all of them: the example costs more than the call."""
    return tuple(name for name in chosen() if case.parsed.q_dtype in dtypes(name))


def chosen() -> tuple[str, ...]:
    return tuple(name for name in abi.cpu_backends() if only in (None, name))


def is_exact(backend: str) -> bool:
    return backend == "reference"


def decode(case: Case, backend: str, inputs: Inputs | None = None, threads: int = 1) -> abi.Result:
    """Plan, schedule, decode. inputs: the case's, changed by the property."""
    global last_case
    last_case = case
    return abi.run(case.problem, inputs or testing.make_inputs(case), backend, threads)


def decode_and_check(case: Case, backend: str, threads: int = 1) -> abi.Result:
    """decode, compared with the float64 reference."""
    inputs = testing.make_inputs(case)
    result = decode(case, backend, inputs, threads)
    testing.check_decode(case, inputs, exact=is_exact(backend), what=backend)
    return result


def assert_same_bits(a: abi.Result, b: abi.Result, what: str) -> None:
    for name in ("out", "lse"):
        one, other = getattr(a, name), getattr(b, name)
        if one is None or one.tobytes() == other.tobytes():
            continue
        unsigned = {2: np.uint16, 4: np.uint32}[one.itemsize]
        at = tuple(int(i) for i in np.argwhere(one.view(unsigned) != other.view(unsigned))[0])
        raise AssertionError(f"{what}: {name}{list(at)} is {one[at]} and {other[at]}")


def rows_of(case: Case, request: int) -> tuple[slice | int, ...]:
    """The rows of a request in q, out and lse."""
    if not case.parsed.ragged_q:
        return (request,)
    begin = sum(case.q_lens[:request])
    return (slice(begin, begin + case.q_lens[request]),)


def used_slots(case: Case, inputs: Inputs, request: int) -> tuple[np.ndarray, np.ndarray]:
    """(page, slot) of each cached token of a request."""
    position = np.arange(case.lengths[request])
    page_size = case.parsed.page_size
    return inputs.block_table[request, position // page_size], position % page_size
