"""FlashInfer's MLA wrapper: plan once a step, run once a layer, the page lists of all requests in one flat tensor.

    from mlakit.compat.flashinfer import BatchMLAPagedAttentionWrapper

lse is in base 2, as FlashInfer's, unless `return_lse_base_on_e` is set; -inf for a row without keys. `plan` reads its tensors on
the host, as FlashInfer's does, so it stays outside of a CUDA graph; `run` may be inside. With use_cuda_graph, plan rewrites the
buffers that a captured run reads, so that replays see the new lengths and pages.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from .._plan import Plan, Schedule
from .._problem import Problem
from .._torch import DTYPES
from ._refuse import refuse_given

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class BatchMLAPagedAttentionWrapper:
    """Attention of a ragged batch over a paged latent cache.

    Args:
        float_workspace_buffer: of FlashInfer's interface; its device is where the work runs, its memory is not used.
        use_cuda_graph: keep the buffers that `run` reads from plan to plan. Needs kv_indices and kv_len_arr for their sizes.
        kv_indices: with use_cuda_graph: as long as the longest page list of all requests together.
        kv_len_arr: with use_cuda_graph: as long as the largest batch.
        qo_indptr, kv_indptr: taken; mlakit keeps buffers of its own.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        if use_cuda_graph and (kv_indices is None or kv_len_arr is None):
            raise ValueError("kv_indices and kv_len_arr: expected tensors of the largest sizes with use_cuda_graph, got None")
        self._device = float_workspace_buffer.device
        self._is_graph = use_cuda_graph
        self._most_pages = kv_indices.numel() if use_cuda_graph and kv_indices is not None else 0
        self._batch = kv_len_arr.numel() if use_cuda_graph and kv_len_arr is not None else 0
        self._plans: dict[tuple[Problem, bool], Plan] = {}
        self._key: Problem | None = None
        self._buffers: dict[str, Any] = {}

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        """Takes a step's lengths and pages.

        Args:
            qo_indptr, kv_indptr: int32 [batch + 1]: where each request's query tokens and pages begin.
            kv_indices: int32, the page ids of all requests. kv_len_arr: int32 [batch], cached tokens.
        """
        refuse_given("BatchMLAPagedAttentionWrapper.plan", "there is no profiler buffer", use_profiler=use_profiler)
        for name, dtype in (("q_data_type", q_data_type), ("kv_data_type", kv_data_type)):
            if dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise NotImplementedError(f"{name}: mlakit takes bf16, fp16 and fp32, got {dtype}: convert it")
        begins, pages_begin, lengths = qo_indptr.tolist(), kv_indptr.tolist(), kv_len_arr.tolist()
        batch = len(lengths)
        if len(begins) != batch + 1 or len(pages_begin) != batch + 1:
            raise ValueError(
                f"qo_indptr and kv_indptr: expected {batch + 1} entries for {batch} lengths, got {len(begins)} and "
                f"{len(pages_begin)}"
            )
        if self._is_graph and batch != self._batch:
            raise ValueError(f"kv_len_arr: expected the batch of the graph, {self._batch}, got {batch}")
        pages = [end - begin for begin, end in itertools.pairwise(pages_begin)]
        for b, (length, count) in enumerate(zip(lengths, pages, strict=True)):
            if length > count * page_size:
                raise ValueError(f"kv_len_arr[{b}]: expected at most {count} pages of {page_size} tokens, got {length}")
        width = max(self._most_pages, *pages, 1)
        table = [row + [-1] * (width - len(row)) for row in _rows(kv_indices.tolist(), pages_begin)]
        problem = Problem(
            device=str(self._device),
            q_dtype=_DTYPE_NAMES[q_data_type],  # type: ignore[arg-type]
            kv_dtype=_DTYPE_NAMES[kv_data_type],  # type: ignore[arg-type]
            ragged_q=True,
            max_batch=batch,
            q_len=_power_of_2(max([e - b for b, e in itertools.pairwise(begins)], default=1)),
            max_len=_power_of_2(width * page_size),
            q_heads=num_heads,
            head_dim=head_dim_ckv + head_dim_kpe,
            value_dim=head_dim_ckv,
            page_size=page_size,
            causal=causal,
            softmax_scale=sm_scale,
            lse_base="2",
        )
        if self._is_graph and self._key is not None and problem != self._key:
            raise ValueError(f"plan: a captured run expects {self._key}, got {problem}: make another wrapper")
        self._key = problem
        self._set("table", torch.tensor(table, dtype=torch.int32).reshape(batch, width))
        self._set("lengths", kv_len_arr.to(torch.int32))
        self._set("begins", qo_indptr.to(torch.int32))

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
    ) -> Any:
        """One layer.

        Args:
            q_nope: [tokens, heads, head_dim_ckv]. q_pe: [tokens, heads, head_dim_kpe].
            ckv_cache: [pages, page_size, head_dim_ckv]. kpe_cache: [pages, page_size, head_dim_kpe].
            out, lse: written in place, [tokens, heads, head_dim_ckv] and fp32 [tokens, heads].

        Returns:
            out, or (out, lse) with return_lse.
        """
        refuse_given(
            "BatchMLAPagedAttentionWrapper.run", "lengths and pages come with plan", kv_len=kv_len, page_table=page_table
        )
        refuse_given("BatchMLAPagedAttentionWrapper.run", "there is no profiler", profiler_buffer=profiler_buffer)
        if self._key is None:
            raise ValueError("run: expected plan to be called first")
        plan = self._plan(return_lse_base_on_e)
        # The schedule is made here, from the buffers: a captured run then follows what plan has put there since.
        schedule: Schedule = plan.schedule(self._buffers["lengths"], self._buffers["begins"])
        out, lse = plan.decode(
            q_nope,
            ckv_cache.unsqueeze(2),
            self._buffers["table"],
            schedule,
            q_rope=q_pe if q_pe.shape[-1] else None,
            kv_rope=kpe_cache.unsqueeze(2) if q_pe.shape[-1] else None,
            out=out,
            lse=lse,
            return_lse=return_lse,
        )
        return (out, lse) if return_lse else out

    def _plan(self, is_base_e: bool) -> Plan:
        assert self._key is not None
        key = (self._key, is_base_e)
        if key not in self._plans:
            self._plans[key] = Plan(dataclasses.replace(self._key, lse_base="e" if is_base_e else "2"))
        return self._plans[key]

    def _set(self, name: str, value: torch.Tensor) -> None:
        if self._is_graph and name in self._buffers:
            self._buffers[name].copy_(value)
        else:
            self._buffers[name] = value.to(self._device, copy=True)


def _rows(indices: list[int], begins: list[int]) -> list[list[int]]:
    return [indices[begin:end] for begin, end in itertools.pairwise(begins)]


def _power_of_2(n: int) -> int:
    """So few plans serve a growing batch or cache."""
    return 1 << max(n - 1, 0).bit_length()
