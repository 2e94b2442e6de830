"""FlashAttention-3's calls with q_v, its form of MLA: rope in q and k, latent in q_v and v; ragged q; lse [heads, tokens].

    from mlakit.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

k and v may be two tensors or two views of one cache. Hints about scheduling (max_seqlen_k, scheduler_metadata) are taken and
not needed: the schedule is built inside each call from the lengths of that call. num_splits=1, FlashAttention's way to results
that do not depend on the batch, gives those; other values leave the choice to mlakit.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import mla_decode
from ._refuse import refuse_given


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    q_v: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    scheduler_metadata: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    num_splits: int = 0,
    fa_version: int = 3,
    s_aux: torch.Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: torch.Tensor | None = None,
) -> Any:
    """vLLM's call for MLA decode with FlashAttention-3.

    Args:
        q: [tokens, heads, rope_dim]. q_v: [tokens, heads, latent_dim].
        k: [pages, page_size, kv_heads, rope_dim]. v: [pages, page_size, kv_heads, latent_dim].
        cu_seqlens_q: int32 [batch + 1]. seqused_k: int32 [batch]. block_table: int32 [batch, width].
        s_aux: fp32 [heads], the attention sink.
        cp_world_size, cp_rank, cp_tot_seqused_k: context parallel: seqused_k and block_table are this rank's, which holds every
            cp_world_size-th key from key cp_rank on; cp_tot_seqused_k, int32 [batch], counts the keys of all ranks.

    Returns:
        out [tokens, heads, latent_dim], or (out, lse) with lse fp32 [heads, tokens], natural logarithm, -inf for a row without
        keys.
    """
    name = "flash_attn_varlen_func"
    _refuse_features(name, window_size, alibi_slopes, softcap, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    refuse_given(name, "decode over a paged cache only", cu_seqlens_k=cu_seqlens_k, return_attn_probs=return_attn_probs)
    refuse_given(name, "inference only", dropout_p=dropout_p or None)
    if fa_version != 3:
        raise NotImplementedError(f"fa_version: {name} of mlakit takes q_v, which is version 3's, got {fa_version}: pass 3")
    _require(name, q_v=q_v, cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, block_table=block_table)
    shard: dict[str, Any] = {}
    if cp_world_size > 1:
        shard = {"cp_world": cp_world_size, "cp_rank": cp_rank}
        if causal:
            _require(name, cp_tot_seqused_k=cp_tot_seqused_k)
            shard["global_seqlens"] = cp_tot_seqused_k
    return _attend(
        *((q, q_v), (k, v), block_table, seqused_k),
        num_splits=num_splits,
        return_lse=return_softmax_lse,
        causal=causal,
        softmax_scale=softmax_scale,
        cu_seqlens_q=cu_seqlens_q,
        sink=s_aux,
        out=out,
        **shard,
    )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    *,
    cache_seqlens: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = None,
    softcap: float = 0.0,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    sinks: torch.Tensor | None = None,
) -> Any:
    """SGLang's call: as `flash_attn_varlen_func`, with FlashAttention's other names.

    Nothing is appended: k and v must be None, and cu_seqlens_k_new, which belongs to them, then says nothing.
    """
    name = "flash_attn_with_kvcache"
    _refuse_features(name, window_size, None, softcap, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    refuse_given(name, "it appends nothing to the cache", k=k, v=v)
    _require(name, qv=qv, cache_seqlens=cache_seqlens, page_table=page_table)
    return _attend(
        *((q, qv), (k_cache, v_cache), page_table, cache_seqlens),
        num_splits=num_splits,
        return_lse=return_softmax_lse,
        causal=causal,
        softmax_scale=softmax_scale,
        cu_seqlens_q=cu_seqlens_q,
        sink=sinks,
    )


def _require(function: str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            raise ValueError(f"{name}: {function} of mlakit expects a tensor, got None")


def _refuse_features(function: str, window_size: Any, alibi_slopes: Any, softcap: float, **descales: Any) -> None:
    refuse_given(function, "bf16 and fp16 caches only", **descales)
    has_window = window_size is not None and tuple(window_size) != (-1, -1)
    refuse_given(function, "every row sees all keys before it", window_size=window_size if has_window else None)
    refuse_given(function, "plain softmax only", alibi_slopes=alibi_slopes, softcap=softcap or None)


def _attend(
    q: tuple[torch.Tensor, Any],
    cache: tuple[torch.Tensor, torch.Tensor],
    *call: Any,
    num_splits: int,
    return_lse: bool,
    **options: Any,
) -> Any:
    """q and cache: (rope, latent)."""
    # Heads before tokens in memory: [heads, tokens], or [batch, heads, q_len] without cu_seqlens_q.
    *lead, tokens, heads = q[1].shape[:-1]
    lse = torch.empty((*lead, heads, tokens), dtype=torch.float32, device=q[1].device)
    out, _ = mla_decode(
        q[1],
        (cache[1], cache[0]),
        *call,
        value_dim=q[1].shape[-1],
        q_rope=q[0],
        lse=lse.transpose(-1, -2),
        split="fixed_chunk" if num_splits == 1 else "balanced",
        **options,
    )
    return (out, lse) if return_lse else out
