"""Problem, Plan and Schedule: the engine's way through."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

import mlakit
from batches import make_batch
from mlakit import _ext, testing


def test_problem_defaults_are_the_librarys() -> None:
    ours, theirs = mlakit.Problem(q_heads=1, max_len=1)._native(), _ext.Problem()
    theirs.q_heads = theirs.max_len = 1
    for name in dir(theirs):
        if (
            not name.startswith("_")
            and not callable(getattr(theirs, name))
            and name not in ("max_batch", "kv_dtype", "out_dtype")
        ):
            assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "problem",
    [
        mlakit.Problem(q_heads=128, max_len=16384, max_batch=128, causal=True),
        mlakit.Problem(q_heads=16, max_len=100, q_dtype="fp16", out_dtype="fp32", lse_base="2", page_size=1),
        mlakit.Problem(q_heads=8, max_len=100, ragged_q=True, q_len=4, max_batch=3, max_q_tokens=9, max_tokens=150),
        mlakit.Problem(q_heads=8, kv_heads=2, max_len=64, head_dim=320, value_dim=256, split="fixed_chunk", chunk_tokens=128),
        mlakit.Problem(q_heads=8, max_len=64, softmax_scale=0.125, device="cuda:1", debug=True),
        mlakit.Problem(q_heads=8, max_len=64, kv_format="fp8_656", topk=2048, cp_world=4, cp_rank=3),
    ],
    ids=str,
)
def test_a_problem_survives_its_one_line_form(problem: mlakit.Problem) -> None:
    again = mlakit.Problem.parse(str(problem))
    assert str(again) == str(problem)
    assert again._native().format() == problem._native().format()
    for name in (
        "q_heads",
        "max_len",
        "split",
        "causal",
        "ragged_q",
        "device",
        "kv_format",
        "lse_base",
        "softmax_scale",
        "debug",
    ):
        assert getattr(again, name) == getattr(problem, name)


def test_a_problem_is_frozen_hashable_and_picklable() -> None:
    problem = mlakit.Problem(q_heads=16, max_len=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.q_heads = 8  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(problem)) == problem
    assert {problem: 1}[dataclasses.replace(problem)] == 1


@pytest.mark.parametrize(
    "text", ["", "dense", "dense:bf16:h16:l", "sparse?:bf16", "dense:bf16:h16:l64:q_heads=4", "dense:bf16:hx"]
)
def test_a_text_that_is_no_problem_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        mlakit.Problem.parse(text)


@pytest.mark.parametrize("field", ["q_dtype", "kv_dtype", "out_dtype", "kv_format", "split", "lse_base", "device"])
def test_an_unknown_name_is_a_value_error_that_lists_the_known_ones(field: str) -> None:
    problem = mlakit.Problem(q_heads=1, max_len=1, **{field: "no such"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^{field}: expected one of .*'no such'"):
        mlakit.Plan(problem)


def test_info_tells_what_the_plan_decided() -> None:
    plan = mlakit.Plan("dense:fp32:b4:h8:l1000")
    assert plan.info.backend in {b.name for b in mlakit.backends() if b.available}
    assert plan.info.problem == str(plan.problem)
    assert plan.info.schedule_bytes > 0
    assert plan.info.schedule_alignment & (plan.info.schedule_alignment - 1) == 0
    assert plan.info.parts >= 1
    assert plan.info.problem in repr(plan)


def test_one_plan_serves_every_batch_up_to_its_maxima() -> None:
    plan = mlakit.Plan(mlakit.Problem(q_dtype="bf16", q_heads=4, max_len=400, max_batch=6))
    for seed, lengths in enumerate([[1], [400, 0, 33], [0, 0], [64] * 6, [10, 300]]):
        batch = make_batch(lengths, dtype="bf16", seed=seed)
        schedule = plan.schedule(batch.cache_seqlens)
        for _layer in range(2):
            out, lse = batch.outputs()
            result = plan.decode(batch.q, batch.kv_cache, batch.block_table, schedule, out=out, lse=lse)
            assert result[0] is out
            assert result[1] is lse
            batch.check(out, lse)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_bound_call_decodes_what_its_tensors_hold_by_then(framework: str) -> None:
    lengths = [130, 0, 64]
    first, second = make_batch(lengths, dtype="bf16"), make_batch(lengths, dtype="bf16", seed=1)
    plan = mlakit.Plan(mlakit.Problem(q_heads=4, max_len=256, max_batch=3))
    schedule = plan.schedule(first.cache_seqlens)
    names = ("q", "kv_cache", "block_table")
    q, cache, table = (first.to_torch(n) if framework == "torch" else getattr(first, n) for n in names)
    out, lse = first.outputs()
    to_framework = (lambda a: testing.convert(a, "torch")) if framework == "torch" else (lambda a: a)
    bound = plan.bind(q, cache, table, schedule, out=to_framework(out), lse=to_framework(lse))
    del q, cache, table
    for batch in (first, second):
        for name in names:
            getattr(first, name)[...] = getattr(batch, name)
        out[...], lse[...] = np.nan, np.nan
        bound()
        batch.check(out, lse)
    first.cache_seqlens[0] += 1
    with pytest.raises(ValueError, match="cache_seqlens|schedule"):
        bound()


def test_lse_can_be_left_out() -> None:
    batch = make_batch([100, 0])
    plan = mlakit.Plan(mlakit.Problem(q_dtype="fp32", q_heads=4, max_len=128, max_batch=2))
    schedule = plan.schedule(batch.cache_seqlens)
    out, lse = plan.decode(batch.q, batch.kv_cache, batch.block_table, schedule, return_lse=False)
    assert lse is None
    assert np.array_equal(out, plan.decode(batch.q, batch.kv_cache, batch.block_table, schedule)[0])


def test_a_schedule_may_be_copied_and_rewritten_in_place() -> None:
    plan = mlakit.Plan(mlakit.Problem(q_dtype="fp32", q_heads=4, max_len=300, max_batch=3))
    raw = np.empty(plan.info.schedule_bytes + plan.info.schedule_alignment, np.uint8)
    begin = -raw.ctypes.data % plan.info.schedule_alignment
    buffer = raw[begin : begin + plan.info.schedule_bytes]
    for lengths in ([300, 0, 17], [5, 6, 7]):
        batch = make_batch(lengths)
        schedule = plan.schedule(batch.cache_seqlens, buffer=buffer)
        assert schedule.buffer is buffer
        out, lse = plan.decode(batch.q, batch.kv_cache, batch.block_table, schedule)
        batch.check(out, lse)


def test_a_stale_schedule_is_refused() -> None:
    batch = make_batch([100, 20])
    plan = mlakit.Plan(mlakit.Problem(q_dtype="fp32", q_heads=4, max_len=128, max_batch=2))
    schedule = plan.schedule(batch.cache_seqlens)
    batch.cache_seqlens[1] += 1
    with pytest.raises(ValueError, match="cache_seqlens|schedule"):
        plan.decode(batch.q, batch.kv_cache, batch.block_table, schedule)


def test_more_than_the_maxima_is_refused() -> None:
    plan = mlakit.Plan(mlakit.Problem(q_dtype="fp32", q_heads=4, max_len=128, max_batch=2))
    for lengths in ([129], [1, 1, 1]):
        with pytest.raises(ValueError, match=r"max_len|max_batch|128|2"):
            plan.schedule(make_batch(lengths).cache_seqlens)


def test_fixed_chunk_rows_do_not_depend_on_their_batch_mates() -> None:
    problem = mlakit.Problem(q_heads=4, max_len=2000, max_batch=4, split="fixed_chunk", chunk_tokens=128)
    plan = mlakit.Plan(problem)
    batch = make_batch([1500, 3, 700, 0], dtype="bf16")
    together, _ = plan.decode(batch.q, batch.kv_cache, batch.block_table, plan.schedule(batch.cache_seqlens))
    for i in range(4):
        one = slice(i, i + 1)
        alone, _ = plan.decode(batch.q[one], batch.kv_cache, batch.block_table[one], plan.schedule(batch.cache_seqlens[one]))
        assert np.array_equal(alone[0].view(np.int16), together[i].view(np.int16))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    batch = make_batch([1500, 3, 700, 0], dtype="bf16", q_heads=16)
    results: list[Any] = []
    for count in (1, threads):
        context = mlakit.Context(num_threads=count)
        results.append(mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, context=context))
    assert np.array_equal(results[0][0].view(np.int16), results[1][0].view(np.int16))
    assert np.array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("lse_base", ["e", "2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_parts_equal_the_whole(lse_base: Any, dtype: str) -> None:
    batch = make_batch([130, 0, 300, 20], dtype=dtype, page_size=64)
    parts = []
    for begin, end in ((0, 128), (128, 10**6)):
        lengths = np.clip(batch.cache_seqlens - begin, 0, end - begin).astype(np.int32)
        table = np.ascontiguousarray(batch.block_table[:, begin // 64 :])
        out = np.empty((4, 1, 4, 512), np.float32)
        parts.append(mlakit.mla_decode(batch.q, batch.kv_cache, table, lengths, lse_base=lse_base, out=out))
    outs = np.stack([out[:, 0] for out, _ in parts])
    lses = np.stack([lse[:, 0] for _, lse in parts])
    target = np.full((4, 4, 512), np.nan, batch.q.dtype)
    out, lse = mlakit.merge_states(outs, lses, out=target, lse_base=lse_base)
    assert out is target
    batch.check(out[:, None], lse[:, None], lse_base=lse_base)


@pytest.mark.parametrize("causal", [False, True])
def test_context_parallel_shards_merge_into_the_whole(causal: bool) -> None:
    world, page_size = 3, 16
    batch = make_batch([130, 0, 300, 2], q_len=3, page_size=page_size)
    parts = []
    for rank in range(world):
        shards = []
        for table, length in zip(batch.block_table, batch.cache_seqlens.tolist(), strict=True):
            keys = np.arange(rank, length, world)
            shards.append(batch.kv_cache[table[keys // page_size], keys % page_size])
        cache, table, lengths = mlakit.paged_from_contiguous(shards, page_size=page_size)
        parts.append(
            mlakit.mla_decode(
                *(batch.q, cache, table, lengths),
                causal=causal,
                cp_world=world,
                cp_rank=rank,
                global_seqlens=batch.cache_seqlens if causal else None,
            )
        )
    shape = (12, 4)
    outs, lses = np.stack([out.reshape(*shape, 512) for out, _ in parts]), np.stack([lse.reshape(shape) for _, lse in parts])
    out, lse = mlakit.merge_states(outs, lses)
    batch.check(out.reshape(4, 3, 4, 512), lse.reshape(4, 3, 4), causal=causal)


def test_merge_makes_outputs_of_the_parts_framework() -> None:
    torch = pytest.importorskip("torch")
    outs, lses = torch.randn(3, 5, 2, 8), torch.randn(3, 5, 2)
    out, lse = mlakit.merge_states(outs, lses)
    weights = torch.softmax(lses.double(), 0)
    torch.testing.assert_close(out.double(), (weights[..., None] * outs.double()).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.logsumexp(lses.double(), 0), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^lse_parts"):
        mlakit.merge_states(outs, lses[:2])
