"""Decode of requests that share the beginning of their caches: a system prompt, few-shot examples, the branches of one answer.

The queries of a group become the query tokens of one request over the prefix, so that its keys are read once for all of them;
each request then attends to its own suffix, and the two results are merged.
"""

from __future__ import annotations

import itertools
from typing import Any

from . import _ext
from ._arrays import framework_of
from ._decode import _DTYPE_NAMES, merge_states, mla_decode
from ._plan import Context
from ._problem import DEVICES


def decode_shared_prefix(
    q: Any,
    kv_cache: Any,
    prefix_table: Any,
    prefix_seqlens: Any,
    cu_group_tokens: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    value_dim: int = 512,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens_q: Any = None,
    sink: Any = None,
    out: Any = None,
    lse: Any = None,
    context: Context | None = None,
) -> tuple[Any, Any]:
    """`mlakit.mla_decode` of requests whose caches begin with the prefix of their group.

    Args:
        q: [batch, q_len, q_heads, head_dim], or [tokens, q_heads, head_dim] with cu_seqlens_q. The requests of a group are
            next to each other.
        kv_cache: [pages, page_size, kv_heads, head_dim]: holds prefixes and suffixes.
        prefix_table: int32 [groups, width], the pages of each prefix. prefix_seqlens: int32 [groups], its tokens, 0 allowed.
        cu_group_tokens: int32 [groups + 1]: group g owns the query tokens cu_group_tokens[g] to cu_group_tokens[g + 1] of all
            batch * q_len: its first request times q_len, and so on.
        block_table: int32 [batch, width], the pages of each suffix. cache_seqlens: int32 [batch], its tokens.
        causal: bottom-right over prefix and suffix together. A suffix then has at least one token less than its request has query
            tokens, those that its first query tokens must not see; checked on the CPU.
        cu_seqlens_q, sink, out, lse, value_dim, softmax_scale, context: as in `mlakit.mla_decode`.

    Returns:
        (out, lse), of q's framework (torch, numpy or cupy), or the arrays that were given.

    Raises:
        ValueError: tensors that do not fit, as in `mlakit.mla_decode`. NotImplementedError: another framework.
    """
    framework = framework_of(type(q))
    stream = framework.stream(q)
    device_type, _, dtype, shape = _ext.describe(q, "q", stream)
    expected_rows = "[tokens, q_heads, head_dim]" if cu_seqlens_q is not None else "[batch, q_len, q_heads, head_dim]"
    if len(shape) != expected_rows.count(",") + 1:
        why = " because cu_seqlens_q is given" if cu_seqlens_q is not None else ""
        raise ValueError(f"q: expected {expected_rows}{why}, got shape {list(shape)}: reshape it")
    for name, given, expected in (("out", out, (*shape[:-1], value_dim)), ("lse", lse, shape[:-1])):
        if given is not None and _ext.describe(given, name, stream)[3] != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(_ext.describe(given, name, stream)[3])}")
    if causal and device_type == DEVICES["cpu"]:
        _check_suffixes(cache_seqlens, shape[1] if cu_seqlens_q is None else cu_seqlens_q)
    # Partial results in fp32, so that merging rounds once, as a single decode does.
    out_parts = framework.empty(q, (2, *shape[:-1], value_dim), "fp32")
    lse_parts = framework.empty(q, (2, *shape[:-1]), "fp32")
    if not hasattr(out_parts, "__getitem__"):
        raise NotImplementedError(f"q: decode_shared_prefix takes torch, numpy and cupy arrays, got {type(q).__name__}")
    tokens_and_heads = (-1, shape[-2])
    options: dict[str, Any] = {"value_dim": value_dim, "softmax_scale": softmax_scale, "context": context}
    mla_decode(
        q.reshape(*tokens_and_heads, shape[-1]),
        kv_cache,
        prefix_table,
        prefix_seqlens,
        cu_seqlens_q=cu_group_tokens,
        sink=sink,
        out=out_parts[0].reshape(*tokens_and_heads, value_dim),
        lse=lse_parts[0].reshape(tokens_and_heads),
        **options,
    )
    suffix = {"cu_seqlens_q": cu_seqlens_q, "causal": causal, "out": out_parts[1], "lse": lse_parts[1]}
    mla_decode(q, kv_cache, block_table, cache_seqlens, **suffix, **options)

    if out is None:
        out = framework.empty(q, (*shape[:-1], value_dim), _DTYPE_NAMES[dtype])
    if lse is None:
        lse = framework.empty(q, shape[:-1], "fp32")
    is_ragged = cu_seqlens_q is not None
    merged_lse: Any = lse
    if sink is not None:
        # The prefix part carries the sink in its denominator, so its weight has to as well. lse never does: it is merged first,
        # with one column of the parts.
        column = framework.empty(q, (*shape[:-1], 1), "fp32")
        _merge(is_ragged, out_parts[..., :1], lse_parts, column, lse, context)
        framework.logaddexp(lse_parts[0], sink, lse_parts[0])
        merged_lse = framework.empty(q, shape[:-1], "fp32")
    _merge(is_ragged, out_parts, lse_parts, out, merged_lse, context)
    return out, lse


def _merge(is_ragged: bool, out_parts: Any, lse_parts: Any, out: Any, lse: Any, context: Context | None) -> None:
    if is_ragged:
        merge_states(out_parts, lse_parts, out=out, lse=lse, context=context)
        return
    # A query token of all requests at a time: by the strides of out and lse, requests and query tokens may not be one dimension.
    for t in range(out.shape[1]):
        merge_states(out_parts[:, :, t], lse_parts[:, :, t], out=out[:, t], lse=lse[:, t], context=context)


def _check_suffixes(cache_seqlens: Any, q_lens: Any) -> None:
    """q_lens: query tokens of each request, or where those of each begin."""
    lengths = cache_seqlens.tolist()
    if isinstance(q_lens, int):
        q_lens = [q_lens] * len(lengths)
    else:
        begins = q_lens.tolist()
        q_lens = [end - begin for begin, end in itertools.pairwise(begins)]
    for request, (tokens, q_len) in enumerate(zip(lengths, q_lens, strict=False)):  # other counts are mla_decode's to refuse
        if tokens < q_len - 1:
            raise ValueError(
                f"cache_seqlens: expected a suffix of at least q_len - 1 = {q_len - 1} tokens, got "
                f"cache_seqlens[{request}] = {tokens}: end the prefix earlier"
            )
