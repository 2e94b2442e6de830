"""mla_decode: numbers, frameworks, outputs in place, no hidden copies, the plan cache."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch

import mlakit
from batches import NUMPY_DTYPES, make_batch

LENGTHS = [130, 0, 1, 64, 300]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("q_len", "causal"), [(1, False), (3, False), (3, True)])
def test_numpy_rows_match_the_reference(dtype: str, q_len: int, causal: bool) -> None:
    batch = make_batch(LENGTHS, dtype=dtype, q_len=q_len)
    out, lse = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, causal=causal)
    assert isinstance(out, np.ndarray)
    assert out.dtype == batch.q.dtype
    assert out.shape == (5, q_len, 4, 512)
    assert lse.dtype == np.float32
    assert lse.shape == (5, q_len, 4)
    batch.check(out, lse, causal=causal)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_torch_in_gives_torch_out_with_the_same_bits_as_numpy(dtype: str) -> None:
    batch = make_batch(LENGTHS, dtype=dtype)
    names = ("q", "kv_cache", "block_table", "cache_seqlens")
    out, lse = mlakit.mla_decode(*(batch.to_torch(name) for name in names))
    assert isinstance(out, torch.Tensor)
    assert out.dtype == batch.to_torch("q").dtype
    assert lse.dtype == torch.float32
    expected_out, expected_lse = mlakit.mla_decode(*(getattr(batch, name) for name in names))
    bits = {"fp32": np.int32, "fp16": np.int16, "bf16": np.int16}[dtype]
    torch_bits = {"fp32": torch.int32, "fp16": torch.int16, "bf16": torch.int16}[dtype]
    assert np.array_equal(out.view(torch_bits).numpy(), expected_out.view(bits))
    assert np.array_equal(lse.numpy(), expected_lse)


@pytest.mark.parametrize("split", ["balanced", "fixed_chunk"])
def test_options_match_the_reference(split: str) -> None:
    batch = make_batch([257, 30, 0, 900], q_heads=6, kv_heads=2, page_size=16, q_len=2)
    sink = np.random.default_rng(1).standard_normal(6).astype(np.float32)
    options: dict[str, Any] = dict(causal=True, softmax_scale=0.1, sink=sink, lse_base="2")
    chunk = {"chunk_tokens": 128} if split == "fixed_chunk" else {}
    out, lse = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, split=split, **chunk, **options)
    batch.check(out, lse, **options)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(576, 512), (512, 512), (320, 256), (48, 32)])
def test_widths_match_the_reference(head_dim: int, value_dim: int) -> None:
    batch = make_batch(LENGTHS, head_dim=head_dim, value_dim=value_dim)
    out, lse = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, value_dim=value_dim)
    assert out.shape[-1] == value_dim
    batch.check(out, lse)


@pytest.mark.parametrize("causal", [False, True])
def test_ragged_q_matches_the_reference(causal: bool) -> None:
    batch = make_batch(LENGTHS, q_lens=[1, 2, 0, 4, 3])
    out, lse = mlakit.mla_decode(
        batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, cu_seqlens_q=batch.cu_seqlens_q, causal=causal
    )
    assert out.shape == (10, 4, 512)
    assert lse.shape == (10, 4)
    batch.check(out, lse, causal=causal)


def test_latent_and_rope_may_be_two_views() -> None:
    batch = make_batch(LENGTHS)
    latent, rope = batch.kv_cache[..., :512], batch.kv_cache[..., 512:]
    whole = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens)
    out, lse = mlakit.mla_decode(
        batch.q[..., :512], (latent, rope), batch.block_table, batch.cache_seqlens, q_rope=batch.q[..., 512:]
    )
    batch.check(out, lse)
    assert np.array_equal(out, whole[0])
    assert np.array_equal(lse, whole[1])


def test_given_outputs_are_written_in_place_and_returned() -> None:
    batch = make_batch(LENGTHS)
    out, lse = batch.outputs()
    result = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    batch.check(out, lse)


def test_outputs_may_be_strided_views_and_their_gaps_stay_untouched() -> None:
    batch = make_batch(LENGTHS, q_len=2)
    wide = np.full((5, 2, 6, 600), 7.0, np.float32)
    heads_first = np.full((5, 4, 2), np.nan, np.float32)
    out, lse = wide[:, :, 1:5, 30:542], heads_first.transpose(0, 2, 1)
    mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, out=out, lse=lse)
    batch.check(out.copy(), lse.copy())
    assert (wide[:, :, [0, 5]] == 7).all()
    assert (wide[..., :30] == 7).all()
    assert (wide[..., 542:] == 7).all()


def test_out_may_be_fp32_for_a_narrow_q() -> None:
    batch = make_batch(LENGTHS, dtype="bf16")
    out = np.full((5, 1, 4, 512), np.nan, np.float32)
    result, lse = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, out=out)
    assert result is out
    batch.check(out, lse)


def test_inputs_may_be_strided_views() -> None:
    batch = make_batch(LENGTHS, q_heads=4)
    q = np.full((5, 3, 9, 700), np.nan, np.float32)
    q[:, 1:2, 2:6, 50:626] = batch.q
    cache = np.full((batch.kv_cache.shape[0], 80, 2, 600), np.nan, np.float32)
    cache[:, 3:67, 1:, 8:584] = batch.kv_cache
    table = np.full((5, 20), -1, np.int32)
    table[:, 2 : 2 + batch.block_table.shape[1]] = batch.block_table
    lengths = np.full((5, 3), -5, np.int32)
    lengths[:, 1] = batch.cache_seqlens
    out, lse = mlakit.mla_decode(
        q[:, 1:2, 2:6, 50:626], cache[:, 3:67, 1:, 8:584], table[:, 2 : 2 + batch.block_table.shape[1]], lengths[:, 1]
    )
    batch.check(out, lse)


def test_read_only_inputs_are_accepted_and_read_only_outputs_are_refused() -> None:
    batch = make_batch(LENGTHS, dtype="bf16")
    for array in (batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens):
        array.flags.writeable = False
    out, lse = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens)
    batch.check(out, lse)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: .*read-only"):
        mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, out=out)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torch_memory_is_used_in_place(dtype: str) -> None:
    batch = make_batch(LENGTHS, dtype=dtype)
    q, cache, table, lengths = (batch.to_torch(name) for name in ("q", "kv_cache", "block_table", "cache_seqlens"))
    out = torch.full((5, 1, 4, 512), torch.nan, dtype=q.dtype)
    lse = torch.full((5, 1, 4), torch.nan)
    pointers = [t.data_ptr() for t in (q, cache, table, lengths, out, lse)]
    result = mlakit.mla_decode(q, cache, table, lengths, out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    assert [t.data_ptr() for t in (q, cache, table, lengths, out, lse)] == pointers
    batch.check(out.float().numpy(), lse.numpy())


def test_no_reference_to_a_tensor_is_kept() -> None:
    batch = make_batch(LENGTHS, dtype="bf16")
    import sys

    counts = [sys.getrefcount(a) for a in (batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens)]
    for _ in range(20):
        mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens)
        with pytest.raises(ValueError, match="kv_cache"):
            mlakit.mla_decode(batch.q, batch.kv_cache[0], batch.block_table, batch.cache_seqlens)
    gc.collect()
    assert [sys.getrefcount(a) for a in (batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens)] == counts


def test_plans_are_cached_while_a_batch_decodes_step_by_step() -> None:
    cache = mlakit.PagedCache(pages=64, page_size=16, dtype=np.float32)
    rng = np.random.default_rng(0)
    for request in range(3):
        cache.add(request)
        cache.append(request, rng.standard_normal((100 * request, 576)))
    steps = 40
    for _ in range(steps):
        for request in range(3):
            cache.append(request, rng.standard_normal((1, 576)))
        q = rng.standard_normal((3, 1, 2, 576)).astype(np.float32)
        mlakit.mla_decode(q, cache.pages, cache.block_table(range(3)), cache.cache_seqlens(range(3)))
    hits, misses, _, size = mlakit.plan_cache_info()
    assert misses == size <= 2
    assert hits == steps - misses


def decode_with_scale(batch: Any, scale: float) -> tuple[int, int]:
    """(hits, misses) of one call; each scale is another plan."""
    before = mlakit.plan_cache_info()
    mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, softmax_scale=scale)
    after = mlakit.plan_cache_info()
    return after[0] - before[0], after[1] - before[1]


def test_the_plan_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    batch = make_batch([3], q_heads=1)
    size = mlakit.plan_cache_info()[2]
    assert size == 64
    for i in range(size):
        assert decode_with_scale(batch, 1 + i) == (0, 1)
    assert decode_with_scale(batch, 1) == (1, 0)  # the oldest, now the newest
    assert decode_with_scale(batch, 1 + size) == (0, 1)  # in the place of the second
    assert mlakit.plan_cache_info()[3] == size
    assert decode_with_scale(batch, 1) == (1, 0)
    assert decode_with_scale(batch, 2) == (0, 1)
    mlakit.clear_plan_cache()
    assert mlakit.plan_cache_info() == (0, 0, size, 0)


def test_every_option_is_part_of_the_plan_caches_key() -> None:
    batch = make_batch([200, 65], dtype="fp32", q_len=2)
    arguments = (batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens)
    options: list[dict[str, Any]] = [
        *({}, {"causal": True}, {"softmax_scale": 0.25}, {"lse_base": "2"}, {"value_dim": 448}),
        *({"split": "fixed_chunk"}, {"split": "fixed_chunk", "chunk_tokens": 128}, {"context": mlakit.Context(num_threads=1)}),
        *({"cp_world": 2}, {"cp_world": 2, "cp_rank": 1}, {"cp_world": 2, "cp_turn": 16}),
        *({"out": np.empty((2, 2, 4, 512), np.float32)}, {"cu_seqlens_q": np.array([0, 1, 4], np.int32)}),
    ]
    bits = []
    for _ in range(2):
        for given in options:
            if "cu_seqlens_q" in given:
                out, lse = mlakit.mla_decode(batch.q.reshape(4, 4, 576), *arguments[1:], **given)
            else:
                out, lse = mlakit.mla_decode(*arguments, **given)
            bits.append((out.tobytes(), lse.tobytes()))
    assert bits[: len(options)] == bits[len(options) :]
    # An output that is given and has the type that a new one would have is no other plan.
    assert mlakit.plan_cache_info() == (len(options) + 1, len(options) - 1, 64, len(options) - 1)


@pytest.mark.parametrize("split", [None, 3, ["balanced"]])
def test_an_option_of_the_wrong_type_is_refused(split: Any) -> None:
    batch = make_batch([3])
    with pytest.raises(ValueError, match=r"^split: expected one of 'balanced', 'fixed_chunk', got"):
        mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, split=split)


def test_fixed_chunk_sums_lengths_with_gaps() -> None:
    """The sum of the lengths bounds a fixed_chunk plan; too small a bound is refused."""
    batch = make_batch([700, 0, 3000, 5])
    expected = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, split="fixed_chunk")
    lengths = np.full(12, -7, np.int32)[::3]
    lengths[:] = batch.cache_seqlens
    out, lse = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, lengths, split="fixed_chunk")
    assert np.array_equal(out, expected[0])
    assert np.array_equal(lse, expected[1])


def test_a_table_that_could_hold_more_tokens_than_int64_is_refused() -> None:
    """Without a wrap-around on the way; the table repeats one entry by its stride."""
    batch = make_batch([3])
    table = np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), (1, 1 << 60), (0, 0))
    with pytest.raises(ValueError, match=r"^problem\.max_len: "):
        mlakit.mla_decode(batch.q, batch.kv_cache, table, batch.cache_seqlens)


@pytest.mark.parametrize("missing", ["q", "kv_cache", "block_table", "cache_seqlens"])
def test_a_tensor_left_out_is_named(missing: str) -> None:
    batch = make_batch([3])
    arguments = {name: getattr(batch, name) for name in ("q", "kv_cache", "block_table", "cache_seqlens")}
    with pytest.raises((TypeError, ValueError), match=rf"^{missing}: "):
        mlakit.mla_decode(**{**arguments, missing: None})


def test_threads_get_the_same_bits() -> None:
    batch = make_batch([500, 20, 0, 129], dtype="bf16", q_heads=8)
    arguments = (batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens)
    expected = mlakit.mla_decode(*arguments)
    results: list[Any] = [None] * 8

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = mlakit.mla_decode(*arguments)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, lse in results:
        assert np.array_equal(out.view(np.int16), expected[0].view(np.int16))
        assert np.array_equal(lse, expected[1])
    batch.check(*results[0])


def test_other_threads_run_during_a_decode() -> None:
    batch = make_batch([8192], q_heads=64)
    context = mlakit.Context(backend="reference", num_threads=1)
    ticks = 0
    is_done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not is_done.wait(0.005):
            ticks += 1

    counter = threading.Thread(target=count)
    counter.start()
    mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, context=context)
    seen = ticks
    is_done.set()
    counter.join()
    assert seen >= 3


@pytest.mark.parametrize("name", [b.name for b in mlakit.backends() if b.available and b.device == "cpu"])
def test_a_context_forces_its_backend(name: str) -> None:
    batch = make_batch(LENGTHS, dtype="bf16", q_len=2)
    context = mlakit.Context(backend=name, num_threads=2)
    out, lse = mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens, causal=True, context=context)
    batch.check(out, lse, causal=True)
    plan = mlakit.Plan(mlakit.Problem(q_heads=4, max_len=512, max_batch=8), context)
    assert plan.info.backend == name


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_memoryviews_work_without_an_array_framework(dtype: str) -> None:
    batch = make_batch(LENGTHS, dtype=dtype)
    views = [memoryview(getattr(batch, name)) for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    out, lse = mlakit.mla_decode(*views)
    assert type(out) is memoryview
    assert out.shape == (5, 1, 4, 512)
    batch.check(np.asarray(out), np.asarray(lse))


def test_any_dlpack_producer_is_accepted_and_answered_with_dlpack() -> None:
    class Wrapped:
        """A framework of which mlakit knows nothing."""

        def __init__(self, array: Any) -> None:
            self.array = array
            self.shape = array.shape

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()

    batch = make_batch(LENGTHS)
    tensors = [Wrapped(getattr(batch, name)) for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    out, lse = mlakit.mla_decode(*tensors)
    batch.check(np.from_dlpack(out), np.from_dlpack(lse))

    class Old(Wrapped):
        """A producer from before DLPack 1, without max_version."""

        def __dlpack__(self, stream: None = None) -> Any:
            return self.array.__dlpack__()

    out, lse = mlakit.mla_decode(*(Old(t.array) for t in tensors))
    batch.check(np.from_dlpack(out), np.from_dlpack(lse))


def test_numpy_dtypes_have_the_names_of_problem() -> None:
    for name, dtype in NUMPY_DTYPES.items():
        batch = make_batch([3], dtype=name)
        assert mlakit.mla_decode(batch.q, batch.kv_cache, batch.block_table, batch.cache_seqlens)[0].dtype == dtype
