"""FlashMLA's Python functions for dense caches, with every argument order that its releases and forks have had.

    from mlakit.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata

What differs from FlashMLA, on purpose:
- A schedule is never stale. It is built inside each call, on the device, from the cache_seqlens of that call; what
  `get_mla_metadata` returns holds none. So the object or the tensors may be kept for as long as one likes, copied into the
  buffers of a CUDA graph, and replayed with other lengths.
- Any page size, any number of heads, strided `out=`, the attention sink with dense caches.
- A NaN in a visible key gives lse NaN, not +inf. A row that a causal mask leaves without keys is an empty row: out 0, lse +inf.
- bf16 and fp16 caches only (fp32 too on the CPU). FP8 and sparse arguments are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from .. import mla_decode
from ._refuse import refuse_given

# FlashMLA's layout of its schedule: 8 numbers for each part. Engines size their own buffers by it.
_METADATA_COLUMNS = 8
_FLASH_MLA_BLOCK = 64
_CPU_PARTS = 2


class SchedConfig(NamedTuple):
    """The call that a FlashMLASchedMeta has last been used for, by FlashMLA's field names."""

    b: int
    s_q: int
    h_q: int
    page_block_size: int
    h_k: int
    causal: bool
    is_fp8_kvcache: bool
    topk: int | None
    extra_page_block_size: int | None
    extra_topk: int | None


