"""What the header promises beside the numbers."""

from __future__ import annotations

from collections.abc import Callable

import cabi
import pytest
import torch
from cases import Batch, Case

MIXED = [300, 0, 4096, 77, 1, 2000]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def test_runs_are_bitwise_equal() -> None:
    x = Batch(Case(MIXED, [2] * 6, 128, is_causal=True))
    plan = x.run()
    first, first_lse = x.out.clone(), x.lse.clone()
    for _ in range(5):
        x.out.fill_(float("nan"))
        plan.scratch.fill_(0x7F)
        x.run(plan)
        assert torch.equal(bits(x.out), bits(first))
        assert torch.equal(bits(x.lse), bits(first_lse))


def test_moving_pages_changes_no_bit() -> None:
    x = Batch(Case(MIXED, [1] * 6, 16))
    plan = x.run()
    first = x.out.clone()
    order = torch.randperm(x.kv.shape[0], device="cuda")
    is_page = (x.table >= 0) & (x.table < x.kv.shape[0])
    table = torch.where(is_page, torch.argsort(order)[x.table.clamp(0, x.kv.shape[0] - 1).long()].int(), x.table)
    x.run(plan, kv_cache=x.kv[order].contiguous(), block_table=table)
    assert torch.equal(bits(x.out), bits(first))


@pytest.mark.parametrize("q_heads", [16, 128])
def test_fixed_chunks_make_rows_independent_of_the_batch(q_heads: int) -> None:
    x = Batch(Case(MIXED, [2] * 6, q_heads, is_causal=True, flags=":chunk256"))
    plan = x.run()
    together, together_lse = x.out.clone(), x.lse.clone()
    for i in range(6):
        x.out.fill_(float("nan"))
        args = dict(q=x.q[i : i + 1], kv_cache=x.kv, block_table=x.table[i : i + 1], out=x.out[i : i + 1], lse=x.lse[i : i + 1])
        plan.schedule(x.lengths[i : i + 1])
        plan.decode(**args)
        assert torch.equal(bits(x.out[i]), bits(together[i]))
        assert torch.equal(bits(x.lse[i]), bits(together_lse[i]))


def test_strided_tensors_and_split_views() -> None:
    case = Case(MIXED, [2] * 6, 20, is_causal=True)
    x = Batch(case)
    q = torch.full((6, 3, 25, 648), float("nan"), dtype=torch.bfloat16, device="cuda")[:, :2, 2:22, 8:584]
    q.copy_(x.q)
    kv = torch.full((x.kv.shape[0], 70, 2, 640), float("nan"), dtype=torch.bfloat16, device="cuda")[:, 3:67, 1:, :576]
    kv.copy_(x.kv)
    out = torch.full((6, 2, 20, 515), float("nan"), dtype=torch.bfloat16, device="cuda")
    lse = torch.full((20, 6, 2), float("nan"), device="cuda")
    table = torch.full((6, 2 * x.table.shape[1]), 7, dtype=torch.int32, device="cuda")[:, ::1][:, : x.table.shape[1]]
    table.copy_(x.table)
    for is_split in (False, True):
        for first in (0, 1, 3):
            x.out, x.lse = out[..., first : first + 512], lse.permute(1, 2, 0)
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            split = (
                dict(q=q[..., :512], q_rope=q[..., 512:], kv_cache=kv[..., :512], kv_rope=kv[..., 512:])
                if is_split
                else dict(q=q, kv_cache=kv)
            )
            x.run(block_table=table, **split)
            x.check()
            untouched = torch.cat([out[..., :first], out[..., first + 512 :]], -1)
            assert untouched.isnan().all()


@pytest.mark.parametrize("flags", ["", ":chunk256"])
def test_sink(flags: str) -> None:
    for q_heads in (16, 128):
        x = Batch(Case(MIXED, [1] * 6, q_heads, flags=flags))
        sink = torch.randn(q_heads, device="cuda") * 4
        sink[0], sink[1] = -torch.inf, 30.0
        x.run(sink=sink)
        x.check(sink=sink)


def test_nan_reaches_exactly_the_rows_that_see_it() -> None:
    x = Batch(Case([500, 500, 500], [1, 1, 1], 16))
    clean = x.run()
    expected = x.out.clone()
    x.kv[x.page_lists[1][3], 17, 0, 100] = float("nan")
    x.q[2, 0, 5, 7] = float("nan")
    x.run(clean)
    assert x.out[1].isnan().all()
    assert x.lse[1].isnan().all()
    assert x.out[2, 0, 5].isnan().all()
    rest = torch.cat([x.out[0].flatten(0, 1), x.out[2, 0, :5], x.out[2, 0, 6:]])
    assert torch.equal(bits(rest), bits(torch.cat([expected[0].flatten(0, 1), expected[2, 0, :5], expected[2, 0, 6:]])))


