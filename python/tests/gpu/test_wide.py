"""Blocks of 64 keys: the plan takes them for many requests of 128 and more rows that may be long, which these are not."""

from __future__ import annotations

import random

import pytest
import torch
from cases import Batch, Case

LONG = 16384


def wide(lengths: list[int], q_len: int = 1, q_heads: int = 128, kv_heads: int = 1, page_size: int = 64, **more: object) -> Case:
    return Case(lengths, [q_len] * len(lengths), q_heads, kv_heads, page_size, max_len=LONG, **more)  # type: ignore[arg-type]


def run(case: Case) -> Batch:
    x = Batch(case)
    plan = x.run()
    assert plan.info.variant.decode().endswith("_wide")
    assert plan.info.block_tokens == 64
    x.check(is_base2="lse2" in case.flags)
    return x


@pytest.mark.parametrize(
    ("q_len", "q_heads", "kv_heads"), [(1, 128, 1), (2, 128, 1), (4, 128, 1), (2, 128, 2), (4, 32, 1), (3, 256, 1)]
)
@pytest.mark.parametrize("page_size", [64, 128, 256])
def test_rows_match_double_precision(q_len: int, q_heads: int, kv_heads: int, page_size: int) -> None:
    rng = random.Random(q_len * q_heads + page_size)
    for batch in (70, 133):
        for is_causal in (False, True):
            for lengths in (
                [rng.choice((0, 1, 63, 64, 65, rng.randrange(1, 400), rng.randrange(1, 1500))) for _ in range(batch)],
                [rng.randrange(200, 260)] * batch,
            ):
                run(wide(lengths, q_len, q_heads, kv_heads, page_size, is_causal=is_causal, seed=rng.randrange(2**31)))


@pytest.mark.parametrize("flags", ["", ":outfp32", ":lse2"])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 512), ("fp16", 576), ("fp16", 512), ("bf16", 576)])
def test_types_and_widths(dtype: str, head_dim: int, flags: str) -> None:
    rng = random.Random(head_dim)
    for q_len in (1, 2):
        lengths = [rng.randrange(0, 600) for _ in range(80)]
        run(wide(lengths, q_len, head_dim=head_dim, dtype=dtype, is_causal=True, flags=flags))


def test_one_long_request_among_short_ones() -> None:
    run(wide([4096, *[1] * 40, 3000, *[100] * 40]))


def test_all_empty() -> None:
    run(wide([0] * 80, q_len=2, is_causal=True))


@pytest.mark.parametrize("scale", [8.0, 40.0])
def test_sharp_softmax_moves_the_reference_maximum(scale: float) -> None:
    rng = random.Random(3)
    run(wide([rng.randrange(1, 900) for _ in range(70)], q_len=2, is_causal=True, scale=scale))


def test_runs_are_bitwise_equal() -> None:
    rng = random.Random(4)
    x = run(wide([rng.randrange(0, 1500) for _ in range(90)], q_len=2, is_causal=True))
    first, first_lse = x.out.clone(), x.lse.clone()
    for _ in range(20):
        x.out.fill_(float("nan"))
        x.run()
        assert torch.equal(x.out.view(torch.int16), first.view(torch.int16))
        assert torch.equal(x.lse.view(torch.int32), first_lse.view(torch.int32))


def narrow(case: Case) -> None:
    x = Batch(case)
    plan = x.run()
    assert plan.info.block_tokens == 32
    x.check()


def test_other_plans_are_narrow() -> None:
    narrow(wide([100] * 80, flags=":chunk256"))
    narrow(wide([100] * 80, page_size=48))
    narrow(wide([100] * 80, q_heads=126))
    narrow(wide([100] * 60))  # fewer requests than parts
    for q_len, max_len in ((1, 2048), (2, 1024), (4, 512)):
        narrow(Case([100] * 80, [q_len] * 80, 128, max_len=max_len))


def test_more_rows_are_wide_earlier() -> None:
    for q_len, max_len in ((1, 4096), (2, 2048), (4, 1024)):
        run(Case([100, 300, 0, 5] * 20, [q_len] * 80, 128, max_len=max_len))
