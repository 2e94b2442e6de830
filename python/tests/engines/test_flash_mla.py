"""mlakit.compat.flash_mla as vLLM and SGLang call it: the call sequences of their dense backends, argument by argument."""

from __future__ import annotations

import inspect
from typing import Any

import cases
import pytest
import torch

from mlakit.compat import flash_mla
from mlakit.compat.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata

LENGTHS = [130, 0, 1000, 64, 65]
INF = float("inf")
LATENT = 512

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(bool(cases.no_gpu()), reason=cases.no_gpu() or "a GPU is there")
DEVICES = ["cpu", pytest.param("cuda", marks=(gpu, needs_gpu))]


def vllm_dense_step(inputs: Any, lengths: torch.Tensor, *, layers: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What vLLM's dense backend does in a step: one plan, then one call for each layer with the lazy object."""
    q_len, heads = inputs.q.shape[1:3]
    scheduler_metadata, _ = get_mla_metadata(lengths, q_len * heads // 1, 1, is_fp8_kvcache=False)
    kv_c_and_k_pe_cache = inputs.kv_cache.squeeze(2)  # vLLM's cache: [blocks, 64, 576]
    return [
        flash_mla_with_kvcache(
            q=inputs.q,
            k_cache=kv_c_and_k_pe_cache.unsqueeze(-2),
            block_table=inputs.block_table,
            cache_seqlens=lengths,
            head_dim_v=LATENT,
            tile_scheduler_metadata=scheduler_metadata,
            num_splits=None,
            softmax_scale=cases.SCALE,
            causal=True,
            is_fp8_kvcache=False,
        )
        for _ in range(layers)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("q_heads", [16, 128])
def test_vllm_dense(device: str, q_len: int, q_heads: int) -> None:
    case = cases.dense_case(LENGTHS, q_len=q_len, q_heads=q_heads)
    inputs = cases.inputs_of(case, device=device)
    for out, lse in vllm_dense_step(inputs, inputs.cache_seqlens):
        assert lse.shape == (len(LENGTHS), q_heads, q_len)
        assert lse.dtype == torch.float32
        assert lse.is_contiguous()
        assert out.is_contiguous()
        cases.check(case, inputs, out, lse.transpose(1, 2), empty_lse=INF)


@gpu
@needs_gpu
@pytest.mark.parametrize("q_len", [1, 2])
def test_vllm_dense_in_a_graph_reads_lengths_at_replay(q_len: int) -> None:
    """The lazy object is made inside the capture; replays see other lengths, tables and queries."""
    case = cases.dense_case([64] * 5, q_len=q_len)
    static = cases.inputs_of(case, device="cuda")
    width = 40
    static.block_table = torch.full((5, width), -1, dtype=torch.int32, device="cuda")
    static.kv_cache = torch.full((256, 64, 1, 576), float("nan"), dtype=torch.bfloat16, device="cuda")
    static.cache_seqlens = torch.zeros(5, dtype=torch.int32, device="cuda")
    vllm_dense_step(static, static.cache_seqlens)  # engines warm up first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = vllm_dense_step(static, static.cache_seqlens)
    for seed, lengths in enumerate(([130, 0, 1000, 64, 65], [2000, 1, 0, 0, 7], [0, 0, 0, 0, 0])):
        case = cases.dense_case(lengths, q_len=q_len, seed=seed)
        inputs = cases.inputs_of(case, device="cuda", table_tail=-1)
        static.q.copy_(inputs.q)
        static.cache_seqlens.copy_(inputs.cache_seqlens)
        static.block_table.fill_(-1)
        static.block_table[:, : inputs.block_table.shape[1]].copy_(inputs.block_table)
        static.kv_cache.fill_(float("nan"))
        static.kv_cache[: inputs.kv_cache.shape[0]].copy_(inputs.kv_cache)
        for out, lse in results:
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for out, lse in results:
            cases.check(case, inputs, out, lse.transpose(1, 2), empty_lse=INF)


class SglangBuffers:
    """SGLang's graph state: metadata tensors made once for the largest batch, refilled before each replay."""

    def __init__(self, max_batch: int, rows: int, device: str) -> None:
        ones = torch.ones(max_batch, dtype=torch.int32, device=device)
        self.metadata, self.num_splits = get_mla_metadata(ones, rows, 1)

    def fill(self, seq_lens: torch.Tensor, rows: int) -> tuple[Any, torch.Tensor]:
        metadata, num_splits = get_mla_metadata(seq_lens.to(torch.int32), rows, 1)
        assert num_splits is not None
        self.metadata.copy_(metadata)
        self.num_splits[: len(seq_lens) + 1].copy_(num_splits)
        return self.metadata, self.num_splits[: len(seq_lens) + 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draft_tokens", [1, 2])
def test_sglang_dense_with_its_own_buffers(device: str, draft_tokens: int) -> None:
    """One set of buffers serves batch after batch: what is in them is never the schedule of another batch."""
    heads = 16
    buffers = SglangBuffers(8, draft_tokens * heads, device)
    for seed, lengths in enumerate((LENGTHS, [3, 700], [900, 0, 0, 1, 1, 64, 128, 5])):
        case = cases.dense_case(lengths, q_len=draft_tokens, seed=seed)
        inputs = cases.inputs_of(case, device=device, table_tail=-1)
        seq_lens = inputs.cache_seqlens.to(torch.int64) - draft_tokens  # before the draft tokens were appended
        metadata, num_splits = buffers.fill(seq_lens + draft_tokens, draft_tokens * heads)
        o, _ = flash_mla_with_kvcache(
            q=inputs.q.view(len(lengths), -1, heads, 576),
            k_cache=inputs.kv_cache.view(-1, 64, 1, 576),
            block_table=inputs.block_table,
            cache_seqlens=seq_lens.to(torch.int32) + draft_tokens,
            head_dim_v=LATENT,
            tile_scheduler_metadata=metadata,
            num_splits=num_splits,
            softmax_scale=cases.SCALE,
            causal=True,
        )
        assert o.view(-1, heads * LATENT).shape == (len(lengths) * draft_tokens, heads * LATENT)
        cases.check(case, inputs, o, None)


@gpu
@needs_gpu
def test_sglang_dense_in_a_graph() -> None:
    """The metadata buffers are refilled between replays, as SGLang does; the captured call reads lengths on the device."""
    heads, batch = 16, 4
    buffers = SglangBuffers(8, heads, "cuda")
    case = cases.dense_case([64] * batch)
    static = cases.inputs_of(case, device="cuda", table_tail=-1)
    table = torch.full((batch, 40), -1, dtype=torch.int32, device="cuda")
    lengths = torch.ones(batch, dtype=torch.int32, device="cuda")
    cache = torch.zeros((256, 64, 1, 576), dtype=torch.bfloat16, device="cuda")

    def call(metadata: Any, num_splits: torch.Tensor) -> torch.Tensor:
        return flash_mla_with_kvcache(*(static.q, cache, table, lengths, LATENT, metadata, num_splits, cases.SCALE), causal=True)[
            0
        ]

    metadata, num_splits = buffers.fill(lengths, heads)
    table[:, 0] = 0
    call(metadata, num_splits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call(metadata, num_splits)
    for seed, now in enumerate(([500, 1, 0, 2000], [1, 2, 3, 4])):
        case = cases.dense_case(now, seed=seed)
        inputs = cases.inputs_of(case, device="cuda", table_tail=-1)
        buffers.fill(inputs.cache_seqlens, heads)
        static.q.copy_(inputs.q)
        lengths.copy_(inputs.cache_seqlens)
        table.fill_(-1)
        table[:, : inputs.block_table.shape[1]].copy_(inputs.block_table)
        cache[: inputs.kv_cache.shape[0]].copy_(inputs.kv_cache)
        o.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        cases.check(case, inputs, o, None)


# ------------------------------------------------------------------------------------------------------- the plan's forms


def test_metadata_without_arguments_is_the_lazy_object() -> None:
    meta, num_splits = get_mla_metadata()
    assert isinstance(meta, FlashMLASchedMeta)
    assert num_splits is None
    assert not meta.have_initialized
    assert meta.config is None
    assert meta.tile_scheduler_metadata is None
    assert not hasattr(meta, "shape")
    case = cases.dense_case(LENGTHS, q_len=2)
    inputs = cases.inputs_of(case)
    call = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, LATENT)
    out, lse = flash_mla_with_kvcache(*call, get_mla_metadata()[0], None, cases.SCALE, True)
    cases.check(case, inputs, out, lse.transpose(1, 2), empty_lse=INF)
    flash_mla_with_kvcache(*call, meta, softmax_scale=cases.SCALE, causal=True)
    assert meta.have_initialized
    assert meta.config == (5, 2, 16, 64, 1, True, False, None, None, None)
    assert meta.config.page_block_size == 64
    assert meta.tile_scheduler_metadata.shape[1] == 8
    assert meta.num_splits.shape == (6,)


@pytest.mark.parametrize("form", ["positional", "sglang keywords", "keywords"])
def test_metadata_unpacks_into_two_int32_tensors(form: str) -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    if form == "positional":
        metadata, num_splits = get_mla_metadata(lengths, 2 * 16, 1)
    elif form == "sglang keywords":
        metadata, num_splits = get_mla_metadata(
            cache_seqlens=lengths, num_q_tokens_per_head_k=2 * 16, num_heads_k=1, num_heads_q=16, is_fp8_kvcache=False, topk=None
        )
    else:
        metadata, num_splits = get_mla_metadata(cache_seqlens=lengths, num_q_tokens_per_head_k=32, num_heads_k=1)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.shape[1] == 8
    assert metadata.shape[0] == len(metadata) == metadata.size(0)
    assert num_splits.shape == (len(LENGTHS) + 1,)
    # As a tensor: into a graph's own buffer, through functions of torch, by index.
    buffer = torch.full((metadata.shape[0] + 4, 8), -7, dtype=torch.int32)
    buffer[: len(metadata)].copy_(metadata)
    assert (buffer[: len(metadata)] != -7).all()
    assert torch.cat([metadata, metadata]).shape[0] == 2 * len(metadata)
    assert metadata[0].shape == (8,)
    assert metadata.clone().device == lengths.device
    # As an object.
    assert metadata.num_splits is num_splits
    assert not metadata.have_initialized


def test_a_batch_of_nobody() -> None:
    q, table = torch.empty(0, 1, 16, 576, dtype=torch.bfloat16), torch.empty(0, 4, dtype=torch.int32)
    cache, lengths = torch.empty(2, 64, 1, 576, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int32)
    out, lse = flash_mla_with_kvcache(q, cache, table, lengths, LATENT, *get_mla_metadata(lengths, 16, 1), cases.SCALE, True)
    assert out.shape == (0, 1, 16, LATENT)
    assert lse.shape == (0, 16, 1)


def test_metadata_shape_does_not_depend_on_the_batch() -> None:
    """A graph's buffer is made for the largest batch and filled for smaller ones."""
    shapes = {get_mla_metadata(torch.ones(b, dtype=torch.int32), 16, 1)[0].shape for b in (1, 2, 77, 500)}
    assert len(shapes) == 1


def test_an_object_kept_over_steps_is_never_stale() -> None:
    """FlashMLA freezes the schedule in the object; here grown and shrunk lengths give the right rows all the same."""
    meta, _ = get_mla_metadata()
    for seed, lengths in enumerate(([64, 1], [2000, 700], [3, 0], [3, 0, 900])):
        case = cases.dense_case(lengths, seed=seed)
        inputs = cases.inputs_of(case)
        out, lse = flash_mla_with_kvcache(
            *(inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, LATENT, meta, None, cases.SCALE, True)
        )
        cases.check(case, inputs, out, lse.transpose(1, 2), empty_lse=INF)


def test_a_tensor_of_garbage_as_metadata_changes_nothing() -> None:
    case = cases.dense_case(LENGTHS)
    inputs = cases.inputs_of(case)
    garbage = torch.randint(-(2**31), 2**31 - 1, (2, 8), dtype=torch.int32)
    splits = torch.randint(-(2**31), 2**31 - 1, (6,), dtype=torch.int32)
    out, lse = flash_mla_with_kvcache(
        *(inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, LATENT, garbage, splits, cases.SCALE, True)
    )
    cases.check(case, inputs, out, lse.transpose(1, 2), empty_lse=INF)


def test_a_schedule_of_one_part_is_batch_invariant() -> None:
    """vLLM's batch-invariant mode writes a schedule of one row itself; rows then have the same bits alone and in a batch."""
    lengths = [130, 3000, 1000, 64, 65]
    case = cases.dense_case(lengths)
    inputs = cases.inputs_of(case)
    one_part = torch.zeros((1, 8), dtype=torch.int32)
    one_part[0, 2], one_part[0, 3] = len(lengths) - 1, inputs.block_table.shape[1]

    def call(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_mla_with_kvcache(
            inputs.q[rows],
            inputs.kv_cache,
            inputs.block_table[rows],
            inputs.cache_seqlens[rows],
            LATENT,
            one_part,
            torch.zeros(len(lengths) + 1, dtype=torch.int32),
            softmax_scale=cases.SCALE,
            causal=True,
        )

    out, lse = call(slice(None))
    cases.check(case, inputs, out, lse.transpose(1, 2), empty_lse=INF)
    for b in range(len(lengths)):
        alone_out, alone_lse = call(slice(b, b + 1))
        assert cases.has_same_bits(alone_out[0], out[b])
        assert cases.has_same_bits(alone_lse[0], lse[b])


# ------------------------------------------------------------------------------------------------------- argument orders


def test_both_positional_orders_after_causal() -> None:
    case = cases.dense_case(LENGTHS, has_sink=True)
    inputs = cases.inputs_of(case)
    call = (
        inputs.q,
        inputs.kv_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        LATENT,
        get_mla_metadata()[0],
        None,
        cases.SCALE,
        True,
    )
    # FlashMLA: is_fp8_kvcache, indices, attn_sink, ... SGLang: descale_q, descale_k, is_fp8_kvcache, indices, attn_sink, ...
    upstream, _ = flash_mla_with_kvcache(*call, False, None, inputs.sink, None, None, None, None)
    sglang, _ = flash_mla_with_kvcache(*call, None, None, False, None, inputs.sink, None, None, None, None)
    named, _ = flash_mla_with_kvcache(*call, attn_sink=inputs.sink)
    cases.check(case, inputs, upstream, None)
    assert cases.has_same_bits(upstream, sglang)
    assert cases.has_same_bits(upstream, named)


def test_default_scale_is_of_the_absorbed_head() -> None:
    case = cases.testing.mla_case(LENGTHS)
    inputs = cases.inputs_of(case)
    out, lse = flash_mla_with_kvcache(
        inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, LATENT, get_mla_metadata()[0]
    )
    cases.check(case, inputs, out, lse.transpose(1, 2), empty_lse=INF)


@pytest.mark.parametrize("device", DEVICES)
def test_out_is_written_in_place_with_its_strides(device: str) -> None:
    """vLLM passes a view of its own output buffer."""
    case = cases.dense_case(LENGTHS, q_len=2)
    inputs = cases.inputs_of(case, device=device)
    buffer = torch.full((5, 2, 24, 640), -7.0, dtype=torch.bfloat16, device=device)
    view = buffer[:, :, 4:20, 64 : 64 + LATENT]
    view.fill_(float("nan"))
    out, lse = flash_mla_with_kvcache(
        *(
            inputs.q,
            inputs.kv_cache,
            inputs.block_table,
            inputs.cache_seqlens,
            LATENT,
            get_mla_metadata()[0],
            None,
            cases.SCALE,
            True,
        ),
        out=view,
    )
    assert out.data_ptr() == view.data_ptr()
    cases.check(case, inputs, view, lse.transpose(1, 2), empty_lse=INF)
    view.fill_(-7.0)
    assert (buffer == -7.0).all()


def test_a_row_hidden_by_the_causal_mask_is_an_empty_row() -> None:
    case = cases.dense_case([1, 2, 0, 300], q_len=4)
    inputs = cases.inputs_of(case)
    out, lse = flash_mla_with_kvcache(
        *(
            inputs.q,
            inputs.kv_cache,
            inputs.block_table,
            inputs.cache_seqlens,
            LATENT,
            get_mla_metadata()[0],
            None,
            cases.SCALE,
            True,
        )
    )
    cases.check(case, inputs, out, lse.transpose(1, 2), empty_lse=INF)
    assert torch.isposinf(lse[0, :, :3]).all()
    assert torch.isfinite(lse[0, :, 3]).all()
    assert not torch.isnan(out).any()


def test_a_visible_nan_gives_nan_and_no_empty_row() -> None:
    case = cases.dense_case([70, 70])
    inputs = cases.inputs_of(case)
    inputs.kv_cache[int(inputs.block_table[0, 1]), 3] = float("nan")
    out, lse = flash_mla_with_kvcache(
        *(
            inputs.q,
            inputs.kv_cache,
            inputs.block_table,
            inputs.cache_seqlens,
            LATENT,
            get_mla_metadata()[0],
            None,
            cases.SCALE,
            True,
        )
    )
    assert torch.isnan(out[0]).all()
    assert torch.isnan(lse[0]).all()
    assert not torch.isnan(out[1]).any()
    assert torch.isfinite(lse[1]).all()


# ------------------------------------------------------------------------------------------------------------- bad input

TENSOR = torch.ones(1)
REFUSED: dict[str, Any] = {
    "is_fp8_kvcache": True,
    "indices": TENSOR,
    "extra_k_cache": TENSOR,
    "extra_indices_in_kvcache": TENSOR,
    "topk_length": TENSOR,
    "extra_topk_length": TENSOR,
    "descale_q": TENSOR,
    "descale_k": TENSOR,
    "kv_format": "v4",
}


def small_call() -> dict[str, Any]:
    inputs = cases.inputs_of(cases.dense_case([5]))
    return {
        "q": inputs.q,
        "k_cache": inputs.kv_cache,
        "block_table": inputs.block_table,
        "cache_seqlens": inputs.cache_seqlens,
        "head_dim_v": LATENT,
        "tile_scheduler_metadata": get_mla_metadata()[0],
    }


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_arguments_are_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name}: flash_mla_with_kvcache of mlakit takes no {name} .*leave it out"):
        flash_mla_with_kvcache(**small_call(), **{name: REFUSED[name]})


@pytest.mark.parametrize("name", [n for n in REFUSED if n != "is_fp8_kvcache"])
def test_unsupported_arguments_may_be_none(name: str) -> None:
    flash_mla_with_kvcache(**small_call(), **{name: None})


def test_fp8_by_position_is_refused_in_both_orders() -> None:
    call = small_call()
    leading = [call[name] for name in ("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata")]
    with pytest.raises(NotImplementedError, match=r"^is_fp8_kvcache: .*got True"):
        flash_mla_with_kvcache(*leading, None, 0.1, True, True)
    with pytest.raises(NotImplementedError, match=r"^is_fp8_kvcache: .*got True"):
        flash_mla_with_kvcache(*leading, None, 0.1, True, None, None, True)
    with pytest.raises(NotImplementedError, match=r"^descale_q: .*a tensor of shape \[1\]"):
        flash_mla_with_kvcache(*leading, None, 0.1, True, TENSOR, TENSOR)


@pytest.mark.parametrize(("name", "value"), [("is_fp8_kvcache", True), ("topk", 2048)])
def test_unsupported_plans_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name}: "):
        get_mla_metadata(torch.ones(2, dtype=torch.int32), 16, 1, **{name: value})


@pytest.mark.parametrize("name", ["flash_mla_sparse_fwd", "flash_mla_with_kvcache_fp8", "get_mla_metadata_dense_fp8"])
def test_functions_without_a_kernel_can_be_imported_and_say_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name}: mlakit"):
        getattr(flash_mla, name)(TENSOR)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unknown": 1}, TypeError, "unknown argument 'unknown'"),
        ({"block_table": None}, ValueError, r"^block_table: expected an int32 tensor"),
        ({"cache_seqlens": None}, ValueError, r"^cache_seqlens: expected an int32 tensor"),
        ({"tile_scheduler_metadata": None}, TypeError, r"^tile_scheduler_metadata: expected what get_mla_metadata"),
        ({"num_splits": torch.ones(2)}, ValueError, r"^num_splits: expected None or int32"),
        ({"cache_seqlens": torch.tensor([65], dtype=torch.int32)}, ValueError, "block_table|cache_seqlens"),
        ({"k_cache": torch.zeros(4, 64, 1, 656, dtype=torch.uint8)}, ValueError, "kv_cache"),
    ],
)
def test_bad_calls_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = small_call()
    call["block_table"] = call["block_table"][:, :1]
    with pytest.raises(error, match=message):
        flash_mla_with_kvcache(**(call | change))


def test_metadata_asks_for_all_of_its_numbers() -> None:
    lengths = torch.ones(2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"^num_q_tokens_per_head_k and num_heads_k: "):
        get_mla_metadata(lengths)
    with pytest.raises(ValueError, match=r"^cache_seqlens: expected int32"):
        get_mla_metadata(lengths.long(), 16, 1)
    with pytest.raises(ValueError, match=r"without cache_seqlens it gives no tensors"):
        torch.empty(2, 8).copy_(get_mla_metadata()[0])  # type: ignore[arg-type]


def test_the_signature_is_flash_mlas() -> None:
    """Positions that engines rely on."""
    names = list(inspect.signature(flash_mla_with_kvcache).parameters)[:9]
    assert names == [
        *("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits", "softmax_scale"),
        "causal",
    ]
