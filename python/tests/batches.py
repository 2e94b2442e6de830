"""mlakit.testing's hostile batches in a form that is short to call."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import mlakit
from mlakit import testing

NUMPY_DTYPES = {name: testing.numpy_dtype(name) for name in ("fp32", "fp16", "bf16")}


class Batch:
    """The tensors of a testing.Case as numpy arrays: q, kv_cache, block_table, cache_seqlens, cu_seqlens_q."""

    def __init__(self, case: testing.Case) -> None:
        self.case = case
        self.inputs = testing.make_inputs(case)
        self.q, self.kv_cache = self.inputs.q, self.inputs.kv_cache
        self.block_table, self.cache_seqlens = self.inputs.block_table, self.inputs.cache_seqlens
        self.cu_seqlens_q = self.inputs.cu_seqlens_q

    def outputs(self) -> tuple[Any, Any]:
        """New out and lse, full of NaN."""
        return np.full_like(self.inputs.out, np.nan), np.full_like(self.inputs.lse, np.nan)

    def to_torch(self, name: str) -> Any:
        """The tensor of that name as a torch tensor over the same memory."""
        return testing.convert(getattr(self, name), "torch")

    def check(self, out: Any, lse: Any, *, sink: Any = None, **changes: Any) -> None:
        """Every row against the reference in double precision. changes: fields of the problem that the call had."""
        out_dtype = next(name for name, dtype in NUMPY_DTYPES.items() if dtype == out.dtype)
        problem = dataclasses.replace(self.case.parsed, out_dtype=out_dtype, **changes)
        inputs = dataclasses.replace(
            self.inputs, q=self.q, kv_cache=self.kv_cache, block_table=self.block_table, out=out, lse=lse, sink=sink
        )
        testing.check_decode(self.case.replace(problem=str(problem)), inputs)


def make_batch(
    lengths: list[int],
    *,
    dtype: str = "fp32",
    q_len: int = 1,
    q_lens: list[int] | None = None,
    q_heads: int = 4,
    kv_heads: int = 1,
    head_dim: int = 576,
    value_dim: int = 512,
    page_size: int = 64,
    seed: int = 0,
) -> Batch:
    problem = mlakit.Problem(
        q_dtype=dtype,  # type: ignore[arg-type]
        max_batch=len(lengths),
        max_len=max(1, *lengths, 1),
        q_len=q_len if q_lens is None else max(q_lens),
        ragged_q=q_lens is not None,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        page_size=page_size,
    )
    return Batch(testing.Case(str(problem), tuple(lengths), tuple(q_lens or ()), seed=seed))
