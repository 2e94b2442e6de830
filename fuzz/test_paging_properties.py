"""Where keys lie, what lies beside them and who else is in the batch changes nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import harness
import strategies
from mlakit import testing
from strategies import cases


@given(case=cases())
def test_moving_pages_changes_no_bit(case: testing.Case) -> None:
    inputs, moved = testing.make_inputs(case), testing.make_inputs(case)
    new_id = np.random.default_rng(case.seed + 1).permutation(inputs.kv_cache.shape[0]).astype(np.int32)
    for name in ("kv_cache", "kv_rope"):
        if getattr(moved, name) is not None:
            getattr(moved, name)[new_id] = getattr(inputs, name)
    for request, length in enumerate(case.lengths):
        used = -(-length // case.parsed.page_size)
        moved.block_table[request, :used] = new_id[inputs.block_table[request, :used]]
    for backend in harness.backends(case):
        before, after = harness.decode(case, backend, inputs), harness.decode(case, backend, moved)
        harness.assert_same_bits(before, after, f"{backend}, pages moved")


@given(case=cases())
def test_unused_memory_changes_no_bit(case: testing.Case) -> None:
    """Every byte that no row may see: slots past the end, pages of nobody, gaps between rows, table tails."""
    rng = np.random.default_rng(case.seed + 2)
    clean, dirty = testing.make_inputs(case), testing.make_inputs(case)
    for name in ("q", "q_rope", "kv_cache", "kv_rope"):
        array = getattr(dirty, name)
        if array is None:
            continue
        array.base[...] = rng.choice(np.array([0, 1, -3, np.inf, -np.inf, np.nan], np.float32), array.base.shape)
        if name.startswith("q"):
            array[...] = getattr(clean, name)
            continue
        for request in range(len(case.lengths)):
            where = harness.used_slots(case, clean, request)
            array[where] = getattr(clean, name)[where]
    dirty.block_table.base[...] = rng.integers(-(2**31), 2**31, dirty.block_table.base.shape)
    for request, length in enumerate(case.lengths):
        used = -(-length // case.parsed.page_size)
        dirty.block_table[request, :used] = clean.block_table[request, :used]
    for backend in harness.backends(case):
        before, after = harness.decode(case, backend, clean), harness.decode(case, backend, dirty)
        harness.assert_same_bits(before, after, f"{backend}, unused memory changed")


@given(case=cases())
def test_outputs_are_written_and_nothing_beside_them(case: testing.Case) -> None:
    inputs = testing.make_inputs(case)
    for backend in harness.backends(case):
        for name in ("out", "lse"):
            if getattr(inputs, name) is not None:
                getattr(inputs, name).base[...] = np.nan
        harness.decode(case, backend, inputs)
        for name in ("out", "lse"):
            array = getattr(inputs, name)
            if array is None:
                continue
            # A random case has no NaN among its visible inputs, so none is left in its outputs ...
            assert not np.isnan(array).any(), f"{name}: {backend} left a row unwritten"
            # ... and every NaN beside them is still there.
            array[...] = np.nan
            assert np.isnan(array.base).all(), f"{name}: {backend} wrote between rows"


@given(case=cases(never=strategies.CAUSAL), data=st.data())
def test_a_nan_stays_in_its_request(case: testing.Case, data: st.DataObject) -> None:
    request = data.draw(st.integers(0, len(case.lengths) - 1))
    length, rows = case.lengths[request], harness.rows_of(case, request)
    clean, poisoned = testing.make_inputs(case), testing.make_inputs(case)
    if length and data.draw(st.booleans()):
        key = data.draw(st.integers(0, length - 1))
        pages, slots = harness.used_slots(case, poisoned, request)
        poisoned.kv_cache[pages[key], slots[key], :, 0] = np.nan
    else:
        poisoned.q[rows][..., 0] = np.nan
    for backend in harness.backends(case):
        before, after = harness.decode(case, backend, clean), harness.decode(case, backend, poisoned)
        for name in ("out", "lse"):
            one, other = getattr(before, name), getattr(after, name)
            if one is None:
                continue
            mine = np.zeros(one.shape, bool)
            mine[rows] = True
            assert (np.isnan(other[mine]) == (length > 0)).all(), f"{name} of the request with the NaN, {backend}"
            assert (one[~mine] == other[~mine]).all(), f"{name} of another request, {backend}"


@given(case=cases(policies=("chunk64", "chunk128"), has_memory=False), data=st.data())
def test_fixed_chunk_gives_a_request_the_same_bits_alone(case: testing.Case, data: st.DataObject) -> None:
    request = data.draw(st.integers(0, len(case.lengths) - 1))
    rows = harness.rows_of(case, request)
    alone, inputs = single(case, request)
    for backend in harness.backends(case):
        together, result = harness.decode(case, backend), harness.decode(alone, backend, inputs)
        assert together.out[rows].tobytes() == result.out.tobytes(), f"out of request {request}, {backend}"
        if case.has_lse:
            assert together.lse[rows].tobytes() == result.lse.tobytes(), f"lse of request {request}, {backend}"


@given(case=cases(policies=("",), has_memory=False), data=st.data())
def test_balanced_gives_a_request_nearly_the_same_alone(case: testing.Case, data: st.DataObject) -> None:
    request = data.draw(st.integers(0, len(case.lengths) - 1))
    rows = harness.rows_of(case, request)
    alone, inputs = single(case, request)
    want = testing.expect(case, testing.make_inputs(case))
    for backend in harness.backends(case):
        harness.decode(alone, backend, inputs)
        for name in ("out", "lse"):
            got, wanted, limit = getattr(inputs, name), getattr(want, name)[rows], getattr(want, f"{name}_limit")[rows]
            if got is not None:
                testing.check_close(got.reshape(wanted.shape), wanted, limit, f"{name} of request {request} alone, {backend}")


def single(case: testing.Case, request: int) -> tuple[testing.Case, testing.Inputs]:
    """The call of one request of a case, with its own numbers, in a plan of the same problem."""
    whole = testing.make_inputs(case)
    alone = case.replace(lengths=case.lengths[request : request + 1], q_lens=case.q_lens[request : request + 1])
    inputs = testing.make_inputs(alone)
    rows = harness.rows_of(case, request)
    for name in ("q", "q_rope"):
        if getattr(whole, name) is not None:
            getattr(inputs, name)[...] = getattr(whole, name)[rows]
    for name in ("kv_cache", "kv_rope", "sink"):
        setattr(inputs, name, getattr(whole, name))
    inputs.block_table = whole.block_table[request : request + 1]
    return alone, inputs