class FlashMLASchedMeta:
    """FlashMLA's schedule handle. It stands for a tensor too: `buffer.copy_(meta)`, `meta.shape`, `meta[0]` reach
    `tile_scheduler_metadata`, so that engines which unpack and copy two int32 tensors work as they are.
    """

    Config = SchedConfig

    def __init__(self) -> None:
        self.have_initialized = False
        self.config: SchedConfig | None = None
        self.tile_scheduler_metadata: torch.Tensor | None = None
        self.num_splits: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"FlashMLASchedMeta(have_initialized={self.have_initialized}, config={self.config})"

    def _tensor(self) -> torch.Tensor:
        if self.tile_scheduler_metadata is None:
            raise ValueError(
                "get_mla_metadata(): called without cache_seqlens it gives no tensors before the first flash_mla_with_kvcache: "
                "call get_mla_metadata(cache_seqlens, q_len * q_heads // kv_heads, kv_heads)"
            )
        return self.tile_scheduler_metadata

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, FlashMLASchedMeta):
                return value._tensor()
            return type(value)(map(plain, value)) if type(value) in (tuple, list) else value

        return function(*plain(tuple(args)), **{name: plain(value) for name, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self.tile_scheduler_metadata is None:
            raise AttributeError(f"{name}: neither a field of FlashMLASchedMeta nor of a tensor that it has")
        return getattr(self.tile_scheduler_metadata, name)

    def __getitem__(self, index: Any) -> Any:
        return self._tensor()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._tensor()[index] = value

    def __len__(self) -> int:
        return len(self._tensor())

    def __bool__(self) -> bool:
        return True


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[FlashMLASchedMeta, torch.Tensor | None]:
    """FlashMLA's planning call, in all its forms.

    get_mla_metadata(): (meta, None); meta's tensors appear with its first use, as upstream.
    get_mla_metadata(cache_seqlens, q_len * q_heads // kv_heads, kv_heads): (meta, num_splits), where meta stands for an int32
    tensor [parts, 8], num_splits is int32 [batch + 1], and parts is at most the number of SMs and does not depend on the batch.

    Raises:
        NotImplementedError: is_fp8_kvcache or topk is set.
    """
    refuse_given("get_mla_metadata", "bf16 and fp16 dense caches only", is_fp8_kvcache=is_fp8_kvcache, topk=topk)
    meta = FlashMLASchedMeta()
    if cache_seqlens is None:
        return meta, None
    if num_q_tokens_per_head_k is None or num_heads_k is None:
        raise TypeError(
            "num_q_tokens_per_head_k and num_heads_k: expected numbers with cache_seqlens, got "
            f"{num_q_tokens_per_head_k} and {num_heads_k}"
        )
    if cache_seqlens.dtype != torch.int32 or cache_seqlens.dim() != 1:
        raise ValueError(
            f"cache_seqlens: expected int32 [batch], got {cache_seqlens.dtype} of shape {list(cache_seqlens.shape)}: convert it"
        )
    _attach_tensors(meta, cache_seqlens, num_q_tokens_per_head_k, num_heads_k)
    return meta, meta.num_splits


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *rest: Any,
    out: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a paged cache, by FlashMLA's call.

    Args:
        q: [b, s_q, h_q, head_dim].
        k_cache: [blocks, page_block_size, h_k, head_dim].
        block_table: int32 [b, blocks of a request]; entries after the last used one may be anything.
        cache_seqlens: int32 [b]; 0 allowed.
        head_dim_v: width of out.
        tile_scheduler_metadata: what `get_mla_metadata` gave, or a copy of it. A tensor of one row, which engines write for their
            batch-invariant mode, asks for results whose bits depend on a row's own request only.
        num_splits: None, or what `get_mla_metadata` gave second.
        softmax_scale: None: head_dim ** -0.5.
        causal: bottom-right.
        rest, keywords: FlashMLA's further arguments by position or name: attn_sink (fp32 [h_q]) is taken, the others only as
            None or False. By position FlashMLA continues with is_fp8_kvcache, SGLang's fork with descale_q, descale_k,
            is_fp8_kvcache.
        out: written in place, any strides with a contiguous last dimension; None: a new contiguous tensor.

    Returns:
        (out [b, s_q, h_q, head_dim_v] of q's type, lse fp32 [b, h_q, s_q], natural logarithm, +inf for a row without keys).

    Raises:
        NotImplementedError: an argument for FP8 or sparse caches. ValueError: tensors that do not fit; the message names them.
    """
    sink = _further_arguments(rest, keywords)
    if block_table is None or cache_seqlens is None:
        name = "block_table" if block_table is None else "cache_seqlens"
        raise ValueError(f"{name}: expected an int32 tensor for a dense cache, got None")
    if not isinstance(tile_scheduler_metadata, (FlashMLASchedMeta, torch.Tensor)):
        raise TypeError(
            "tile_scheduler_metadata: expected what get_mla_metadata returns, or an int32 tensor copied from it, got "
            f"{type(tile_scheduler_metadata).__name__}"
        )
    if num_splits is not None and (num_splits.dtype != torch.int32 or num_splits.dim() != 1):
        raise ValueError(f"num_splits: expected None or int32 [batch + 1], got {num_splits.dtype} {list(num_splits.shape)}")
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        meta_rows = tile_scheduler_metadata.tile_scheduler_metadata
        _record_use(tile_scheduler_metadata, q, k_cache, cache_seqlens, causal)
    else:
        meta_rows = tile_scheduler_metadata
    is_one_part = meta_rows is not None and meta_rows.dim() == 2 and meta_rows.shape[0] == 1

    b, s_q, h_q, _ = q.shape
    lse = torch.empty((b, h_q, s_q), dtype=torch.float32, device=q.device)
    out, _ = _decode()(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        value_dim=head_dim_v,
        causal=bool(causal),
        softmax_scale=softmax_scale,
        sink=sink,
        out=torch.empty((b, s_q, h_q, head_dim_v), dtype=q.dtype, device=q.device) if out is None else out,
        lse=lse.transpose(1, 2),
        split="fixed_chunk" if is_one_part else "balanced",
    )
    # FlashMLA's mark of an empty row. One operation, with NaN kept.
    return out, torch.nan_to_num_(lse, nan=float("nan"), posinf=float("inf"), neginf=float("inf"))


def flash_mla_sparse_fwd(*arguments: Any, **keywords: Any) -> NoReturn:
    """Refused: there is no sparse kernel. Here so that an engine's import line works."""
    raise NotImplementedError("flash_mla_sparse_fwd: mlakit has no sparse attention; dense decode is flash_mla_with_kvcache")


def flash_mla_with_kvcache_fp8(*arguments: Any, **keywords: Any) -> NoReturn:
    """Refused: there is no FP8 kernel. Here so that an engine's import line works."""
    raise NotImplementedError("flash_mla_with_kvcache_fp8: mlakit takes no FP8 cache; use bf16 and flash_mla_with_kvcache")


def get_mla_metadata_dense_fp8(*arguments: Any, **keywords: Any) -> NoReturn:
    """Refused: there is no FP8 kernel. Here so that an engine's import line works."""
    raise NotImplementedError("get_mla_metadata_dense_fp8: mlakit takes no FP8 cache; use bf16 and get_mla_metadata")


_UPSTREAM_ORDER = (
    *("is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length"),
)
_SGLANG_ORDER = ("descale_q", "descale_k", *_UPSTREAM_ORDER, "kv_format")


def _further_arguments(rest: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor | None:
    """Sorts the arguments after causal by name, refuses what there is no kernel for, and returns the sink."""
    # The two orders differ in their first argument: a bool in FlashMLA, a tensor or None in SGLang's fork.
    order = _UPSTREAM_ORDER if rest and isinstance(rest[0], bool) else _SGLANG_ORDER
    if len(rest) > len(order):
        raise TypeError(f"flash_mla_with_kvcache: at most {9 + len(order)} positional arguments, got {9 + len(rest)}")
    given = dict(zip(order, rest, strict=False))
    for name, value in keywords.items():
        if name not in _SGLANG_ORDER:
            raise TypeError(f"flash_mla_with_kvcache: unknown argument {name!r}")
        if name in given:
            raise TypeError(f"flash_mla_with_kvcache: {name} is given twice, by position and by name")
        given[name] = value
    sink: torch.Tensor | None = given.pop("attn_sink", None)
    refuse_given("flash_mla_with_kvcache", "bf16 and fp16 dense caches only", **given)
    return sink


def _decode() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The plain call, or its torch operator while torch.compile traces."""
    if torch.compiler.is_compiling():
        from .. import torch_ops

        return torch_ops.mla_decode
    return mla_decode


def _record_use(
    meta: FlashMLASchedMeta, q: torch.Tensor, k_cache: torch.Tensor, cache_seqlens: torch.Tensor, causal: bool
) -> None:
    b, s_q, h_q, _ = q.shape
    _, page_size, h_k, _ = k_cache.shape
    meta.config = SchedConfig(b, s_q, h_q, page_size, h_k, bool(causal), False, None, None, None)
    if meta.tile_scheduler_metadata is None:
        _attach_tensors(meta, cache_seqlens, s_q * h_q // h_k, h_k)
    meta.have_initialized = True


def _attach_tensors(meta: FlashMLASchedMeta, cache_seqlens: torch.Tensor, rows: int, kv_heads: int) -> None:
    """Tensors of FlashMLA's shapes. Their content means nothing to mlakit; two parts at least, since one part has a meaning."""
    parts = _CPU_PARTS
    if cache_seqlens.is_cuda:
        tiles = -(-rows // _FLASH_MLA_BLOCK)
        processors = torch.cuda.get_device_properties(cache_seqlens.device).multi_processor_count
        parts = max(processors // kv_heads // tiles, _CPU_PARTS)
    meta.tile_scheduler_metadata = cache_seqlens.new_zeros((parts, _METADATA_COLUMNS))
    meta.num_splits = cache_seqlens.new_zeros(cache_seqlens.shape[0] + 1)
