"""The calls that do it all: mla_decode, which makes, caches and schedules plans, and merge_states."""

from __future__ import annotations

from typing import Any

from . import _ext
from ._arrays import framework_of
from ._plan import Context, Plan, default_context
from ._problem import DEVICES, DTYPES, LseBase, Problem, Split

_DTYPE_NAMES: dict[int, Any] = {number: name for name, number in DTYPES.items() if name != "int32"}
_DEVICE_NAMES = {number: name for name, number in DEVICES.items()}


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    value_dim: int = 512,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens_q: Any = None,
    q_rope: Any = None,
    sink: Any = None,
    out: Any = None,
    lse: Any = None,
    lse_base: LseBase = "e",
    split: Split = "balanced",
    chunk_tokens: int = 0,
    cp_world: int = 1,
    cp_rank: int = 0,
    cp_turn: int = 0,
    global_seqlens: Any = None,
    context: Context | None = None,
    stream: int | None = None,
) -> tuple[Any, Any]:
    """Multi-head Latent Attention of a batch of requests over a paged cache.

    Every query row (a query token and a head) of request b attends to that request's cached tokens:

        s[j] = softmax_scale * dot(q, kv[j]);   out = softmax(s) @ kv[:, :value_dim];   lse = log(sum(exp(s)))

    A row that sees no token gets out = 0 and lse = -inf.

    Tensors may be of torch, numpy (with ml_dtypes for bf16), cupy, jax, memoryviews, or anything with DLPack, on one device. They
    are used in place: nothing is copied. The last dimension is contiguous, other strides are free (of lse, all). Element types
    are bf16, fp16 or fp32.

    Args:
        q: [batch, q_len, q_heads, head_dim], or [tokens, q_heads, head_dim] with cu_seqlens_q.
        kv_cache: [pages, page_size, kv_heads, head_dim]; or a pair (latent [..., value_dim], rope [..., head_dim - value_dim]).
        block_table: int32 [batch, width], the page ids of each request in order. Entries after the last used page are not read.
        cache_seqlens: int32 [batch], cached tokens of each request; 0 is allowed.
        value_dim: width of out: the first part of a cache row.
        causal: query token t of q_len sees the first len - q_len + 1 + t tokens.
        softmax_scale: None: head_dim ** -0.5. Models with absorbed weights pass the scale of the original head.
        cu_seqlens_q: int32 [batch + 1]: request b owns query tokens cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        q_rope: the last head_dim - value_dim columns of q, when q holds the first value_dim only.
        sink: fp32 [q_heads]: exp(sink) joins the denominator of out, never lse.
        out: [batch, q_len, q_heads, value_dim] (ragged: [tokens, q_heads, value_dim]), of q's type or fp32: written in place.
        lse: fp32 [batch, q_len, q_heads] (ragged: [tokens, q_heads]): written in place.
        lse_base: "e" or "2".
        split: "balanced" is fastest; with "fixed_chunk" the bits of a row depend on its own request only.
        chunk_tokens: fixed_chunk: tokens between cuts, a multiple of 64; 0: 2048.
        cp_world, cp_rank, cp_turn: context parallel: the ranks take the keys of each request in turns of cp_turn (0: 1), rank 0
            first; cache_seqlens and block_table are this rank's. merge_states of all ranks' results is attention over all keys.
        global_seqlens: int32 [batch], for causal with cp_world > 1: cached tokens of each request on all ranks together.
        context: a backend or thread count other than the default.
        stream: CUDA: a cudaStream_t as an int; None: the current stream of q's framework.

    Returns:
        (out, lse), of q's framework, or the arrays that were given.

    Raises:
        ValueError: a shape, type, stride, device or value that does not fit; the message names the tensor; nothing is written.
        TypeError: an argument that is no tensor.
        NotImplementedError: no backend takes the problem; the message lists each backend's reason.
        RuntimeError: no usable CUDA driver, a CUDA call failed, or an input requires grad: there is no backward pass.

    Plans are cached by shape, with sizes rounded up, so that decoding step by step does not make new ones; engines that want no
    such search make a `Plan` themselves. `clear_plan_cache()` gives the memory back.
    """
    kv_rope = None
    if isinstance(kv_cache, tuple):
        if len(kv_cache) != 2:
            raise ValueError(f"kv_cache: expected one tensor or a pair (latent, rope), got a tuple of {len(kv_cache)}")
        kv_cache, kv_rope = kv_cache
    framework = framework_of(type(q))
    framework.refuse_gradients(q, q_rope, kv_cache)
    if stream is None:
        stream = framework.stream(q)
    out, lse = _plans.decode(
        framework,
        (q, q_rope, kv_cache, kv_rope, block_table, cache_seqlens, cu_seqlens_q, global_seqlens, sink, out, lse),
        (value_dim, split, causal, softmax_scale, lse_base, chunk_tokens, cp_world, cp_rank, cp_turn, context),
        stream,
    )
    return framework.finish(out), framework.finish(lse)