def test_graph_replay_reads_lengths_tables_and_q_on_the_device() -> None:
    case = Case(MIXED, [1] * 6, 64)
    x = Batch(case)
    plan = cabi.Plan(case.problem.replace("l4096", "l6000"))
    x.run(plan)
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    args = plan.decode_args(q=x.q, kv_cache=x.kv, block_table=x.table, out=x.out, lse=x.lse)
    with torch.cuda.graph(graph, stream=stream):
        plan.schedule(x.lengths)
        plan.enqueue(args)
    for lengths in ([300, 0, 4096, 77, 1, 2000], [1, 5000, 0, 0, 64, 65], [0] * 6, [10, 20, 30, 40, 50, 3000]):
        y = Batch(Case(lengths, [1] * 6, 64, seed=sum(lengths)))
        width = min(x.table.shape[1], y.table.shape[1])
        pages = max(x.kv.shape[0], y.kv.shape[0])
        if y.kv.shape[0] > x.kv.shape[0] or y.table.shape[1] > x.table.shape[1]:
            lengths = [min(n, 1000) for n in lengths]
            y = Batch(Case(lengths, [1] * 6, 64, seed=1))
            width = min(x.table.shape[1], y.table.shape[1])
        assert pages >= y.kv.shape[0]
        x.q.copy_(y.q)
        x.kv[: y.kv.shape[0]].copy_(y.kv)
        x.table[:, :width].copy_(y.table[:, :width])
        x.lengths.copy_(y.lengths)
        x.out.fill_(float("nan"))
        graph.replay()
        y.out, y.lse = x.out, x.lse
        y.check()


@pytest.mark.parametrize("lengths", [[200] * 128, [190 + i % 20 for i in range(128)], MIXED, [64] * 3])
@pytest.mark.parametrize("q_heads", [16, 128])
def test_calls_in_a_row_see_each_others_results(lengths: list[int], q_heads: int) -> None:
    """Whether requests are whole or cut: the kernels of a stream overlap, and one that has nothing to join ends early."""
    batch = len(lengths)
    x = Batch(Case(lengths, [1] * batch, q_heads, head_dim=512))
    plan = cabi.Plan(x.case.problem)
    shorter = x.lengths // 2

    def chain(is_synchronised: bool) -> torch.Tensor:
        rows = [x.q.clone(), torch.zeros_like(x.q)]
        for i in range(24):
            plan.schedule(shorter if i % 6 < 3 else x.lengths)
            for _ in range(3):
                plan.decode(q=rows[0], kv_cache=x.kv, block_table=x.table, out=rows[1], lse=x.lse)
                rows.reverse()
                if is_synchronised:
                    torch.cuda.synchronize()
        torch.cuda.synchronize()
        return rows[0]

    expected = chain(is_synchronised=True)
    assert expected.isfinite().all()
    for _ in range(3):
        assert torch.equal(bits(chain(is_synchronised=False)), bits(expected))


@pytest.mark.parametrize("flags", ["", ":causal", ":chunk128"])
def test_hostile_lengths_and_tables_do_not_fault(flags: str) -> None:
    plan = cabi.Plan("dense:bf16:b6:q2:h16:p64:l1000:cuda0" + flags)
    q = torch.randn(6, 2, 16, 576, device="cuda").bfloat16()
    kv = torch.randn(20, 64, 1, 576, device="cuda").bfloat16()
    out, lse = torch.empty(6, 2, 16, 512, device="cuda", dtype=torch.bfloat16), torch.empty(6, 2, 16, device="cuda")
    table = torch.tensor([-1, 2**31 - 1, -(2**31), 5, 20, 1000] * 3, dtype=torch.int32, device="cuda")[:16].repeat(6, 1)
    for lengths in ([-1, -(2**31), 2**31 - 1, 1001, 0, 1000], [2**31 - 1] * 6, [-5] * 6):
        out.fill_(7.0)
        lse.fill_(7.0)
        plan.schedule(torch.tensor(lengths, dtype=torch.int32, device="cuda"))
        plan.decode(q=q, kv_cache=kv, block_table=table, out=out, lse=lse)
        torch.cuda.synchronize()
        for i, length in enumerate(lengths):
            if 0 <= length <= 1000:
                assert out[i].isfinite().all()
            else:  # not what the caller asked for, so not a number
                assert out[i].isnan().all()
                assert lse[i].isnan().all()
        assert not (out == 7.0).all(-1).any()


