"""Decode of requests that share the beginning of their caches: a system prompt, few-shot examples, the branches of one answer.

The queries of a group become the query tokens of one request over the prefix, so that its keys are read once for all of them;
each request then attends to its own suffix, and the two results are merged.
"""

from __future__ import annotations

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
    context: Context | None = None,
) -> tuple[Any, Any]:
    """`mlakit.mla_decode` of requests whose caches begin with the prefix of their group.

    Args:
        q: [batch, q_len, q_heads, head_dim], the requests of a group next to each other.
        kv_cache: [pages, page_size, kv_heads, head_dim]: holds prefixes and suffixes.
        prefix_table: int32 [groups, width], the pages of each prefix. prefix_seqlens: int32 [groups], its tokens, 0 allowed.
        cu_group_tokens: int32 [groups + 1]: group g owns the query tokens cu_group_tokens[g] to cu_group_tokens[g + 1] of all
            batch * q_len: its first request times q_len, and so on.
        block_table: int32 [batch, width], the pages of each suffix. cache_seqlens: int32 [batch], its tokens.
        causal: bottom-right over prefix and suffix together. A suffix then has at least q_len - 1 tokens, those that its first
            query tokens must not see; checked on the CPU.
        value_dim, softmax_scale, context: as in `mlakit.mla_decode`.

    Returns:
        (out [batch, q_len, q_heads, value_dim], lse fp32 [batch, q_len, q_heads]), in q's framework: torch, numpy or cupy.

    Raises:
        ValueError: tensors that do not fit, as in `mlakit.mla_decode`. NotImplementedError: another framework.
    """
    framework = framework_of(type(q))
    device_type, _, dtype, shape = _ext.describe(q, "q", framework.stream(q))
    if len(shape) != 4:
        raise ValueError(f"q: expected [batch, q_len, q_heads, head_dim], got shape {list(shape)}: reshape it")
    batch, q_len, heads, _ = shape
    if causal and device_type == DEVICES["cpu"]:
        for request, tokens in enumerate(cache_seqlens.tolist()):
            if tokens < q_len - 1:
                raise ValueError(
                    f"cache_seqlens: expected a suffix of at least q_len - 1 = {q_len - 1} tokens, got "
                    f"cache_seqlens[{request}] = {tokens}: end the prefix earlier"
                )
    # Partial results in fp32, so that merging rounds once, as a single decode does.
    out_parts = framework.empty(q, (2, batch * q_len, heads, value_dim), "fp32")
    lse_parts = framework.empty(q, (2, batch * q_len, heads), "fp32")
    if not hasattr(out_parts, "__getitem__"):
        raise NotImplementedError(f"q: decode_shared_prefix takes torch, numpy and cupy arrays, got {type(q).__name__}")
    options: dict[str, Any] = {"value_dim": value_dim, "softmax_scale": softmax_scale, "context": context}
    mla_decode(
        q.reshape(batch * q_len, heads, shape[3]),
        kv_cache,
        prefix_table,
        prefix_seqlens,
        cu_seqlens_q=cu_group_tokens,
        out=out_parts[0],
        lse=lse_parts[0],
        **options,
    )
    suffix_out = out_parts[1].reshape(batch, q_len, heads, value_dim)
    suffix_lse = lse_parts[1].reshape(batch, q_len, heads)
    mla_decode(q, kv_cache, block_table, cache_seqlens, causal=causal, out=suffix_out, lse=suffix_lse, **options)
    out = framework.empty(q, (batch * q_len, heads, value_dim), _DTYPE_NAMES[dtype])
    out, lse = merge_states(out_parts, lse_parts, out=out, context=context)
    return out.reshape(batch, q_len, heads, value_dim), lse.reshape(batch, q_len, heads)
