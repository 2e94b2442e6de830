"""What a valid call is: hypothesis strategies of mlakit.testing.Case. Small values come first, so that failures shrink."""

from __future__ import annotations

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


@st.composite
def layouts(draw: st.DrawFn, ndim: int, *, has_free_last: bool) -> Memory:
    """Any layout; has_free_last: the last axis may have a stride other than 1."""
    if has_free_last:
        order, step = tuple(draw(st.permutations(range(ndim)))), draw(st.integers(1, 3))
    else:
        order, step = (*draw(st.permutations(range(ndim - 1))), ndim - 1), 1
    return Memory(order, tuple(draw(st.lists(st.integers(0, 5), min_size=ndim, max_size=ndim))), step)


@st.composite
def memories(draw: st.DrawFn, is_ragged: bool, is_split: bool) -> dict[str, Memory]:
    rows = 2 if is_ragged else 3
    axes: dict[str, tuple[int, bool]] = {
        **{"q": (rows + 1, False), "kv_cache": (4, False), "block_table": (2, False), "cache_seqlens": (1, True)},
        **{"out": (rows + 1, False), "lse": (rows, True)},
    }
    if is_split:
        axes |= {"q_rope": (rows + 1, False), "kv_rope": (4, False)}
    return {
        name: draw(layouts(ndim, has_free_last=has_free_last))
        for name, (ndim, has_free_last) in axes.items()
        if draw(st.booleans())
    }


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = DTYPES,
    max_batch: int = 4,
    most: int = 600,
    policies: tuple[str, ...] = ("", "chunk64", "chunk128"),
    causal: bool | None = None,
    ragged: bool | None = None,
    has_lse: bool | None = None,
    out_dtypes: tuple[str, ...] = ("", "outfp32"),
    has_memory: bool = True,
) -> Case:
    """A valid call. A keyword of None leaves the choice open."""
    head_dim, value_dim = draw(st.sampled_from(DIMS))
    lens = draw(lengths(max_batch, most if head_dim <= 80 else min(most, 140)))
    is_ragged = draw(st.booleans()) if ragged is None else ragged
    is_causal = draw(st.booleans()) if causal is None else causal
    is_split = head_dim > value_dim and draw(st.booleans())
    kv_heads = draw(st.integers(1, 3))
    q_heads = kv_heads * draw(st.sampled_from((1, 2, 3, 5, 17)))
    q_lens = draw(st.lists(st.integers(0, 4), min_size=len(lens), max_size=len(lens))) if is_ragged else []
    policy = draw(st.sampled_from(policies))
    # Room for more than comes makes more parts, so that short requests are cut as well.
    slack = st.integers(0, 70) if policy or head_dim > 80 else st.one_of(st.integers(0, 70), st.sampled_from((2000, 9000)))
    q_len = max(1, *q_lens, 0) + draw(st.integers(0, 1)) if is_ragged else draw(st.integers(1, 4))
    options = [
        f"b{len(lens) + draw(st.integers(0, 2))}",
        f"q{q_len}",
        f"h{q_heads}",
        f"k{kv_heads}",
        f"d{head_dim}",
        f"v{value_dim}",
        f"p{draw(st.sampled_from(PAGE_SIZES))}",
        f"l{max(1, *lens, 0) + draw(slack)}",
        draw(st.sampled_from(("", f"m{max(1, sum(lens))}"))),
        draw(st.sampled_from(out_dtypes)),
        "causal" if is_causal else "",
        "ragged" if is_ragged else "",
        draw(st.sampled_from(("", "lse2"))),
        policy,
        draw(st.sampled_from(("", "scale0.25"))),
    ]
    return Case(
        problem=":".join(["dense", draw(st.sampled_from(dtypes)), *filter(None, options)]),
        lengths=lens,
        q_lens=tuple(q_lens),
        seed=draw(st.integers(0, 2**16)),
        spread=draw(st.sampled_from((1.0, 0.1, 8.0))),
        spare_pages=draw(st.integers(0, 4)),
        table_tail=draw(st.integers(0, 3)),
        memory=draw(memories(is_ragged, is_split)) if has_memory else {},
        is_split=is_split,
        has_sink=draw(st.booleans()),
        has_lse=draw(st.booleans()) if has_lse is None else has_lse,
    )


def any_int(bits: int, *, signed: bool = True) -> st.SearchStrategy[int]:
    """Integers of a C type, with a liking for the values that break programs."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    special = [n for n in (0, 1, -1, 2, 3, 5, 63, 64, 65, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, low, high) if low <= n <= high]
    return st.one_of(st.sampled_from(special), st.integers(low, high))


def different(old: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return strategy.filter(lambda new: new != old)
