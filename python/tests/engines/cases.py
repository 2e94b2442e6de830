"""What the engine tests share: hostile torch inputs, and the check of a result that follows another library's conventions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mlakit import testing

SCALE = 192**-0.5  # DeepSeek's: of the head before absorption


def no_gpu() -> str:
    """Why the tests marked gpu cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device that torch sees"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is not sm_90, which the kernels are for"
    return ""


def dense_case(lengths: list[int], *, q_len: int = 1, q_heads: int = 16, causal: bool = True, **fields: Any) -> testing.Case:
    """A DeepSeek layer: 576/512, bf16, pages of 64."""
    options = f"scale{np.float32(SCALE)}" + (":causal" if causal else "")
    return testing.mla_case(lengths, options, q_heads=q_heads, q_len=q_len, **fields)


def inputs_of(case: testing.Case, *, device: str = "cpu", table_tail: int | None = None) -> testing.Inputs:
    """The case's tensors in torch. Unused slots are NaN and unused table entries garbage, or table_tail, an engine's own."""
    inputs = testing.make_inputs(case, "torch", device)
    if table_tail is not None:
        pages = -(-inputs.cache_seqlens[:, None] // case.parsed.page_size)
        is_unused = torch.arange(inputs.block_table.shape[1], device=device)[None, :] >= pages
        inputs.block_table[is_unused] = table_tail
    return inputs


def check(
    case: testing.Case, inputs: testing.Inputs, out: torch.Tensor, lse: torch.Tensor | None, *, empty_lse: float = -np.inf
) -> None:
    """Every row of out and lse, brought to mlakit's shapes by the caller, against the reference in double precision.

    empty_lse: the other library's mark of a row without keys.
    """
    want = testing.expect(case, inputs)
    testing.check_close(out, want.out, want.out_limit, f"out of {case}", one_minus_cosine=want.one_minus_cosine)
    if lse is not None:
        expected = np.where(np.isneginf(want.lse), empty_lse, want.lse)
        testing.check_close(lse, expected, want.lse_limit, f"lse of {case}")


def has_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
