"""Bad calls from Python: the exception's type, the argument it names, and nothing written. The long corpus is bad_calls/."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mlakit
from batches import Batch, make_batch


@pytest.fixture
def batch() -> Batch:
    return make_batch([130, 0, 64])


def decode(batch: Batch, **changes: Any) -> tuple[Any, Any]:
    arguments = {name: getattr(batch, name) for name in ("q", "kv_cache", "block_table", "cache_seqlens")}
    return mlakit.mla_decode(**{**arguments, **changes})


@pytest.mark.parametrize("name", ["q", "kv_cache", "block_table", "cache_seqlens", "out", "lse", "sink", "cu_seqlens_q"])
def test_what_is_no_tensor_is_a_type_error_that_names_the_argument(batch: Batch, name: str) -> None:
    changes: dict[str, Any] = {name: [1, 2, 3]}
    if name == "cu_seqlens_q":
        changes["q"] = batch.q[:, 0]
    with pytest.raises(TypeError, match=rf"^{name}: expected a tensor .*got <class 'list'>"):
        decode(batch, **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", np.zeros((3, 4, 576), np.float32)),
        ("q", np.zeros((3, 1, 4, 576), np.float64)),
        ("q", np.zeros((3, 1, 4, 1152), np.float32)[..., ::2]),
        ("kv_cache", np.zeros((8, 64, 576), np.float32)),
        ("kv_cache", np.zeros((8, 64, 1, 576), np.int32)),
        ("kv_cache", np.zeros((8, 64, 1, 575), np.float32)),
        ("block_table", np.zeros((2, 4), np.int32)),
        ("block_table", np.zeros(3, np.int32)),
        ("block_table", np.zeros((3, 4), np.int64)),
        ("block_table", np.full((3, 4), 1 << 20, np.int32)),
        ("cache_seqlens", np.array([130, 0, 64], np.int64)),
        ("cache_seqlens", np.array([130, 0], np.int32)),
        ("cache_seqlens", np.array([130, -1, 64], np.int32)),
        ("cache_seqlens", np.array([130, 0, 1 << 30], np.int32)),
        ("out", np.zeros((3, 1, 4, 576), np.float32)),
        ("lse", np.zeros((3, 1, 4), np.float16)),
        ("sink", np.zeros(3, np.float32)),
    ],
)
def test_a_tensor_that_does_not_fit_is_a_value_error_that_names_it(batch: Batch, name: str, value: Any) -> None:
    out, lse = batch.outputs()
    with pytest.raises(ValueError, match=rf"^{name}\b.*: "):
        decode(batch, **{"out": out, "lse": lse, name: value})
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_tensors_on_another_device_are_refused(batch: Batch) -> None:
    with pytest.raises(Exception, match=r"meta|device"):
        decode(batch, q=torch.zeros(3, 1, 4, 576, device="meta"))


def test_out_that_overlaps_q_is_refused(batch: Batch) -> None:
    before = batch.q.copy()
    with pytest.raises(ValueError, match="overlap"):
        decode(batch, out=batch.q[..., :512])
    assert np.array_equal(batch.q, before)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"split": "even"}, r"^split: expected one of 'balanced', 'fixed_chunk', got 'even'"),
        ({"lse_base": "10"}, r"^lse_base: expected one of 'e', '2', got '10'"),
        ({"softmax_scale": 0}, r"^softmax_scale: "),
        ({"value_dim": 600}, r"value_dim"),
        ({"chunk_tokens": 100, "split": "fixed_chunk"}, r"chunk_tokens"),
        ({"kv_cache": (np.zeros((1, 1, 1, 1)),)}, r"^kv_cache: .*pair"),
    ],
)
def test_bad_options_are_value_errors(batch: Batch, changes: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        decode(batch, **changes)


def test_unsupported_problems_are_not_implemented_with_the_reasons() -> None:
    with pytest.raises(NotImplementedError, match="topk|index"):
        mlakit.Plan(mlakit.Problem(q_heads=4, max_len=64, topk=64))
    with pytest.raises(NotImplementedError):
        mlakit.Plan(mlakit.Problem(q_heads=4, max_len=64, kv_format="fp8_656"))


def test_an_unknown_backend_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="cpu-z80"):
        mlakit.Context(backend="cpu-z80")


def test_a_workspace_that_is_too_small_is_a_value_error(batch: Batch) -> None:
    plan = mlakit.Plan(mlakit.Problem(q_dtype="fp32", q_heads=4, max_len=512, max_batch=3))
    with pytest.raises(ValueError, match="schedule"):
        plan.schedule(batch.cache_seqlens, buffer=np.zeros(8, np.uint8))
    schedule = plan.schedule(batch.cache_seqlens)
    if plan.info.scratch_bytes:
        with pytest.raises(ValueError, match="scratch"):
            plan.decode(batch.q, batch.kv_cache, batch.block_table, schedule, scratch=np.zeros(1, np.uint8))
