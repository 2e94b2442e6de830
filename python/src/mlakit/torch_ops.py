"""mlakit as torch.library operators, for torch.compile and torch.export: `import mlakit.torch_ops`, then use its functions.

The functions have the signatures of `mlakit.mla_decode` and `mlakit.merge_states` and run the same kernels; the operators behind
them are `torch.ops.mlakit.{decode, decode_into, merge_states}`. Outside of compiled code the plain functions cost less for each
call.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _decode
from ._torch import DTYPES, Torch

_torch_library: Any = torch.library  # has no types
_LIBRARY = _torch_library.Library("mlakit", "DEF")

_INPUTS = """
    Tensor q, Tensor? q_rope, Tensor kv_cache, Tensor? kv_rope, Tensor block_table, Tensor cache_seqlens, Tensor? cu_seqlens_q,
    Tensor? sink, Tensor? global_seqlens, int value_dim, bool causal, float? softmax_scale, str lse_base, str split,
    int chunk_tokens, int cp_world, int cp_rank, int cp_turn
"""
_STRIDES_MATTER = (torch.Tag.needs_fixed_stride_order,)

_LIBRARY.define(f"decode({_INPUTS}) -> (Tensor out, Tensor lse)", tags=_STRIDES_MATTER)
# By position: Dynamo takes a keyword of the name out for torch's own convention, which refuses strided tensors.
_LIBRARY.define(f"decode_into(Tensor(a!) out, Tensor(b!) lse, {_INPUTS}) -> ()", tags=_STRIDES_MATTER)
_LIBRARY.define("merge_states(Tensor out_parts, Tensor lse_parts, str lse_base) -> (Tensor out, Tensor lse)")


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    value_dim: int = 512,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: str = "e",
    split: str = "balanced",
    chunk_tokens: int = 0,
    cp_world: int = 1,
    cp_rank: int = 0,
    cp_turn: int = 0,
    global_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mlakit.mla_decode` as an operator that torch.compile does not look into."""
    cache, rope = kv_cache if isinstance(kv_cache, tuple) else (kv_cache, None)
    inputs = (q, q_rope, cache, rope, block_table, cache_seqlens, cu_seqlens_q, sink, global_seqlens)
    options = (value_dim, causal, softmax_scale, lse_base, split, chunk_tokens, cp_world, cp_rank, cp_turn)
    if out is None and lse is None:
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.mlakit.decode(*inputs, *options)
        return result
    if out is None:
        out = q.new_empty((*q.shape[:-1], value_dim))
    if lse is None:
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    torch.ops.mlakit.decode_into(out, lse, *inputs, *options)
    return out, lse


def merge_states(out_parts: torch.Tensor, lse_parts: torch.Tensor, *, lse_base: str = "e") -> tuple[torch.Tensor, torch.Tensor]:
    """`mlakit.merge_states` as an operator."""
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.mlakit.merge_states(out_parts, lse_parts, lse_base)
    return result


def _run(inputs: tuple[Any, ...], out: torch.Tensor | None, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    q, q_rope, cache, rope, table, seqlens, cu_seqlens_q, sink, global_seqlens = inputs[:9]
    value_dim, causal, scale, lse_base, split, chunk_tokens, cp_world, cp_rank, cp_turn = inputs[9:]
    return _decode.mla_decode(
        q,
        cache if rope is None else (cache, rope),
        table,
        seqlens,
        value_dim=value_dim,
        causal=causal,
        softmax_scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        q_rope=q_rope,
        sink=sink,
        out=out,
        lse=lse,
        lse_base=lse_base,
        split=split,
        chunk_tokens=chunk_tokens,
        cp_world=cp_world,
        cp_rank=cp_rank,
        cp_turn=cp_turn,
        global_seqlens=global_seqlens,
    )


def _decode_kernel(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(inputs, None, None)


def _decode_into_kernel(out: torch.Tensor, lse: torch.Tensor, *inputs: Any) -> None:
    _run(inputs, out, lse)


def _merge_kernel(out_parts: torch.Tensor, lse_parts: torch.Tensor, lse_base: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _decode.merge_states(out_parts, lse_parts, lse_base=lse_base)  # type: ignore[arg-type]


def _decode_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, value_dim = inputs[0], inputs[9]
    return q.new_empty((*q.shape[:-1], value_dim)), q.new_empty(q.shape[:-1], dtype=DTYPES["fp32"])


def _decode_into_fake(*arguments: Any) -> None:
    return None


def _merge_fake(out_parts: torch.Tensor, lse_parts: torch.Tensor, lse_base: str) -> tuple[torch.Tensor, torch.Tensor]:
    return out_parts.new_empty(out_parts.shape[1:]), lse_parts.new_empty(lse_parts.shape[1:])


def _refuse_autograd(name: str) -> Any:
    """The operator's autograd kernel: an error at the call rather than a gradient that is missing later."""
    operator = getattr(torch.ops.mlakit, name).default

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        Torch().refuse_gradients(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    return kernel


for _name, _kernel, _fake in (
    ("decode", _decode_kernel, _decode_fake),
    ("decode_into", _decode_into_kernel, _decode_into_fake),
    ("merge_states", _merge_kernel, _merge_fake),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    _LIBRARY.impl(_name, _kernel, "CUDA")
    _LIBRARY.impl(_name, _refuse_autograd(_name), "Autograd", with_keyset=True)
    _torch_library.register_fake(f"mlakit::{_name}", _fake, lib=_LIBRARY)
