"""mlakit.reference against the definition written out number by number, and on every edge of its semantics."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mlakit.reference import float64, merge_states_reference, mla_decode_reference


def by_hand(q: Any, keys: list[Any], value_dim: int, scale: float, sink: float | None) -> tuple[list[float], float]:
    """One row, in Python floats and loops."""
    scores = [scale * math.fsum(float(a) * float(b) for a, b in zip(q, key, strict=True)) for key in keys]
    total = math.fsum(math.exp(s) for s in scores)
    denominator = total + (math.exp(sink) if sink is not None else 0.0)
    weights = [math.exp(s) / denominator for s in scores]
    out = [math.fsum(w * float(key[c]) for w, key in zip(weights, keys, strict=True)) for c in range(value_dim)]
    return out, math.log(total)


@pytest.mark.parametrize("has_sink", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_every_row_is_the_definition(is_ragged: bool, causal: bool, has_sink: bool) -> None:
    rng = np.random.default_rng(1)
    lengths, q_lens = [5, 0, 3], [2, 2, 2]
    heads, kv_heads, dim, value_dim, page_size = 4, 2, 6, 4, 2
    q = rng.standard_normal((3, 2, heads, dim))
    cache = rng.standard_normal((9, page_size, kv_heads, dim))
    table = np.array([[7, 2, 5], [-1, -1, -1], [0, 8, 99]], np.int32)
    sink = rng.standard_normal(heads) if has_sink else None
    out, lse = mla_decode_reference(
        *(q.reshape(6, heads, dim) if is_ragged else q, cache, table, np.array(lengths, np.int32)),
        value_dim=value_dim,
        causal=causal,
        softmax_scale=0.5,
        cu_seqlens_q=np.array([0, 2, 4, 6], np.int32) if is_ragged else None,
        sink=sink,
    )
    out, lse = out.reshape(3, 2, heads, value_dim), lse.reshape(3, 2, heads)
    for b, length in enumerate(lengths):
        for t in range(q_lens[b]):
            seen = length - q_lens[b] + 1 + t if causal else length
            for h in range(heads):
                keys = [cache[table[b, j // page_size], j % page_size, h // (heads // kv_heads)] for j in range(seen)]
                if not keys:
                    assert (out[b, t, h] == 0).all()
                    assert lse[b, t, h] == -np.inf
                    continue
                want_out, want_lse = by_hand(q[b, t, h], keys, value_dim, 0.5, None if sink is None else sink[h])
                np.testing.assert_allclose(out[b, t, h], want_out, rtol=1e-12, atol=1e-14)
                np.testing.assert_allclose(lse[b, t, h], want_lse, rtol=1e-12, atol=1e-14)


def call(q: Any, keys: Any, **options: Any) -> tuple[Any, Any]:
    """One request, one kv head, a page a key."""
    keys = np.asarray(keys)
    table = np.arange(len(keys), dtype=np.int32)[None]
    return mla_decode_reference(q[None], keys[:, None, None], table, np.array([len(keys)]), **options)


def test_the_scale_is_that_of_the_head_by_default() -> None:
    rng = np.random.default_rng(2)
    q, keys = rng.standard_normal((1, 3, 16)), rng.standard_normal((4, 16))
    for one, other in zip(call(q, keys, value_dim=8), call(q, keys, value_dim=8, softmax_scale=0.25), strict=True):
        np.testing.assert_array_equal(one, other)


def test_base_2_is_the_same_number_in_other_units() -> None:
    rng = np.random.default_rng(3)
    q, keys = rng.standard_normal((1, 3, 16)), rng.standard_normal((4, 16))
    np.testing.assert_allclose(
        call(q, keys, value_dim=8, lse_base="2")[1], call(q, keys, value_dim=8)[1] / math.log(2), rtol=1e-15
    )


def test_two_views_are_one_tensor() -> None:
    rng = np.random.default_rng(4)
    q, cache = rng.standard_normal((1, 2, 3, 10)), rng.standard_normal((4, 2, 1, 10))
    table, lengths = np.array([[3, 1]], np.int32), np.array([3], np.int32)
    whole = mla_decode_reference(q, cache, table, lengths, value_dim=6)
    split = mla_decode_reference(
        *(q[..., :6], cache[..., :6], table, lengths),
        value_dim=6,
        softmax_scale=10**-0.5,
        q_rope=q[..., 6:],
        kv_rope=cache[..., 6:],
    )
    for one, other in zip(whole, split, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_nan_reaches_the_rows_that_see_it_and_no_other() -> None:
    rng = np.random.default_rng(5)
    q, keys = rng.standard_normal((3, 2, 8)), rng.standard_normal((4, 8))
    keys[3, 7] = np.nan  # only the last query token sees it
    clean = call(q, np.nan_to_num(keys), value_dim=4, causal=True)
    out, lse = call(q, keys, value_dim=4, causal=True)
    assert np.isnan(out[0, 2]).all()
    assert np.isnan(lse[0, 2]).all()
    np.testing.assert_array_equal(out[0, :2], clean[0][0, :2])
    np.testing.assert_array_equal(lse[0, :2], clean[1][0, :2])


def test_scores_of_minus_infinity_make_an_empty_row() -> None:
    out, lse = call(np.ones((1, 1, 2)), np.array([[0.0, -np.inf]]), value_dim=1)
    assert out.tolist() == [[[[0.0]]]]
    assert lse.tolist() == [[[-np.inf]]]


def test_large_scores_do_not_overflow() -> None:
    out, lse = call(np.full((1, 1, 1), 1000.0), np.array([[1.0], [3.0]]), value_dim=1, softmax_scale=1.0)
    assert out.item() == 3.0
    assert lse.item() == 3000.0


def test_bits_of_bf16_are_taken_as_bf16() -> None:
    values = np.array([1.5, -3.0, 0.0078125, np.inf], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(float64(values), float64(values.view(np.uint16)))
    np.testing.assert_array_equal(float64(values), [1.5, -3.0, 0.0078125, np.inf])


def test_torch_tensors_are_taken() -> None:
    torch = pytest.importorskip("torch")
    values = torch.tensor([1.5, -3.0])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        np.testing.assert_array_equal(float64(values.to(dtype)), [1.5, -3.0])


@pytest.mark.parametrize("lse_base", ["e", "2"])
def test_merged_halves_are_the_whole(lse_base: str) -> None:
    rng = np.random.default_rng(6)
    q, keys = rng.standard_normal((2, 3, 8)), rng.standard_normal((7, 8))
    whole_out, whole_lse = call(q, keys, value_dim=5, lse_base=lse_base)
    halves = [call(q, part, value_dim=5, lse_base=lse_base) for part in (keys[:3], keys[3:])]
    out, lse = merge_states_reference(*(np.stack(part) for part in zip(*halves, strict=True)), lse_base=lse_base)
    np.testing.assert_allclose(out, whole_out, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-13)


def test_a_part_that_saw_nothing_adds_nothing() -> None:
    outs = np.array([[[2.0]], [[np.nan]]])
    out, lse = merge_states_reference(outs, np.array([[0.5], [-np.inf]]))
    assert (out.item(), lse.item()) == (2.0, 0.5)
    out, lse = merge_states_reference(outs, np.array([[-np.inf], [-np.inf]]))
    assert (out.item(), lse.item()) == (0.0, -np.inf)
