"""Where keys lie, what lies beside them and who else is in the batch changes nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from mlakit import testing

import harness
from strategies import cases


def any_case(data: st.DataObject, backend: str, **options: object) -> testing.Case:
    return data.draw(cases(dtypes=harness.dtypes(backend), **options))


@given(data=st.data())
def test_moving_pages_changes_no_bit(backend: str, data: st.DataObject) -> None:
    case = any_case(data, backend)
    inputs = testing.make_inputs(case)
    before = harness.decode(case, backend, inputs)

    pages = inputs.kv_cache.shape[0]
    new_id = np.random.default_rng(case.seed + 1).permutation(pages).astype(np.int32)
    moved = testing.make_inputs(case)
    for name in ("kv_cache", "kv_rope"):
        if getattr(moved, name) is not None:
            getattr(moved, name)[new_id] = getattr(inputs, name)
    for request, length in enumerate(case.lengths):
        used = -(-length // case.parsed.page_size)
        moved.block_table[request, :used] = new_id[inputs.block_table[request, :used]]
    harness.assert_same_bits(before, harness.decode(case, backend, moved), "pages moved")


@given(data=st.data())
def test_unused_memory_changes_no_bit(backend: str, data: st.DataObject) -> None:
    """Every byte that no row may see: slots past the end, pages of nobody, gaps between rows, table tails."""
    case = any_case(data, backend)
    before = harness.decode(case, backend)

    rng = np.random.default_rng(case.seed + 2)
    inputs, seen = testing.make_inputs(case), testing.make_inputs(case)
    for name in ("q", "q_rope", "kv_cache", "kv_rope"):
        array = getattr(inputs, name)
        if array is not None:
            memory = array.base
            memory[...] = rng.choice(np.array([0, 1, -3, np.inf, -np.inf, np.nan], np.float32), memory.shape)
            if name.startswith("q"):
                array[...] = getattr(seen, name)
            else:
                for request in range(len(case.lengths)):
                    where = harness.used_slots(case, seen, request)
                    array[where] = getattr(seen, name)[where]
    inputs.block_table.base[...] = rng.integers(-(2**31), 2**31, inputs.block_table.base.shape)
    for request, length in enumerate(case.lengths):
        used = -(-length // case.parsed.page_size)
        inputs.block_table[request, :used] = seen.block_table[request, :used]
    harness.assert_same_bits(before, harness.decode(case, backend, inputs), "unused memory changed")


@given(data=st.data())
def test_outputs_are_written_and_nothing_beside_them(backend: str, data: st.DataObject) -> None:
    case = any_case(data, backend)
    inputs = testing.make_inputs(case)
    harness.decode(case, backend, inputs)
    for name in ("out", "lse"):
        array = getattr(inputs, name)
        if array is None:
            continue
        # A random case has no NaN among its visible inputs, so none is left in its outputs ...
        assert not np.isnan(array).any(), f"{name}: a row was not written: {case}"
        # ... and every NaN beside them is still there.
        array[...] = np.nan
        assert np.isnan(array.base).all(), f"{name}: memory between rows was written: {case}"


@given(data=st.data())
def test_a_nan_stays_in_its_request(backend: str, data: st.DataObject) -> None:
    case = any_case(data, backend, causal=False)
    request = data.draw(st.integers(0, len(case.lengths) - 1))
    clean, poisoned = testing.make_inputs(case), testing.make_inputs(case)
    before = harness.decode(case, backend, clean)
    length = case.lengths[request]
    victim = data.draw(st.sampled_from(("kv_cache", "q") if length else ("q",)))
    if victim == "q":
        poisoned.q[harness.rows_of(case, request)][..., 0] = np.nan
    else:
        page, slot = (part[data.draw(st.integers(0, length - 1))] for part in harness.used_slots(case, poisoned, request))
        poisoned.kv_cache[page, slot, :, 0] = np.nan
    after = harness.decode(case, backend, poisoned)

    rows = harness.rows_of(case, request)
    sees_it = length > 0
    for name in ("out", "lse"):
        one, other = getattr(before, name), getattr(after, name)
        if one is None:
            continue
        assert np.isnan(other[rows]).all() == sees_it or other[rows].size == 0, f"{name} of the request with the NaN: {case}"
        mine = np.zeros(one.shape, bool)
        mine[rows] = True
        assert (one[~mine] == other[~mine]).all(), f"{name} of another request changed: {case}"


@given(data=st.data())
def test_fixed_chunk_gives_a_request_the_same_bits_alone(backend: str, data: st.DataObject) -> None:
    case = any_case(data, backend, policies=("chunk64", "chunk128"), has_memory=False)
    together = harness.decode(case, backend)
    request = data.draw(st.integers(0, len(case.lengths) - 1))
    alone, inputs = single(case, request)
    result = harness.decode(alone, backend, inputs)
    rows = harness.rows_of(case, request)
    assert together.out[rows].tobytes() == result.out.tobytes(), f"out of request {request}: {case}"
    if case.has_lse:
        assert together.lse[rows].tobytes() == result.lse.tobytes(), f"lse of request {request}: {case}"


@given(data=st.data())
def test_balanced_gives_a_request_nearly_the_same_alone(backend: str, data: st.DataObject) -> None:
    case = any_case(data, backend, policies=("",), has_memory=False)
    request = data.draw(st.integers(0, len(case.lengths) - 1))
    alone, inputs = single(case, request)
    harness.decode(alone, backend, inputs)
    want = testing.expect(case, testing.make_inputs(case), exact=harness.is_exact(backend))
    rows = harness.rows_of(case, request)
    for name in ("out", "lse"):
        got, wanted, limit = getattr(inputs, name), getattr(want, name)[rows], getattr(want, f"{name}_limit")[rows]
        if got is not None:
            testing.check_close(got.reshape(wanted.shape), wanted, limit, f"{name} of request {request} alone: {case}")


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
