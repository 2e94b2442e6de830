"""The ragged callers: vLLM's and SGLang's FlashAttention-3 path, and FlashInfer's plan and run."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch

from mlakit import testing
from mlakit.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from mlakit.compat.flashinfer import BatchMLAPagedAttentionWrapper

LENGTHS, Q_LENS = [100, 0, 65, 300, 2], (1, 3, 0, 5, 4)
HEADS, LATENT, ROPE = 16, 512, 64

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(bool(cases.no_gpu()), reason=cases.no_gpu() or "a GPU is there")
DEVICES = ["cpu", pytest.param("cuda", marks=(gpu, needs_gpu))]


def ragged_case(
    options: str = "causal", lengths: list[int] = LENGTHS, q_lens: tuple[int, ...] = Q_LENS, seed: int = 0
) -> testing.Case:
    return testing.mla_case(
        lengths,
        f"ragged:{options}:scale{torch.tensor(cases.SCALE).item():.9g}".replace("::", ":"),
        q_len=5,
        q_lens=q_lens,
        seed=seed,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_vllm_fa3_call(device: str) -> None:
    case = ragged_case()
    inputs = cases.inputs_of(case, device=device)
    cache = inputs.kv_cache.squeeze(2)  # vLLM's: one tensor [blocks, 64, 576], of which both views are taken
    kv_c_cache, k_pe_cache = cache[..., :LATENT], cache[..., LATENT:]
    q_nope, q_pe = inputs.q.split([LATENT, ROPE], dim=-1)
    out, lse = flash_attn_varlen_func(
        q=q_pe,
        k=k_pe_cache.unsqueeze(-2),
        v=kv_c_cache.unsqueeze(-2),
        q_v=q_nope,
        max_seqlen_q=max(Q_LENS),
        cu_seqlens_q=inputs.cu_seqlens_q,
        max_seqlen_k=max(LENGTHS),
        seqused_k=inputs.cache_seqlens,
        block_table=inputs.block_table,
        softmax_scale=cases.SCALE,
        causal=True,
        return_softmax_lse=True,
        fa_version=3,
        scheduler_metadata=None,
        num_splits=0,
        cp_world_size=1,
        cp_rank=0,
        cp_tot_seqused_k=None,
    )
    tokens = sum(Q_LENS)
    assert out.shape == (tokens, HEADS, LATENT)
    assert lse.shape == (HEADS, tokens)
    assert lse.is_contiguous()
    cases.check(case, inputs, out, lse.T)


@pytest.mark.parametrize("device", DEVICES)
def test_sglang_fa3_call(device: str) -> None:
    """Page size 1: the pool has one token a page."""
    problem = f"dense:bf16:b5:q5:h16:k1:d576:v512:p1:l300:ragged:causal:scale{torch.tensor(cases.SCALE).item():.9g}"
    case = testing.Case(problem, tuple(LENGTHS), Q_LENS)
    inputs = cases.inputs_of(case, device=device)
    pool = inputs.kv_cache.view(-1, 576)
    q_nope, q_rope = inputs.q[..., :LATENT], inputs.q[..., LATENT:]
    out = flash_attn_with_kvcache(
        q=q_rope,
        k_cache=pool[:, LATENT:].view(-1, 1, 1, ROPE),
        v_cache=pool[:, :LATENT].view(-1, 1, 1, LATENT),
        qv=q_nope,
        page_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_k_new=torch.zeros(6, dtype=torch.int32, device=device),
        max_seqlen_q=max(Q_LENS),
        softmax_scale=cases.SCALE,
        causal=True,
        softcap=0.0,
        num_splits=0,
    )
    cases.check(case, inputs, out, None)


def test_num_splits_1_does_not_depend_on_batch_mates() -> None:
    case = ragged_case(lengths=[3000, 100], q_lens=(2, 1))
    inputs = cases.inputs_of(case)

    def call(q: torch.Tensor, cu: list[int], rows: slice) -> Any:
        return flash_attn_varlen_func(
            q=q[..., LATENT:],
            k=inputs.kv_cache[..., LATENT:],
            v=inputs.kv_cache[..., :LATENT],
            q_v=q[..., :LATENT],
            cu_seqlens_q=torch.tensor(cu, dtype=torch.int32),
            seqused_k=inputs.cache_seqlens[rows],
            block_table=inputs.block_table[rows],
            softmax_scale=cases.SCALE,
            causal=True,
            num_splits=1,
        )

    out = call(inputs.q, [0, 2, 3], slice(None))
    cases.check(case, inputs, out, None)
    assert cases.has_same_bits(call(inputs.q[:2], [0, 2], slice(0, 1)), out[:2])
    assert cases.has_same_bits(call(inputs.q[2:], [0, 1], slice(1, 2)), out[2:])


def fa3_call() -> dict[str, Any]:
    inputs = cases.inputs_of(ragged_case())
    return {
        "q": inputs.q[..., LATENT:],
        "k": inputs.kv_cache[..., LATENT:],
        "v": inputs.kv_cache[..., :LATENT],
        "q_v": inputs.q[..., :LATENT],
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "seqused_k": inputs.cache_seqlens,
        "block_table": inputs.block_table,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, torch.ones(1)) for name in ("q_descale", "k_descale", "v_descale", "alibi_slopes", "cu_seqlens_k")),
        *(("window_size", (128, 0)), ("softcap", 30.0), ("dropout_p", 0.1), ("return_attn_probs", True), ("fa_version", 2)),
    ],
)
def test_what_mlakit_has_not_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name}: "):
        flash_attn_varlen_func(**fa3_call(), **{name: value})


@pytest.mark.parametrize("name", ["q_v", "cu_seqlens_q", "seqused_k", "block_table"])
def test_what_mla_needs_is_asked_for_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: .*expects a tensor, got None"):
        flash_attn_varlen_func(**(fa3_call() | {name: None}))


# ------------------------------------------------------------------------------------------------------------- FlashInfer


def page_lists(inputs: testing.Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's form of a block table: kv_indptr and kv_indices."""
    counts = [-(-n // 64) for n in inputs.cache_seqlens.tolist()]
    rows = [row[:n] for row, n in zip(inputs.block_table.tolist(), counts, strict=True)]
    begins = [sum(counts[:b]) for b in range(len(counts) + 1)]
    device = inputs.q.device
    return torch.tensor(begins, dtype=torch.int32, device=device), torch.tensor(
        [page for row in rows for page in row], dtype=torch.int32, device=device
    )


def plan_step(wrapper: BatchMLAPagedAttentionWrapper, inputs: testing.Inputs) -> None:
    kv_indptr, kv_indices = page_lists(inputs)
    wrapper.plan(
        *(inputs.cu_seqlens_q, kv_indptr, kv_indices, inputs.cache_seqlens, HEADS, LATENT, ROPE, 64, True, cases.SCALE),
        *(torch.bfloat16, torch.bfloat16),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_flashinfer_plan_and_run(device: str) -> None:
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128, dtype=torch.int8, device=device), backend="fa3")
    for seed in range(2):
        case = ragged_case("causal:lse2", seed=seed)
        inputs = cases.inputs_of(case, device=device)
        plan_step(wrapper, inputs)
        q_nope, q_pe = inputs.q.split([LATENT, ROPE], dim=-1)
        cache = inputs.kv_cache.squeeze(2)
        ckv_cache, kpe_cache = cache.split([LATENT, ROPE], dim=-1)
        for _ in range(2):
            out, lse = torch.full_like(q_nope, float("nan")), torch.full(q_nope.shape[:-1], float("nan"), device=device)
            got = wrapper.run(q_nope, q_pe, ckv_cache, kpe_cache, out=out, lse=lse, return_lse=True)
            assert got[0].data_ptr() == out.data_ptr()
            cases.check(case, inputs, out, lse)
        natural = ragged_case("causal", seed=seed)
        cases.check(natural, inputs, *wrapper.run(q_nope, q_pe, ckv_cache, kpe_cache, return_lse=True, return_lse_base_on_e=True))
        assert isinstance(wrapper.run(q_nope, q_pe, ckv_cache, kpe_cache), torch.Tensor)


def test_a_graph_wrapper_keeps_its_buffers_from_plan_to_plan() -> None:
    """What a captured run points at must stay where it is; the same on the CPU, where it can be seen."""
    wrapper = BatchMLAPagedAttentionWrapper(
        torch.empty(128, dtype=torch.int8),
        use_cuda_graph=True,
        kv_indices=torch.empty(64, dtype=torch.int32),
        kv_len_arr=torch.empty(5, dtype=torch.int32),
    )
    places = []
    for seed, lengths in enumerate((LENGTHS, [7, 1, 1000, 0, 64])):
        case = ragged_case("causal:lse2", lengths=lengths, seed=seed)
        inputs = cases.inputs_of(case)
        plan_step(wrapper, inputs)
        places.append([buffer.data_ptr() for buffer in wrapper._buffers.values()])
        q_nope, q_pe = inputs.q.split([LATENT, ROPE], dim=-1)
        ckv_cache, kpe_cache = inputs.kv_cache.squeeze(2).split([LATENT, ROPE], dim=-1)
        cases.check(case, inputs, *wrapper.run(q_nope, q_pe, ckv_cache, kpe_cache, return_lse=True))
    assert places[0] == places[1]


@gpu
@needs_gpu
def test_flashinfer_run_in_a_graph_follows_later_plans() -> None:
    wrapper = BatchMLAPagedAttentionWrapper(
        torch.empty(128, dtype=torch.int8, device="cuda"),
        use_cuda_graph=True,
        kv_indices=torch.empty(64, dtype=torch.int32),
        kv_len_arr=torch.empty(5, dtype=torch.int32),
    )
    q = torch.zeros((sum(Q_LENS), HEADS, 576), dtype=torch.bfloat16, device="cuda")
    cache = torch.full((128, 64, 576), float("nan"), dtype=torch.bfloat16, device="cuda")
    call = (*q.split([LATENT, ROPE], dim=-1), *cache.split([LATENT, ROPE], dim=-1))
    first = cases.inputs_of(ragged_case("causal:lse2"), device="cuda")
    plan_step(wrapper, first)
    cache[: first.kv_cache.shape[0]].copy_(first.kv_cache.squeeze(2))
    wrapper.run(*call, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = wrapper.run(*call, return_lse=True)
    for seed, lengths in enumerate((LENGTHS, [7, 1, 1000, 0, 64])):
        case = ragged_case("causal:lse2", lengths=lengths, seed=seed + 1)
        inputs = cases.inputs_of(case, device="cuda")
        plan_step(wrapper, inputs)
        q.copy_(inputs.q)
        cache[: inputs.kv_cache.shape[0]].copy_(inputs.kv_cache.squeeze(2))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        cases.check(case, inputs, out, lse)


@pytest.mark.parametrize("change", [{"kv_len": torch.ones(5)}, {"page_table": torch.ones(5)}, {"profiler_buffer": torch.ones(5)}])
def test_flashinfer_arguments_of_other_backends_are_refused(change: dict[str, Any]) -> None:
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128, dtype=torch.int8))
    with pytest.raises(ValueError, match="plan to be called first"):
        wrapper.run(*(torch.empty(1),) * 4)
    with pytest.raises(NotImplementedError, match=rf"^{next(iter(change))}: "):
        wrapper.run(*(torch.empty(1),) * 4, **change)


def test_flashinfer_plans_are_checked() -> None:
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128, dtype=torch.int8))
    one = torch.tensor([0, 1], dtype=torch.int32)
    options = (HEADS, LATENT, ROPE, 64, True, cases.SCALE, torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^kv_len_arr\[0\]: expected at most 1 pages of 64 tokens, got 65"):
        wrapper.plan(one, one, torch.tensor([3]), torch.tensor([65]), *options)
    with pytest.raises(NotImplementedError, match=r"^kv_data_type: .*float8_e4m3fn"):
        wrapper.plan(one, one, torch.tensor([3]), torch.tensor([5]), *options[:-1], torch.float8_e4m3fn)
