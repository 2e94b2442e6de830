"""Attention over disjoint keys joins into attention over all of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import abi
import harness
import strategies
from mlakit import testing
from mlakit.reference import float64, merge_states_reference
from strategies import cases


@given(
    case=cases(always=strategies.FP32_OUT, never=strategies.CAUSAL | strategies.NO_LSE | strategies.SINK, has_memory=False),
    data=st.data(),
)
def test_two_halves_make_the_whole(case: testing.Case, data: st.DataObject) -> None:
    """The cut is at a page, anywhere in each request; the first half may be empty, and so may the second."""
    page_size = case.parsed.page_size
    cuts = [data.draw(st.integers(0, -(-length // page_size))) for length in case.lengths]
    firsts = [min(cut * page_size, length) for cut, length in zip(cuts, case.lengths, strict=True)]
    want = testing.expect(case, testing.make_inputs(case))
    halves = []
    for is_first in (True, False):
        half = testing.make_inputs(case)
        for request, cut in enumerate(cuts):
            half.cache_seqlens[request] = firsts[request] if is_first else case.lengths[request] - firsts[request]
            if not is_first:
                row = half.block_table[request]
                row[: row.size - cut] = row[cut:].copy()
        halves.append(half)
    for backend in harness.backends(case):
        check_joined(case, want, [harness.decode(case, backend, half) for half in halves], backend)


@given(
    case=cases(always=strategies.FP32_OUT, never=strategies.NO_LSE | strategies.SINK, has_memory=False), world=st.integers(2, 4)
)
def test_shards_make_the_whole(case: testing.Case, world: int) -> None:
    """Context parallel: rank r holds keys r, r + world, ... of each request in a cache of its own; causal is the whole's."""
    whole = testing.make_inputs(case)
    want = testing.expect(case, whole)
    page_size, shards = case.parsed.page_size, []
    for rank in range(world):
        shard = testing.make_inputs(case)
        for request in range(len(case.lengths)):
            pages, slots = (where[rank::world] for where in harness.used_slots(case, whole, request))
            held = np.arange(pages.size)
            to = (shard.block_table[request, held // page_size], held % page_size)
            for name in ("kv_cache", "kv_rope"):
                if getattr(shard, name) is not None:
                    getattr(shard, name)[to] = getattr(whole, name)[pages, slots]
            shard.cache_seqlens[request] = pages.size
        shard.global_seqlens = whole.cache_seqlens if case.parsed.causal else None
        shards.append(shard)
    for backend in harness.backends(case):
        parts = []
        for rank, shard in enumerate(shards):
            harness.last_case = case
            parts.append(abi.run(f"{case.problem}:cp{rank}of{world}", shard, backend))
        check_joined(case, want, parts, backend)


def check_joined(case: testing.Case, want: testing.Expected, parts: list[abi.Result], backend: str) -> None:
    """mla_merge of the parts is the whole."""
    rows, dim = want.lse.shape, case.parsed.value_dim
    tokens, heads = int(np.prod(rows[:-1])), rows[-1]
    outs = np.stack([part.out.reshape(tokens, heads, dim) for part in parts])
    lses = np.stack([part.lse.reshape(tokens, heads) for part in parts])
    out, lse = np.full((tokens, heads, dim), np.nan, np.float32), np.full((tokens, heads), np.nan, np.float32)
    abi.merge(outs, lses, out, lse, backend, is_base2=case.parsed.lse_base == "2")
    # Every part and the join round once more in fp32.
    slack = 8 * testing.ROUNDOFF["fp32"]
    for name, got in (("out", out), ("lse", lse)):
        wanted = getattr(want, name)
        limit = getattr(want, f"{name}_limit") + slack * (1 + np.abs(np.nan_to_num(wanted, neginf=0)))
        testing.check_close(got.reshape(wanted.shape), wanted, 2 * limit, f"{name} of the joined parts, {backend}")


@st.composite
def partials(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Random parts: out of any type with gaps between its rows, lse between hardly and very much apart, or -inf."""
    shape = tuple(draw(st.integers(low, high)) for low, high in ((1, 5), (1, 4), (1, 5), (1, 40)))
    dtype = testing.numpy_dtype(draw(st.sampled_from(("fp32", "bf16", "fp16"))))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    gap = draw(st.integers(0, 3))
    outs = np.full((*shape[:3], shape[3] + gap), np.nan, dtype)[..., : shape[3]]
    outs[...] = rng.standard_normal(shape, np.float32)
    lses = (draw(st.sampled_from((1.0, 30.0, 0.0))) * rng.standard_normal(shape[:3])).astype(np.float32)
    empty = rng.random(shape[:3]) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    lses[empty], outs[empty] = -np.inf, 0
    return outs, lses


@given(parts=partials(), is_base2=st.booleans(), out_dtype=st.sampled_from(("fp32", "bf16", "fp16")), has_lse=st.booleans())
def test_merge_agrees_with_the_reference(
    parts: tuple[np.ndarray, np.ndarray], is_base2: bool, out_dtype: str, has_lse: bool
) -> None:
    outs, lses = parts
    want_out, want_lse = merge_states_reference(outs, lses, lse_base="2" if is_base2 else "e")
    # exp of a difference of lse: its error grows with the size of the difference.
    spread = 1 + np.abs(np.where(np.isfinite(lses), lses, 0)).max(0)
    relative = 8 * testing.ROUNDOFF["fp32"] * spread
    limit = relative[..., None] * np.abs(float64(outs)).max(0) + testing.ROUNDOFF[out_dtype] * 1.02 * np.abs(want_out)
    for backend in harness.chosen():
        out = np.full(outs.shape[1:], np.nan, testing.numpy_dtype(out_dtype))
        lse = np.full(outs.shape[1:-1], np.nan, np.float32) if has_lse else None
        abi.merge(outs, lses, out, lse, backend, is_base2=is_base2)
        testing.check_close(out, want_out, limit + testing.SMALLEST[out_dtype], f"merged out, {backend}")
        if lse is not None:
            testing.check_close(lse, want_lse, relative * 2, f"merged lse, {backend}")


@given(parts=partials())
def test_a_single_part_is_the_result(parts: tuple[np.ndarray, np.ndarray]) -> None:
    outs, lses = parts[0][:1], parts[1][:1]
    for backend in harness.chosen():
        out, lse = np.full_like(outs[0], np.nan), np.full_like(lses[0], np.nan)
        abi.merge(outs, lses, out, lse, backend)
        assert out.tobytes() == np.ascontiguousarray(outs[0]).tobytes(), backend
        # The base changes to 2 and back.
        limit = 4 * testing.ROUNDOFF["fp32"] * np.abs(np.nan_to_num(lses[0], neginf=0))
        testing.check_close(lse, lses[0], limit, f"lse of a single part, {backend}")
