"""Random problems and batches, shrunk by hypothesis when one fails."""

from __future__ import annotations

import cabi
import torch
from cases import Batch, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PROFILE = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    is_ragged = draw(st.booleans())
    batch = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0, 1500), min_size=batch, max_size=batch))
    q_len = draw(st.integers(1, 6))
    q_lens = draw(st.lists(st.integers(0, q_len), min_size=batch, max_size=batch)) if is_ragged else [q_len] * batch
    kv_heads = draw(st.integers(1, 3))
    return Case(
        lengths,
        [*q_lens[:-1], max(q_lens[-1], 1)],
        kv_heads * draw(st.integers(1, 70)),
        kv_heads,
        draw(st.integers(1, 130)),
        draw(st.sampled_from((576, 512))),
        draw(st.sampled_from(("bf16", "fp16"))),
        is_causal=draw(st.booleans()),
        is_ragged=is_ragged,
        flags=draw(st.sampled_from(("", ":chunk64", ":chunk512", ":outfp32"))),
        seed=draw(st.integers(0, 1000)),
        scale=draw(st.sampled_from((0.1, 1.0, 5.0))),
    )


@PROFILE
@given(cases())
def test_any_problem_matches_double_precision(case: Case) -> None:
    x = Batch(case)
    x.run()
    x.check()


@PROFILE
@given(cases(), st.integers(1, 1499))
def test_the_halves_of_a_cache_merge_to_the_whole(case: Case, at: int) -> None:
    case.is_causal, case.flags = False, ":outfp32"
    whole = Batch(case)
    whole.run()
    out, lse = whole.out.float(), whole.lse
    pages_at = at // case.page_size
    parts = []
    for is_second in (False, True):
        cut = [min(n, pages_at * case.page_size) for n in case.lengths]
        lengths = [n - c if is_second else c for n, c in zip(case.lengths, cut, strict=True)]
        table = whole.table[:, pages_at:] if is_second else whole.table
        if table.shape[1] == 0:
            table = whole.table
        part_out, part_lse = torch.full_like(out, float("nan")), torch.full_like(lse, float("nan"))
        plan = cabi.Plan(case.problem)
        plan.schedule(torch.tensor(lengths, dtype=torch.int32, device="cuda"), whole.cu_seqlens_q)
        plan.decode(q=whole.q, kv_cache=whole.kv, block_table=table, out=part_out, lse=part_lse)
        parts.append((part_out, part_lse))
    shape = (-1, case.q_heads)
    merged, merged_lse = torch.full_like(out, float("nan")).view(*shape, 512), torch.full_like(lse, float("nan")).view(shape)
    out_parts = torch.stack([p.view(*shape, 512) for p, _ in parts])
    cabi.merge(out_parts, torch.stack([p.view(shape) for _, p in parts]), merged, merged_lse)
    empty = lse.view(shape) == -torch.inf
    assert torch.equal(merged_lse == -torch.inf, empty)
    error = (merged - out.view(*shape, 512)).norm(dim=-1) / out.view(*shape, 512).norm(dim=-1).clamp_min(1e-30)
    assert (error[~empty] < 6e-3).all()
    assert ((merged_lse - lse.view(shape)).abs()[~empty] < 1e-3 * lse.view(shape).abs()[~empty].clamp_min(1)).all()
