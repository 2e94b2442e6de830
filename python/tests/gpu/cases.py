"""Random batches on the device, hostile where a caller may be: garbage after a table's used part, NaN in every unused slot,
poisoned outputs. And the answer in double precision, row by row."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import cabi
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GARBAGE_PAGES = (-1, 2**31 - 1, -(2**31), 123456789)


@dataclasses.dataclass
class Case:
    lengths: list[int]
    q_lens: list[int]  # of each request; all the same unless ragged
    q_heads: int
    kv_heads: int = 1
    page_size: int = 64
    head_dim: int = 576
    dtype: str = "bf16"
    is_causal: bool = False
    is_ragged: bool = False
    flags: str = ""  # further parts of the problem string
    seed: int = 0
    scale: float = 1.0  # of q: larger makes the softmax sharper
    max_len: int = 1  # that the plan is made for, where the lengths are shorter

    @property
    def problem(self) -> str:
        causal = ":causal" if self.is_causal else ""
        ragged = f":ragged:t{max(sum(self.q_lens), 1)}" if self.is_ragged else ""
        return (
            f"dense:{self.dtype}:b{len(self.lengths)}:q{max(self.q_lens)}:h{self.q_heads}:k{self.kv_heads}:d{self.head_dim}:v512"
            f":p{self.page_size}:l{max(*self.lengths, self.max_len)}{causal}{ragged}{self.flags}:cuda0"
        )


class Batch:
    """The tensors of a case."""

    def __init__(self, case: Case, spare_pages: int = 3) -> None:
        self.case = case
        g = torch.Generator(device="cuda").manual_seed(case.seed)
        rng = random.Random(case.seed)
        dtype = DTYPES[case.dtype]
        pages_of = [-(-n // case.page_size) for n in case.lengths]
        pages = sum(pages_of) + spare_pages
        kv = torch.empty(pages, case.page_size, case.kv_heads, case.head_dim, dtype=dtype, device="cuda")
        kv.normal_(generator=g)
        ids = torch.randperm(pages, generator=g, device="cuda").int()
        width = max(max(pages_of), 1) + 2
        table = torch.tensor(
            [[rng.choice(GARBAGE_PAGES) for _ in range(width)] for _ in case.lengths], dtype=torch.int32, device="cuda"
        )
        used = 0
        self.page_lists = []
        for i, n in enumerate(pages_of):
            mine = ids[used : used + n]
            table[i, :n] = mine
            self.page_lists.append(mine.long())
            if n and case.lengths[i] % case.page_size:
                kv[mine[-1].long(), case.lengths[i] % case.page_size :] = float("nan")
            used += n
        kv[ids[used:].long()] = float("nan")
        tokens = sum(case.q_lens)
        shape = (tokens, case.q_heads) if case.is_ragged else (len(case.lengths), case.q_lens[0], case.q_heads)
        self.q = (torch.randn(*shape, case.head_dim, generator=g, device="cuda") * case.scale).to(dtype)
        self.kv, self.table = kv, table
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
        self.cu_seqlens_q = None
        if case.is_ragged:
            self.cu_seqlens_q = torch.tensor(
                [sum(case.q_lens[:i]) for i in range(len(case.q_lens) + 1)], dtype=torch.int32, device="cuda"
            )
        self.out = torch.full(
            (*shape, 512), float("nan"), dtype=torch.float32 if "outfp32" in case.flags else dtype, device="cuda"
        )
        self.lse = torch.full(shape, float("nan"), device="cuda")

    def q_of(self, i: int) -> slice | int:
        """Where request i lies in the first dimension of q, out, lse."""
        if not self.case.is_ragged:
            return i
        first = sum(self.case.q_lens[:i])
        return slice(first, first + self.case.q_lens[i])

    def run(self, plan: cabi.Plan | None = None, **changes: Any) -> cabi.Plan:
        plan = plan or cabi.Plan(self.case.problem)
        plan.schedule(self.lengths, self.cu_seqlens_q)
        tensors = dict(q=self.q, kv_cache=self.kv, block_table=self.table, out=self.out, lse=self.lse)
        plan.decode(**{**tensors, **changes})
        return plan

    def reference(
        self, i: int, softmax_scale: float | None = None, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of request i in double precision: [q_len, heads, 512], [q_len, heads]."""
        c = self.case
        n, q_len, group = c.lengths[i], c.q_lens[i], c.q_heads // c.kv_heads
        q = self.q[self.q_of(i)].double().view(q_len, c.kv_heads, group, c.head_dim)
        kv = self.kv[self.page_lists[i]].view(-1, c.kv_heads, c.head_dim)[:n].double()
        s = torch.einsum("tkgd,nkd->tkgn", q, kv) * (softmax_scale or c.head_dim**-0.5)
        if c.is_causal:
            hidden = torch.arange(n, device="cuda")[None, :] > torch.arange(q_len, device="cuda")[:, None] + n - q_len
            s.masked_fill_(hidden[:, None, None, :], -torch.inf)
        lse = torch.logsumexp(s, -1) if n else torch.full(s.shape[:-1], -torch.inf, dtype=torch.double, device="cuda")
        p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        out = torch.einsum("tkgn,nkd->tkgd", p, kv[..., :512])
        lse, out = lse.reshape(q_len, c.q_heads), out.reshape(q_len, c.q_heads, 512)
        return _with_sink(out, lse, sink)

    def reference_all(
        self, softmax_scale: float | None = None, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for all requests at once (not ragged): [batch, q_len, heads, 512], [batch, q_len, heads]."""
        c = self.case
        batch, q_len, group, longest = len(c.lengths), c.q_lens[0], c.q_heads // c.kv_heads, max(max(c.lengths), 1)
        pages = -(-longest // c.page_size)
        position = torch.arange(pages * c.page_size, device="cuda")[None, :]
        is_key = position < self.lengths[:, None]
        ids = torch.where(position[:, :: c.page_size] < self.lengths[:, None], self.table[:, :pages], 0).long()
        kv = torch.where(is_key[..., None, None], self.kv[ids].view(batch, -1, c.kv_heads, c.head_dim), 0).double()
        kv = kv.transpose(1, 2).reshape(batch * c.kv_heads, -1, c.head_dim)
        q = (
            self.q.double()
            .view(batch, q_len, c.kv_heads, group, c.head_dim)
            .transpose(1, 2)
            .reshape(batch * c.kv_heads, -1, c.head_dim)
        )
        s = torch.bmm(q, kv.transpose(1, 2)).view(batch, c.kv_heads, q_len, group, -1).mul_(softmax_scale or c.head_dim**-0.5)
        last = (
            self.lengths[:, None]
            - 1
            + (torch.arange(q_len, device="cuda") - q_len + 1 if c.is_causal else torch.zeros(q_len, device="cuda"))
        )
        s.masked_fill_((position[:, None, :] > last[..., None])[:, None, :, None, :], -torch.inf)
        s.masked_fill_(~is_key[:, None, None, None, :], -torch.inf)
        lse = torch.logsumexp(s, -1)
        p = s.sub_(torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp_()
        out = torch.bmm(p.view(batch * c.kv_heads, q_len * group, -1), kv[..., :512])
        out = out.view(batch, c.kv_heads, q_len, group, 512).transpose(1, 2).reshape(batch, q_len, c.q_heads, 512)
        return _with_sink(out, lse.transpose(1, 2).reshape(batch, q_len, c.q_heads), sink)

    def check(self, is_base2: bool = False, **how: Any) -> float:
        """Every row of every request; returns the largest relative error of a row."""
        got_lse = self.lse * 0.6931471805599453 if is_base2 else self.lse
        if not self.case.is_ragged:
            return check_rows(self.out, got_lse, *self.reference_all(**how), self.case)
        worst = 0.0
        for i in range(len(self.case.lengths)):
            if self.case.q_lens[i]:
                worst = max(
                    worst, check_rows(self.out[self.q_of(i)], got_lse[self.q_of(i)], *self.reference(i, **how), self.case)
                )
        return worst


def _with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(sink) in the denominator of out; empty rows stay 0."""
    if sink is not None:
        out = torch.where((lse == -torch.inf)[..., None], 0.0, out * torch.sigmoid(lse - sink.double())[..., None])
    return out, lse


# An output element is a mean of values of order one with weights rounded to the input type; its own rounding is half a unit in
# the last place. Measured on random data a row's relative error is 1e-3 to 3e-3 for bf16 and 3e-4 for fp16.
ROW_TOLERANCE = {"bf16": 6e-3, "fp16": 1e-3}
# A score is a sum of 576 exact products in fp32, scaled; the sum of exponentials is in fp32 too.
LSE_TOLERANCE = 2e-4


def check_rows(got: torch.Tensor, got_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, case: Case) -> float:
    empty = lse == -torch.inf
    error = (got.double() - out).norm(dim=-1) / out.norm(dim=-1).clamp_min(1e-30)
    lse_error = (got_lse.double() - lse).abs()
    is_right = (error <= ROW_TOLERANCE[case.dtype]) & (lse_error <= LSE_TOLERANCE * lse.abs().clamp_min(1.0))
    bad = ~torch.where(empty, (got == 0).all(-1) & (got_lse == -torch.inf), is_right)
    if bad.any():
        at = tuple(int(x) for x in bad.nonzero()[0])
        raise AssertionError(
            f"{case}: {int(bad.sum())} of {bad.numel()} rows are wrong, the first at {at}: error {error[at]:.2e}, "
            f"lse {got_lse[at]:.6f} for {lse[at]:.6f}, out[:4] {got[at][:4].tolist()} for {out[at][:4].tolist()}"
        )
    return float(torch.where(empty, 0.0, error).max())
