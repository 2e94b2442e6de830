"""MLA decode and merge in float64 on numpy: plain loops that define what is right. Slow, and meant to stay so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

LN2 = 0.6931471805599453094


@dataclasses.dataclass(frozen=True)
class Group:
    """The query rows of one request that read one kv head, with that request's keys, in float64.

    `index` picks these rows from q and out (all but the last axis); `visible[t, j]` says whether query token t sees key j.
    """

    index: tuple[Any, ...]
    q: Any
    """[q_tokens, heads of the group, head_dim]"""
    keys: Any
    """[len, head_dim]"""
    visible: Any
    """bool [q_tokens, len]"""


def mla_decode_reference(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    value_dim: int = 512,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens_q: Any = None,
    sink: Any = None,
    lse_base: str = "e",
    q_rope: Any = None,
    kv_rope: Any = None,
) -> tuple[Any, Any]:
    """What `mlakit.mla_decode` computes, in float64 and without its speed. Nothing is checked.

    Args:
        q, kv_cache, block_table, cache_seqlens, value_dim, causal, softmax_scale, cu_seqlens_q, sink, lse_base, q_rope: as in
            `mlakit.mla_decode`: numpy (bf16 as ml_dtypes' type or as its uint16 bits) or torch.
        kv_rope: the last head_dim - value_dim columns of the cache, when kv_cache holds the first value_dim only.

    Returns:
        (out, lse) as float64 numpy arrays, out [..., q_heads, value_dim], lse [..., q_heads].
    """
    import numpy as np

    rows = tuple(q.shape)[:-1]
    out, lse = np.zeros((*rows, value_dim)), np.full(rows, -np.inf)
    sinks = None if sink is None else float64(sink)
    with np.errstate(all="ignore"):
        for group in groups(q, kv_cache, block_table, cache_seqlens, causal, cu_seqlens_q, q_rope, kv_rope):
            scale = group.q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
            scores = scale * (group.q @ group.keys.T)  # [q_tokens, heads, len]
            weights, lse[group.index] = softmax(scores, group.visible[:, None, :])
            heads = group.index[-1]
            out[group.index] = weighted_sum(weights, group.keys[:, :value_dim], group.visible)
            if sinks is not None:
                out[group.index] *= sink_factor(lse[group.index], sinks[heads])[..., None]
    return out, lse if lse_base == "e" else lse / LN2


def merge_states_reference(out_parts: Any, lse_parts: Any, *, lse_base: str = "e") -> tuple[Any, Any]:
    """What `mlakit.merge_states` computes, in float64: out_parts [parts, ..., dim] and lse_parts [parts, ...] -> (out, lse)."""
    import numpy as np

    outs, lses = float64(out_parts), float64(lse_parts) * (1.0 if lse_base == "e" else LN2)
    with np.errstate(all="ignore"):
        weights, lse = softmax(np.moveaxis(lses, 0, -1), np.array(True))
        out = np.where(weights[..., None] == 0, 0.0, weights[..., None] * np.moveaxis(outs, 0, -2)).sum(-2)
    return out, lse if lse_base == "e" else lse / LN2


def groups(
    q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, causal: bool, cu_seqlens_q: Any, q_rope: Any, kv_rope: Any
) -> Iterator[Group]:
    """The groups of a call that have rows and keys; all other rows are empty."""
    import numpy as np

    queries, kv = _joined(q, q_rope), to_numpy(kv_cache)
    rope = None if kv_rope is None else to_numpy(kv_rope)
    table, lengths = to_numpy(block_table), [int(n) for n in to_numpy(cache_seqlens)]
    page_size, kv_heads = kv.shape[1], kv.shape[2]
    heads_per_kv_head = queries.shape[-2] // kv_heads
    begins = None if cu_seqlens_q is None else [int(n) for n in to_numpy(cu_seqlens_q)]
    for b, length in enumerate(lengths):
        tokens: Any = (b,) if begins is None else (slice(begins[b], begins[b + 1]),)
        request = queries[tokens]
        q_tokens = request.shape[0]
        if length == 0 or q_tokens == 0:
            continue
        position = np.arange(length)
        pages, slots = table[b, position // page_size], position % page_size
        limit = length - q_tokens + 1 + np.arange(q_tokens) if causal else np.full(q_tokens, length)
        visible = position[None, :] < limit[:, None]
        for head in range(kv_heads):
            keys = float64(kv[pages, slots, head])
            if rope is not None:
                keys = np.concatenate([keys, float64(rope[pages, slots, head])], axis=-1)
            heads = slice(head * heads_per_kv_head, (head + 1) * heads_per_kv_head)
            index = (b, slice(None), heads) if begins is None else (tokens[0], heads)
            yield Group(index, request[:, heads], keys, visible)


def softmax(scores: Any, visible: Any) -> tuple[Any, Any]:
    """(weights, log of their denominator) over the last axis; a row whose denominator is 0 has weights 0 and -inf."""
    import numpy as np

    scores = np.where(visible, scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    exps = np.where(scores == -np.inf, 0.0, np.exp(scores - largest))
    total = exps.sum(-1, keepdims=True)
    is_empty = total == 0
    lse = np.where(is_empty, -np.inf, largest + np.log(np.where(is_empty, 1.0, total)))
    return exps / np.where(is_empty, 1.0, total), lse[..., 0]


def weighted_sum(weights: Any, values: Any, visible: Any) -> Any:
    """weights [q_tokens, heads, len] times values [len, dim]; a key that a token does not see adds nothing, whatever it holds."""
    import numpy as np

    if visible.all() or np.isfinite(values).all():
        return weights @ values
    return np.stack([weights[t][:, seen] @ values[seen] for t, seen in enumerate(visible)])


def sink_factor(lse: Any, sink: Any) -> Any:
    """What the sink makes of out: sum / (sum + exp(sink)); 1 for an empty row, whose out is 0."""
    import numpy as np

    return np.where(lse == -np.inf, 1.0, 1.0 / (1.0 + np.exp(sink - lse)))


def float64(array: Any) -> Any:
    """A numpy or torch array as float64; uint16 stands for the bits of bf16."""
    import numpy as np

    array = to_numpy(array)
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def to_numpy(array: Any) -> Any:
    """A torch or cupy array as a numpy one, as float64 if it is a float that numpy may not know."""
    import numpy as np

    if hasattr(array, "detach"):
        array = array.detach().cpu()
        return (array if array.element_size() >= 4 else array.double()).numpy()
    return array.get() if hasattr(array, "get") else np.asarray(array)


def _joined(array: Any, rope: Any) -> Any:
    import numpy as np

    return float64(array) if rope is None else np.concatenate([float64(array), float64(rope)], axis=-1)
