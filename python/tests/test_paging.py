"""Block tables and paged caches made for people who have none, on numpy and torch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import mlakit
from batches import make_batch


def test_make_block_table_numbers_pages_in_order() -> None:
    table = mlakit.make_block_table([130, 0, 64, 1], 64)
    assert table.dtype == np.int32
    assert table.tolist() == [[0, 1, 2], [-1, -1, -1], [3, -1, -1], [4, -1, -1]]


def test_make_block_table_answers_torch_with_torch() -> None:
    table = mlakit.make_block_table(torch.tensor([3, 5]), 4)
    assert table.dtype == torch.int32
    assert table.tolist() == [[0, -1], [1, 2]]


def test_make_block_table_takes_empty_batches() -> None:
    assert mlakit.make_block_table([0, 0]).shape == (2, 0)
    assert mlakit.make_block_table([]).shape == (0, 0)


@pytest.mark.parametrize(("lengths", "page_size"), [([-1], 64), ([3], 0)])
def test_make_block_table_refuses_nonsense(lengths: list[int], page_size: int) -> None:
    with pytest.raises(ValueError, match=r"^(lengths|page_size): "):
        mlakit.make_block_table(lengths, page_size)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_contiguous_cache_decodes_the_same_once_paged(framework: str, is_padded: bool) -> None:
    lengths = [70, 0, 5, 33]
    rng = np.random.default_rng(0)
    padded: Any = rng.standard_normal((4, 70, 576)).astype(np.float32)
    q: Any = rng.standard_normal((4, 1, 4, 576)).astype(np.float32)
    if framework == "torch":
        padded, q = torch.from_numpy(padded), torch.from_numpy(q)
    requests = [padded[i, :n] for i, n in enumerate(lengths)]
    cache, table, seqlens = mlakit.paged_from_contiguous(padded if is_padded else requests, lengths if is_padded else None, 16)
    assert type(cache) is type(padded)
    assert tuple(cache.shape[1:]) == (16, 1, 576)
    out, lse = mlakit.mla_decode(q, cache, table, seqlens)
    batch = make_batch(lengths)
    batch.q, batch.kv_cache, batch.block_table = np.asarray(q), np.asarray(cache), np.asarray(table)
    batch.check(np.asarray(out), np.asarray(lse))


def test_paged_from_contiguous_refuses_what_does_not_fit() -> None:
    rows = [np.zeros((3, 576), np.float32), np.zeros((4, 500), np.float32)]
    with pytest.raises(ValueError, match=r"^kv\[1\]: expected \[len, 1, 576\]"):
        mlakit.paged_from_contiguous(rows)
    with pytest.raises(ValueError, match=r"^lengths\[0\]: expected at most the request's 3 tokens, got 4"):
        mlakit.paged_from_contiguous(rows[:1], [4])
    with pytest.raises(ValueError, match=r"^lengths: "):
        mlakit.paged_from_contiguous(rows[:1], [1, 2])
    with pytest.raises(ValueError, match=r"^kv: "):
        mlakit.paged_from_contiguous([])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, torch.bfloat16, torch.float32], ids=str)
def test_a_paged_cache_holds_what_was_appended(dtype: Any) -> None:
    cache = mlakit.PagedCache(pages=8, page_size=4, head_dim=8, dtype=dtype)
    rng = np.random.default_rng(0)
    expected: dict[str, list[Any]] = {"a": [], "b": []}
    for request in expected:
        cache.add(request)
    for request, count in [("a", 3), ("b", 1), ("a", 6), ("b", 0), ("b", 4), ("a", 1)]:
        rows = rng.integers(-8, 8, (count, 8)).astype(np.float32)  # exact in bf16
        cache.append(request, rows)
        expected[request].extend(rows)
    table, lengths = cache.block_table(["b", "a"]), cache.cache_seqlens(["b", "a"])
    assert lengths.tolist() == [5, 10]
    for row, request in zip(table.tolist(), ["b", "a"], strict=True):
        held = [cache.pages[row[i // 4], i % 4, 0].tolist() for i in range(cache.length(request))]
        assert held == [r.tolist() for r in expected[request]]


def test_pages_are_given_back_and_used_again() -> None:
    cache = mlakit.PagedCache(pages=3, page_size=2, head_dim=4, dtype=np.float32)
    cache.add(0)
    cache.append(0, np.ones((6, 4)))
    cache.add(1)
    with pytest.raises(MemoryError, match="1 more pages"):
        cache.append(1, np.ones((1, 4)))
    assert cache.length(1) == 0
    cache.free(0)
    assert cache.free_pages == 3
    assert 0 not in cache
    cache.append(1, np.ones((5, 4)))
    assert cache.free_pages == 0
    assert len(cache) == 1


def test_a_paged_cache_refuses_wrong_rows_and_names() -> None:
    cache = mlakit.PagedCache(pages=3, page_size=2, head_dim=4, kv_heads=2, dtype=np.float32)
    cache.add("x")
    with pytest.raises(ValueError, match=r"^request: 'x' exists"):
        cache.add("x")
    with pytest.raises(ValueError, match=r"^rows: expected \[tokens, 2, 4\], got \[3, 4\]"):
        cache.append("x", np.ones((3, 4)))
    with pytest.raises(KeyError):
        cache.append("y", np.ones((3, 2, 4)))
    with pytest.raises(KeyError):
        cache.free("y")
    with pytest.raises(ValueError, match=r"^device: "):
        mlakit.PagedCache(pages=1, dtype=np.float32, device="cuda")
