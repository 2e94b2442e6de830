"""The schedule: every block of every request once, fair parts, slots that fit, whatever the lengths."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import abi
import harness
from mlakit import testing
from schedule_bytes import MAGIC, Schedule
from strategies import cases

backends = st.deferred(lambda: st.sampled_from(harness.chosen()))


@st.composite
def calls(draw: st.DrawFn) -> testing.Case:
    """Longer requests and larger batches than decode can afford: nothing is computed here."""
    lens = draw(st.lists(st.one_of(st.integers(0, 70), st.integers(0, 5000)), max_size=12)) or [draw(st.integers(0, 200_000))]
    is_ragged = draw(st.booleans())
    q_lens = draw(st.lists(st.integers(0, 9), min_size=len(lens), max_size=len(lens))) if is_ragged else []
    kv_heads = draw(st.integers(1, 3))
    parts = [
        "dense:bf16",
        f"b{len(lens) + draw(st.integers(0, 3))}",
        f"q{max(1, *q_lens, 0) if is_ragged else draw(st.integers(1, 9))}",
        f"h{kv_heads * draw(st.integers(1, 40))}:k{kv_heads}:d8:v8:p{draw(st.integers(1, 70))}",
        f"l{max(1, *lens, 0) + draw(st.integers(0, 300))}",
        *(["ragged"] if is_ragged else []),
        *draw(st.sampled_from(([], ["chunk64"], ["chunk192"], [f"m{max(1, sum(lens))}"], [f"m{max(1, sum(lens))}", "chunk64"]))),
    ]
    return testing.Case(":".join(parts), tuple(lens), tuple(q_lens))


def schedule_of(case: testing.Case, plan: abi.Plan, step: int = 1) -> Schedule:
    """Only the tensors that a schedule reads."""
    harness.last_case = case
    lengths = np.full(step * len(case.lengths), -1, np.int32)[::step]
    lengths[...] = case.lengths
    cu = np.cumsum([0, *case.q_lens]).astype(np.int32) if case.parsed.ragged_q else None
    args = abi.ScheduleArgs(
        struct_size=abi.ctypes.sizeof(abi.ScheduleArgs),
        cache_seqlens=abi.tensor(lengths),
        cu_seqlens_q=abi.tensor(cu),
        schedule=plan.schedule_buffer.ctypes.data,
        schedule_bytes=plan.schedule_buffer.nbytes,
    )
    abi.check(abi.library().mla_schedule(plan.handle, abi.byref(args), None))
    return Schedule(plan)


@given(case=calls(), backend=backends, step=st.integers(1, 3))
def test_header_and_snapshot(case: testing.Case, backend: str, step: int) -> None:
    with abi.Plan(case.problem, backend) as plan:
        s = schedule_of(case, plan, step)
        assert s.magic & 0xFFFFFFFF == MAGIC
        assert (s.batch, s.parts) == (len(case.lengths), plan.info.parts)
        assert s.nbytes == plan.info.schedule_bytes
        assert tuple(s.len) == case.lengths
        q_lens = case.q_lens if case.parsed.ragged_q else [case.parsed.q_len] * len(case.lengths)
        assert s.q_begin.tolist() == np.cumsum([0, *q_lens]).tolist()
        assert s.q_tokens == sum(q_lens)
        overhead = s.overhead()
        assert overhead >= 1 or s.total_cost == 0
        costs = [s.items(r) * (s.blocks(r) + overhead) for r in range(s.batch)]
        assert s.cost_prefix.tolist() == np.cumsum([0, *costs]).tolist()
        assert s.total_cost == sum(costs)


@given(case=calls(), backend=backends)
def test_each_block_is_covered_once(case: testing.Case, backend: str) -> None:
    with abi.Plan(case.problem, backend) as plan:
        s = schedule_of(case, plan)
        boundaries = [tuple(row) for row in s.boundary.tolist()]
        assert boundaries == sorted(boundaries)
        assert boundaries[-1] == (s.batch, 0, 0)
        seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for piece in s.pieces():
            seen.setdefault((piece.request, piece.item), []).append((piece.begin, piece.end))
        for request in range(s.batch):
            for item in range(s.items(request)):
                ranges = seen.pop((request, item), [])
                assert ranges, f"nobody visits item {item} of request {request}"
                ends = [0, *(end for _, end in ranges)]
                assert [begin for begin, _ in ranges] == ends[:-1], ranges
                assert ends[-1] == s.blocks(request), ranges
        assert not seen


@given(case=calls(), backend=backends)
def test_parts_are_fair(case: testing.Case, backend: str) -> None:
    with abi.Plan(case.problem, backend) as plan:
        s = schedule_of(case, plan)
        overhead, cost = s.overhead(), [0] * s.parts
        for piece in s.pieces():
            cost[piece.part] += piece.end - piece.begin + (overhead if piece.begin == 0 else 0)
        # A boundary inside an item's overhead moves to its first block; one inside a chunk moves to the next chunk.
        assert max(cost) <= -(-s.total_cost // s.parts) + overhead + s.chunk_blocks


@given(case=calls(), backend=backends)
def test_slots_are_unique_and_fit(case: testing.Case, backend: str) -> None:
    with abi.Plan(case.problem, backend) as plan:
        s = schedule_of(case, plan)
        used = [piece.slot for piece in s.pieces() if piece.slot >= 0]
        assert len(used) == len(set(used))
        assert max(used, default=-1) < plan.info.slots
        for piece in s.pieces():
            n = s.blocks(piece.request)
            assert (piece.slot >= 0) == ((piece.begin, piece.end) != (0, n)), piece


@given(case=calls(), backend=backends)
def test_fixed_chunk_cuts_by_the_own_length_alone(case: testing.Case, backend: str) -> None:
    with abi.Plan(case.problem, backend) as plan:
        s = schedule_of(case, plan)
        if s.chunk_blocks:
            for piece in s.pieces():
                assert piece.begin % s.chunk_blocks == 0
                assert piece.end == min(piece.begin + s.chunk_blocks, s.blocks(piece.request))


@given(case=cases())
def test_a_schedule_may_be_copied(case: testing.Case) -> None:
    """Made at one address and used at another, after the first was overwritten: the same bits."""
    inputs = testing.make_inputs(case)
    for backend in harness.backends(case):
        want = harness.decode(case, backend, inputs)
        with abi.Plan(case.problem, backend) as plan:
            plan.schedule(inputs)
            made = plan.schedule_buffer
            plan.schedule_buffer = abi.aligned_buffer(made.nbytes, plan.info.schedule_alignment)
            plan.schedule_buffer[...] = made
            made[...] = 0xFF
            plan.decode(inputs)
        harness.assert_same_bits(want, abi.Result.of(inputs), f"{backend}, copied schedule")


@pytest.mark.parametrize("policy", ["", ":chunk2048"])
def test_a_hundred_thousand_requests_in_five_milliseconds(policy: str) -> None:
    batch = 100_000
    inputs = testing.Inputs(*[None] * 10, keywords={})
    inputs.cache_seqlens = np.random.default_rng(0).integers(0, 2000, batch).astype(np.int32)
    with abi.Plan(f"dense:bf16:b{batch}:q1:h16:d8:v8:l2000{policy}", harness.chosen()[0]) as plan:
        took = []
        for _ in range(9):
            begin = time.perf_counter()
            plan.schedule(inputs)
            took.append(time.perf_counter() - begin)
    assert min(took) < 5e-3, took
