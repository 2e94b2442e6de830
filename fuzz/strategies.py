"""What a valid call is: hypothesis strategies of mlakit.testing.Case. Small values come first, so that failures shrink."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from mlakit.testing import Case, Memory

# (head_dim, value_dim), the small ones more often because a call costs their size
DIMS = ((4, 2), (1, 1), (5, 3), (16, 16), (8, 8), (36, 32), (33, 17), (80, 64), (320, 256), (512, 512), (576, 512))
PAGE_SIZES = (4, 1, 3, 2, 16, 64, 7, 100, 256)
DTYPES = ("fp32", "bf16", "fp16")


def lengths(max_batch: int = 4, most: int = 600) -> st.SearchStrategy[tuple[int, ...]]:
    """Cached tokens of each request: often short, sometimes over several blocks of keys, sometimes at the edge of one."""
    edges = [n for n in (63, 64, 65, 127, 128, 129, 192) if n <= most]
    one = st.one_of(st.integers(0, min(20, most)), st.integers(0, most), st.sampled_from(edges))
    return st.lists(one, min_size=1, max_size=max_batch).map(tuple)


def memories(seed: int, is_ragged: bool, is_split: bool) -> dict[str, Memory]:
    """Random layouts for some of the tensors: axes in any order, gaps, and strides other than 1 where they are allowed.

    From a seed and not drawn one by one: a choice costs hypothesis as much time as the call does.
    """
    rng = random.Random(seed)
    rows = 2 if is_ragged else 3
    ndims = {"q": rows + 1, "kv_cache": 4, "block_table": 2, "out": rows + 1, "cache_seqlens": 1, "lse": rows}
    if is_split:
        ndims |= {"q_rope": rows + 1, "kv_rope": 4}
    layouts = {}
    for name, ndim in ndims.items():
        if rng.random() < 0.5:
            continue
        is_free = name in ("cache_seqlens", "lse")
        order = rng.sample(range(ndim), ndim) if is_free else [*rng.sample(range(ndim - 1), ndim - 1), ndim - 1]
        gaps = [rng.choice((0, 0, 1, 5)) for _ in range(ndim)]
        layouts[name] = Memory(tuple(order), tuple(gaps), rng.choice((1, 2, 3)) if is_free else 1)
    return layouts


# Yes or no, one bit each, so that they cost one choice; all zeros is the plainest call.
CAUSAL, RAGGED, SPLIT, SINK, LSE_BASE_2, SCALE, EXACT_TOKENS, NO_LSE, FP32_OUT = (1 << bit for bit in range(9))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = DTYPES,
    max_batch: int = 4,
    most: int = 600,
    policies: tuple[str, ...] = ("", "chunk64", "chunk128"),
    always: int = 0,
    never: int = 0,
    has_memory: bool = True,
) -> Case:
    """A valid call. always, never: bits that are set or not in every one."""
    bits = (draw(st.integers(0, 511)) | always) & ~never
    head_dim, value_dim = draw(st.sampled_from(DIMS))
    lens = draw(lengths(max_batch, most if head_dim <= 80 else min(most, 140)))
    is_ragged, is_split = bool(bits & RAGGED), bool(bits & SPLIT) and head_dim > value_dim
    kv_heads = draw(st.integers(1, 3))
    q_len = draw(st.integers(1, 4))
    q_lens = draw(st.lists(st.integers(0, q_len), min_size=len(lens), max_size=len(lens))) if is_ragged else []
    policy = draw(st.sampled_from(policies))
    # Room for more than comes makes more parts, so that short requests are cut as well.
    slack = (0, 1, 65) if policy or head_dim > 80 else (0, 1, 65, 2000, 9000)
    spare = draw(st.integers(0, 3))  # of everything that may be larger than needed
    options = [
        f"b{len(lens) + spare // 2}",
        f"q{q_len}",
        f"h{kv_heads * draw(st.sampled_from((1, 2, 3, 5, 17) if head_dim <= 80 else (1, 2, 3)))}",
        f"k{kv_heads}",
        f"d{head_dim}",
        f"v{value_dim}",
        f"p{draw(st.sampled_from(PAGE_SIZES))}",
        f"l{max(1, *lens, 0) + draw(st.sampled_from(slack))}",
        f"m{max(1, sum(lens))}" if bits & EXACT_TOKENS else "",
        "outfp32" if bits & FP32_OUT else "",
        "causal" if bits & CAUSAL else "",
        "ragged" if is_ragged else "",
        "lse2" if bits & LSE_BASE_2 else "",
        policy,
        "scale0.25" if bits & SCALE else "",
    ]
    layout, seed = draw(st.integers(0, 2**16)), draw(st.integers(0, 2**16))
    return Case(
        problem=":".join(["dense", draw(st.sampled_from(dtypes)), *filter(None, options)]),
        lengths=lens,
        q_lens=tuple(q_lens),
        seed=seed,
        spread=(1.0, 0.1, 8.0)[seed % 3],
        spare_pages=spare,
        table_tail=spare,
        memory=memories(layout, is_ragged, is_split) if layout and has_memory else {},
        is_split=is_split,
        has_sink=bool(bits & SINK),
        has_lse=not bits & NO_LSE,
    )


def any_int(bits: int, *, signed: bool = True) -> st.SearchStrategy[int]:
    """Integers of a C type, with a liking for the values that break programs."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    special = [n for n in (0, 1, -1, 2, 3, 5, 63, 64, 65, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, low, high) if low <= n <= high]
    return st.one_of(st.sampled_from(special), st.integers(low, high))


def different(old: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return strategy.filter(lambda new: new != old)