def test_debug_plans_refuse_what_the_device_holds() -> None:
    case = Case(MIXED, [1] * 6, 16, flags=":debug")
    x = Batch(case)
    plan = x.run()
    x.check()

    def refuses(message: str, call: Callable[[], object]) -> None:
        with pytest.raises(cabi.MlaError, match=message):
            call()

    long = x.lengths.clone()
    long[2] = 5000
    refuses(r"cache_seqlens: must be from 0 to 4096 .*got cache_seqlens\[2\] = 5000", lambda: plan.schedule(long))
    args = dict(q=x.q, kv_cache=x.kv, out=x.out, lse=x.lse)
    table = x.table.clone()
    table[3, 1] = x.kv.shape[0]
    refuses(r"block_table: a used page id .*got block_table\[3\]\[1\]", lambda: plan.decode(**args, block_table=table))
    grown = x.lengths + 1
    refuses(
        r"cache_seqlens: must be those of the schedule, got cache_seqlens\[0\] = 301",
        lambda: plan.decode(**args, block_table=x.table, cache_seqlens=grown),
    )
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        x.out.zero_()
        refuses("stream: a plan with MLA_PROBLEM_DEBUG reads device memory", lambda: plan.schedule(x.lengths))


def test_hostile_cu_seqlens_do_not_fault() -> None:
    plan = cabi.Plan("dense:bf16:b4:q4:h16:p64:l1000:ragged:t10:cuda0")
    q = torch.randn(10, 16, 576, device="cuda").bfloat16()
    kv = torch.randn(70, 64, 1, 576, device="cuda").bfloat16()
    out, lse = torch.empty(10, 16, 512, device="cuda", dtype=torch.bfloat16), torch.empty(10, 16, device="cuda")
    table = torch.arange(64, dtype=torch.int32, device="cuda").view(4, 16)
    lengths = torch.tensor([1000, 5, 0, 700], dtype=torch.int32, device="cuda")
    for cu in ([0, -5, 3, 2**31 - 1, 7], [0, 10, 10, 10, 10], [5, 4, 3, 2, 1], [0, 0, 0, 0, 0]):
        plan.schedule(lengths, torch.tensor(cu, dtype=torch.int32, device="cuda"))
        plan.decode(q=q, kv_cache=kv, block_table=table, out=out, lse=lse)
        torch.cuda.synchronize()


def test_tokens_over_the_plans_maximum_come_out_as_nan() -> None:
    # Room for 50 partials, see schedule/slots.h; a request leaves 47.
    x = Batch(Case([3000] * 4, [1] * 4, 16, flags=":chunk64:m3000"))
    x.run()
    expected, _ = x.reference_all()
    error = (x.out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error[:1] < 6e-3).all()
    assert x.out[1:].isnan().all()
    assert x.lse[1:].isnan().all()


def test_any_stream_and_no_lse() -> None:
    x = Batch(Case(MIXED, [1] * 6, 16))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        x.run()
        with_lse = x.out.clone()
        x.out.fill_(float("nan"))
        x.run(lse=None)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(bits(x.out), bits(with_lse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_base2", [False, True])
def test_merge(dtype: torch.dtype, is_base2: bool) -> None:
    parts, tokens, heads, dim = 5, 7, 3, 512
    out_parts, lse_parts = (
        torch.randn(parts, tokens, heads, dim, device="cuda").to(dtype),
        torch.randn(parts, tokens, heads, device="cuda") * 5,
    )
    lse_parts[:, 0, 0] = -torch.inf
    lse_parts[1:4, 1] = -torch.inf
    out_parts[1:4, 1] = float("nan")  # of a part that saw nothing: counts for nothing
    out, lse = (
        torch.full((tokens, heads, dim), float("nan"), device="cuda").to(dtype),
        torch.full((tokens, heads), float("nan"), device="cuda"),
    )
    cabi.merge(out_parts, lse_parts, out, lse, is_base2)
    unit = 0.6931471805599453 if is_base2 else 1.0
    s = lse_parts.double() * unit
    total = torch.logsumexp(s, 0)
    weight = torch.where(s == -torch.inf, 0.0, torch.exp(s - torch.where(total == -torch.inf, 0.0, total)))
    expected = (weight[..., None] * torch.where(s[..., None] == -torch.inf, 0.0, out_parts.double())).sum(0)
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
    assert ((out.double() - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all()
    assert torch.equal(lse == -torch.inf, total == -torch.inf)
    seen = total != -torch.inf
    assert ((lse.double() * unit - total).abs()[seen] <= 1e-5 * total.abs()[seen].clamp_min(1)).all()


def test_refusals_name_the_reason() -> None:
    for problem, word in (
        ("dense:fp32:b1:q1:h16:l64:cuda0", "bf16 or fp16"),
        ("dense:bf16:b1:q1:h16:d320:v256:l64:cuda0", "576/512"),
    ):
        with pytest.raises(cabi.MlaError, match=word):
            cabi.Plan(problem)
    x = Batch(Case([100], [1], 16))
    with pytest.raises(cabi.MlaError, match="kv_cache.*multiples of 8"):
        x.run(kv_cache=torch.zeros(x.kv.shape[0], 64, 1, 577, device="cuda", dtype=torch.bfloat16)[..., :576])
