"""Context parallel: ranks that share the keys give, merged, attention over all keys under the whole causal mask."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch

import mlakit
from mlakit import testing
from mlakit.compat.flash_attn import flash_attn_varlen_func

BACKENDS = [b.name for b in mlakit.backends() if b.device == "cpu" and b.available]
LENGTHS = [130, 0, 1, 2, 300, 67]
LATENT = 512


def shard_of(inputs: testing.Inputs, world: int, rank: int, turn: int = 1) -> dict[str, torch.Tensor]:
    """The rank's own cache: its keys in pages of its own, NaN in every other slot, and its lengths."""
    page_size, width = inputs.kv_cache.shape[1], inputs.block_table.shape[1]
    lengths = inputs.cache_seqlens.tolist()
    table, local, pages = [], [], []
    for row, length in zip(inputs.block_table.tolist(), lengths, strict=True):
        keys = [inputs.kv_cache[row[j // page_size], j % page_size] for j in range(length) if j // turn % world == rank]
        ids = []
        for first in range(0, len(keys), page_size):
            page = torch.full_like(inputs.kv_cache[0], float("nan"))
            page[: len(keys[first : first + page_size])] = torch.stack(keys[first : first + page_size])
            ids.append(len(pages))
            pages.append(page)
        table.append(ids + [-3] * (width - len(ids)))
        local.append(len(keys))
    cache = torch.stack(pages) if pages else inputs.kv_cache[:0]
    return {
        "kv_cache": cache,
        "block_table": torch.tensor(table, dtype=torch.int32),
        "cache_seqlens": torch.tensor(local, dtype=torch.int32),
    }


def decode_shards(
    inputs: testing.Inputs, world: int, *, causal: bool, turn: int = 1, device: str = "cpu", **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank's decode, merged."""
    outs, lses = [], []
    for rank in range(world):
        out = torch.full((*inputs.q.shape[:-1], LATENT), float("nan"), dtype=torch.float32, device=device)
        if causal and world > 1:
            options["global_seqlens"] = inputs.cache_seqlens.to(device)
        _, lse = mlakit.mla_decode(
            *(x.to(device) for x in (inputs.q, *shard_of(inputs, world, rank, turn).values())),
            causal=causal,
            out=out,
            cp_world=world,
            cp_rank=rank,
            cp_turn=turn,
            **options,
        )
        outs.append(out.flatten(0, -3))
        lses.append(lse.flatten(0, -2))
    out, lse = mlakit.merge_states(torch.stack(outs), torch.stack(lses))
    return out.reshape(*inputs.q.shape[:-1], LATENT).to("cpu", inputs.q.dtype), lse.reshape(inputs.q.shape[:-1]).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
# One by one, in turns, in whole pages, and each rank with a chunk of the request (the last rank with none).
@pytest.mark.parametrize(("world", "turn"), [(1, 1), (2, 1), (8, 1), (3, 2), (2, 64), (3, 150)])
@pytest.mark.parametrize(("q_len", "causal"), [(1, True), (4, True), (2, False)])
def test_merged_shards_equal_the_whole(world: int, turn: int, q_len: int, causal: bool, backend: str) -> None:
    """Lengths shorter than world leave ranks without keys; q_len over the length leaves rows without keys."""
    case = cases.dense_case(LENGTHS, q_len=q_len, q_heads=4, causal=causal)
    inputs = cases.inputs_of(case)
    context = mlakit.Context(backend, num_threads=1)
    out, lse = decode_shards(inputs, world, causal=causal, turn=turn, softmax_scale=cases.SCALE, context=context)
    cases.check(case, inputs, out, lse)


@pytest.mark.gpu
@pytest.mark.skipif(bool(cases.no_gpu()), reason=cases.no_gpu() or "a GPU is there")
@pytest.mark.parametrize(("world", "turn"), [(1, 1), (2, 1), (8, 1), (3, 2), (2, 64), (3, 150)])
@pytest.mark.parametrize(("q_len", "q_heads", "causal"), [(1, 4, True), (4, 4, True), (3, 64, True), (2, 4, False)])
def test_merged_shards_equal_the_whole_on_the_gpu(world: int, turn: int, q_len: int, q_heads: int, causal: bool) -> None:
    case = cases.dense_case(LENGTHS, q_len=q_len, q_heads=q_heads, causal=causal)
    inputs = cases.inputs_of(case)
    out, lse = decode_shards(inputs, world, causal=causal, turn=turn, device="cuda", softmax_scale=cases.SCALE)
    cases.check(case, inputs, out, lse)


@pytest.mark.parametrize(("split", "turn"), [("balanced", 1), ("fixed_chunk", 7)])
def test_ragged_shards_over_many_rows_and_parts(split: str, turn: int) -> None:
    """Enough rows for several row tiles and enough keys for several parts: each has its own place under the mask."""
    case = testing.mla_case(
        [2000, 3, 900], f"ragged:causal:scale{float(torch.tensor(cases.SCALE)):.9g}", q_len=40, q_lens=(40, 5, 1)
    )
    inputs = cases.inputs_of(case)
    options: dict[str, Any] = {"chunk_tokens": 128} if split == "fixed_chunk" else {}
    out, lse = decode_shards(
        inputs, 3, turn=turn, causal=True, softmax_scale=cases.SCALE, cu_seqlens_q=inputs.cu_seqlens_q, split=split, **options
    )
    cases.check(case, inputs, out, lse)


def test_vllms_context_parallel_call() -> None:
    case = testing.mla_case([100, 2, 65], f"ragged:causal:scale{float(torch.tensor(cases.SCALE)):.9g}", q_len=5, q_lens=(1, 3, 5))
    inputs = cases.inputs_of(case)
    world, parts = 2, []
    for rank in range(world):
        shard = shard_of(inputs, world, rank)
        parts.append(
            flash_attn_varlen_func(
                q=inputs.q[..., LATENT:],
                k=shard["kv_cache"][..., LATENT:],
                v=shard["kv_cache"][..., :LATENT],
                q_v=inputs.q[..., :LATENT],
                max_seqlen_q=5,
                cu_seqlens_q=inputs.cu_seqlens_q,
                max_seqlen_k=50,
                seqused_k=shard["cache_seqlens"],
                block_table=shard["block_table"],
                softmax_scale=cases.SCALE,
                causal=True,
                return_softmax_lse=True,
                fa_version=3,
                out=torch.empty(9, 16, LATENT),
                cp_world_size=world,
                cp_rank=rank,
                cp_tot_seqused_k=inputs.cache_seqlens,
            )
        )
    out, lse = mlakit.merge_states(torch.stack([out for out, _ in parts]), torch.stack([lse.T for _, lse in parts]))
    cases.check(case, inputs, out.to(torch.bfloat16), lse)


def test_lengths_that_are_not_the_ranks_share_are_refused() -> None:
    case = cases.dense_case([130, 7])
    inputs = cases.inputs_of(case)
    shard = shard_of(inputs, 4, 1)
    call = (inputs.q, *shard.values())
    options: dict[str, Any] = {"causal": True, "cp_world": 4, "cp_rank": 1}
    with pytest.raises(ValueError, match=r"^global_seqlens: must be given as \[batch\], got NULL"):
        mlakit.mla_decode(*call, **options)
    wrong = inputs.cache_seqlens + torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"^global_seqlens: rank 1 of 4 must have 3 of the 11 tokens of request 1, got cache_seqlens\[1\] = 2"
    ):
        mlakit.mla_decode(*call, **options, global_seqlens=wrong)
    with pytest.raises(ValueError, match=r"^global_seqlens: must be NULL unless the problem is causal with cp_world > 1"):
        mlakit.mla_decode(*call, global_seqlens=inputs.cache_seqlens)
    with pytest.raises(ValueError, match="cp_rank"):
        mlakit.mla_decode(*call, causal=True, cp_world=4, cp_rank=4, global_seqlens=inputs.cache_seqlens)
