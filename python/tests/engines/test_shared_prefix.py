"""mlakit.decode_shared_prefix: the same rows as plain decode over prefix and suffix together."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch

import mlakit
from mlakit import testing

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(bool(cases.no_gpu()), reason=cases.no_gpu() or "a GPU is there")
PAGE = 64


class Shared:
    """Requests in groups with a common prefix, over an ordinary case: a prefix is the first pages of a group."""

    def __init__(
        self, groups: list[tuple[int, list[int]]], *, q_len: int = 1, causal: bool = True, device: str = "cpu", **fields: Any
    ) -> None:
        """groups: (pages of the prefix, tokens of each suffix)."""
        self.suffixes = [n for _, suffixes in groups for n in suffixes]
        lengths = [pages * PAGE + n for pages, suffixes in groups for n in suffixes]
        self.case = cases.dense_case(lengths, q_len=q_len, causal=causal, **fields)
        self.inputs = testing.make_inputs(self.case, "torch")
        prefix_rows, suffix_rows, requests = [], [], [0]
        width = self.inputs.block_table.shape[1]
        for pages, suffixes in groups:
            first = requests[-1]
            prefix_rows.append(self.inputs.block_table[first, :pages].tolist() + [-1] * (width - pages))
            for b in range(first, first + len(suffixes)):
                self.inputs.block_table[b, :pages] = self.inputs.block_table[first, :pages]
                suffix_rows.append(self.inputs.block_table[b, pages:].tolist() + [-5] * pages)
            requests.append(first + len(suffixes))
        tensors = {
            "prefix_table": prefix_rows,
            "prefix_seqlens": [pages * PAGE for pages, _ in groups],
            "cu_group_tokens": [r * q_len for r in requests],
            "block_table": suffix_rows,
            "cache_seqlens": self.suffixes,
        }
        self.call = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in tensors.items()}
        self.call |= {"q": self.inputs.q.to(device), "kv_cache": self.inputs.kv_cache.to(device)}
        self.options: dict[str, Any] = {"causal": causal, "softmax_scale": cases.SCALE}


GROUPS = {
    "one group": [(3, [10, 70, 1])],
    "two groups": [(2, [5, 64]), (4, [130, 1, 65])],
    "an empty prefix and lone requests": [(0, [30]), (1, [7]), (2, [300, 2])],
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, needs_gpu))])
@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_rows_are_those_of_plain_decode(groups: Any, causal: bool, q_len: int, device: str) -> None:
    shared = Shared(groups, q_len=q_len, causal=causal, device=device)
    out, lse = mlakit.decode_shared_prefix(**shared.call, **shared.options)
    cases.check(shared.case, shared.inputs, out, lse)


def test_empty_suffixes_and_empty_requests() -> None:
    shared = Shared([(2, [0, 5, 0]), (0, [0, 3])])
    out, lse = mlakit.decode_shared_prefix(**shared.call, **shared.options)
    cases.check(shared.case, shared.inputs, out, lse)
    assert torch.isneginf(lse[3]).all()


def test_numpy_arrays() -> None:
    shared = Shared([(2, [5, 70])])
    bf16 = testing.numpy_dtype("bf16")
    arrays = {
        n: t.view(torch.int16).numpy().view(bf16) if t.dtype == torch.bfloat16 else t.numpy() for n, t in shared.call.items()
    }
    out, lse = mlakit.decode_shared_prefix(**arrays, **shared.options)
    assert isinstance(out, np.ndarray)
    assert out.dtype == bf16
    cases.check(shared.case, shared.inputs, torch.from_numpy(out.astype(np.float32)), torch.from_numpy(lse))


def test_a_suffix_shorter_than_its_query_tokens_is_refused() -> None:
    """Its first query token would have to be kept from the end of the prefix, which is decoded without a mask."""
    shared = Shared([(1, [3, 1])], q_len=3)
    with pytest.raises(
        ValueError, match=r"^cache_seqlens: .* at least q_len - 1 = 2 tokens, got cache_seqlens\[1\] = 1: end the prefix"
    ):
        mlakit.decode_shared_prefix(**shared.call, **shared.options)


def test_ragged_q_is_refused() -> None:
    shared = Shared([(1, [3, 1])])
    shared.call["q"] = shared.call["q"][:, 0]
    with pytest.raises(ValueError, match=r"^q: expected \[batch, q_len, q_heads, head_dim\], got shape \[2, 16, 576\]"):
        mlakit.decode_shared_prefix(**shared.call, **shared.options)
