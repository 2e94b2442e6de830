"""Shapes: every combination against double precision, row by row."""

from __future__ import annotations

import random

import pytest
import torch
from cases import Batch, Case

HEADS = [(1, 1), (3, 1), (9, 1), (16, 1), (64, 1), (63, 1), (128, 1), (126, 2), (128, 2)]
LENGTHS = [1, 20, 140, 4096, None]  # None: all different


@pytest.mark.parametrize("page_size", [64, 16, 1, 256])
@pytest.mark.parametrize("q_len", [1, 2, 4])
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
def test_rows_match_double_precision(q_heads: int, kv_heads: int, q_len: int, page_size: int) -> None:
    rng = random.Random(q_heads * 1000 + q_len * 10 + page_size)
    for batch in (1, 2, 6, 64):
        for length in LENGTHS:
            for is_causal in (False, True):
                lengths = [
                    rng.choice((0, 1, rng.randrange(1, 700), rng.randrange(1, 3000))) if length is None else length
                    for _ in range(batch)
                ]
                case = Case(
                    lengths, [q_len] * batch, q_heads, kv_heads, page_size, is_causal=is_causal, seed=rng.randrange(2**31)
                )
                x = Batch(case)
                x.run()
                x.check()


@pytest.mark.parametrize("flags", ["", ":chunk128", ":outfp32", ":lse2"])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 512), ("fp16", 576), ("fp16", 512), ("bf16", 576)])
def test_types_widths_and_policies(dtype: str, head_dim: int, flags: str) -> None:
    for q_len, q_heads, page_size in ((1, 16, 64), (2, 128, 64), (3, 20, 32), (1, 128, 48), (5, 64, 128)):
        lengths = [900, 0, 64, 128, 129, 3000, 7]
        x = Batch(Case(lengths, [q_len] * 7, q_heads, 1, page_size, head_dim, dtype, True, flags=flags, seed=q_len))
        x.run()
        x.check(is_base2=flags == ":lse2")


@pytest.mark.parametrize("flags", ["", ":chunk256"])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(16, 1), (128, 1), (30, 2), (5, 5)])
def test_ragged_queries(q_heads: int, kv_heads: int, flags: str) -> None:
    for q_lens in ([1, 4, 0, 7, 2], [0, 0, 1], [3], [33, 1, 20]):
        lengths = [500, 3, 700, 0, 4097][: len(q_lens)]
        x = Batch(Case(lengths, q_lens, q_heads, kv_heads, is_causal=True, is_ragged=True, flags=flags))
        x.run()
        x.check()


def test_one_long_request_among_short_ones() -> None:
    x = Batch(Case([1_000_000, 1, 0, 300, 64, 5000], [1] * 6, 16))
    x.run()
    x.check()


def test_all_empty() -> None:
    for batch in (1, 64):
        x = Batch(Case([0] * batch, [2] * batch, 16, is_causal=True))
        x.run()
        x.check()


def test_sharp_softmax_moves_the_reference_maximum() -> None:
    x = Batch(Case([3000, 5000], [2, 2], 128, is_causal=True, scale=8.0))
    x.run()
    x.check()


def test_cache_above_two_to_the_31_elements() -> None:
    case = Case([4096, 100], [1, 1], 16)
    pages = 2**31 // (64 * 576) + 200
    x = Batch(case)
    kv = torch.empty(pages, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    moved = torch.arange(pages - x.kv.shape[0], pages, device="cuda")
    kv[moved] = x.kv
    used = x.table.clone()
    for i, n in enumerate(case.lengths):
        count = -(-n // 64)
        used[i, :count] = moved[x.table[i, :count].long()].int()
    x.run(kv_cache=kv, block_table=used)
    x.check()


@pytest.mark.parametrize("q_heads", [16, 64, 128])
@pytest.mark.parametrize("batch", [60, 66, 128, 132, 133, 270])
def test_batches_whose_requests_are_whole_or_nearly(batch: int, q_heads: int) -> None:
    rng = random.Random(batch)
    for lengths in (
        [300] * batch,
        [rng.randrange(250, 350) for _ in range(batch)],
        [rng.choice((0, 30, 90)) for _ in range(batch)],
    ):
        x = Batch(Case(lengths, [1] * batch, q_heads, seed=batch))
        x.run()
        x.check()