def clear_plan_cache() -> None:
    """Drops the plans that mla_decode has made, and their workspaces."""
    _plans.clear()


def plan_cache_info() -> tuple[int, int, int, int]:
    """(hits, misses, maxsize, currsize) of mla_decode's plan cache."""
    return _plans.info()


def _make_plan(numbers: tuple[int, ...], options: tuple[Any, ...]) -> tuple[_ext.Plan, str]:
    """A plan for _ext.PlanCache, which calls this for numbers and options that it has not seen, and the name of q's type."""
    device_type, device_id, q_dtype, kv_dtype, out_dtype, is_ragged, max_batch, q_len = numbers[:8]
    max_len, max_tokens, q_heads, kv_heads, head_dim, page_size = numbers[8:]
    value_dim, split, causal, softmax_scale, lse_base, chunk_tokens, cp_world, cp_rank, cp_turn, context = options
    for name, number in (("q", q_dtype), ("kv_cache", kv_dtype), ("out", out_dtype)):
        if number not in _DTYPE_NAMES:
            raise ValueError(f"{name}: expected elements of bf16, fp16 or fp32, got another type: convert it")
    if device_type not in _DEVICE_NAMES:
        raise ValueError(f"q: expected a tensor on the CPU or a CUDA device, got DLPack device type {device_type}: move it")
    device = _DEVICE_NAMES[device_type]
    problem = Problem(
        device=f"{device}:{device_id}" if device_id else device,
        q_dtype=_DTYPE_NAMES[q_dtype],
        kv_dtype=_DTYPE_NAMES[kv_dtype],
        out_dtype=_DTYPE_NAMES[out_dtype],
        ragged_q=bool(is_ragged),
        max_batch=max_batch,
        q_len=q_len,
        max_q_tokens=q_len if is_ragged else 0,
        max_len=max_len,
        max_tokens=max_tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        page_size=page_size,
        causal=causal,
        softmax_scale=softmax_scale,
        lse_base=lse_base,
        split=split,
        chunk_tokens=chunk_tokens,
        cp_world=cp_world,
        cp_rank=cp_rank,
        cp_turn=cp_turn,
    )
    return Plan(problem, context)._native, _DTYPE_NAMES[q_dtype]


_plans = _ext.PlanCache(64, _make_plan)


def merge_states(
    out_parts: Any,
    lse_parts: Any,
    *,
    out: Any = None,
    lse: Any = None,
    lse_base: LseBase = "e",
    context: Context | None = None,
    stream: int | None = None,
) -> tuple[Any, Any]:
    """Joins attention over disjoint sets of keys into attention over all of them.

    Args:
        out_parts: [parts, tokens, heads, dim], bf16, fp16 or fp32: each part's out.
        lse_parts: fp32 [parts, tokens, heads]: each part's lse; -inf for a row that saw nothing.
        out: [tokens, heads, dim], written in place; None: a new array of out_parts' type.
        lse: fp32 [tokens, heads], written in place; None: a new array.
        lse_base: the base of both lse tensors, "e" or "2".
        context, stream: as in mla_decode.

    Returns:
        (out, lse).

    Raises:
        ValueError: shapes, types or devices that do not fit. RuntimeError: as in mla_decode.
    """
    if lse_base not in ("e", "2"):
        raise ValueError(f"lse_base: expected one of 'e', '2', got {lse_base!r}")
    framework = framework_of(type(out_parts))
    framework.refuse_gradients(out_parts, lse_parts)
    if stream is None:
        stream = framework.stream(out_parts)
    _, _, dtype, shape = _ext.describe(out_parts, "out_parts", stream)
    if len(shape) != 4:
        raise ValueError(f"out_parts: expected [parts, tokens, heads, dim], got shape {list(shape)}: reshape it")
    if out is None:
        if dtype not in _DTYPE_NAMES:
            raise ValueError("out_parts: expected elements of bf16, fp16 or fp32, got another type: convert it")
        out = framework.empty(out_parts, shape[1:], _DTYPE_NAMES[dtype])
    if lse is None:
        lse = framework.empty(out_parts, shape[1:-1], "fp32")
    (context or default_context())._native.merge(out_parts, lse_parts, out, lse, lse_base == "2", stream)
    return framework.finish(out), framework.finish(lse)
