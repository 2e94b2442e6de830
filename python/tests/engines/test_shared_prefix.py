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
        self,
        groups: list[tuple[int, list[int]]],
        *,
        q_len: int = 1,
        q_lens: tuple[int, ...] = (),
        causal: bool = True,
        device: str = "cpu",
        **fields: Any,
    ) -> None:
        """groups: (pages of the prefix, tokens of each suffix). q_lens: query tokens of each request, if they are ragged."""
        lengths = [pages * PAGE + n for pages, suffixes in groups for n in suffixes]
        options = f"scale{np.float32(cases.SCALE)}" + (":ragged" if q_lens else "") + (":causal" if causal else "")
        self.case = testing.mla_case(lengths, options, q_len=max(q_lens, default=q_len), q_lens=q_lens, **fields)
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
        begins = np.cumsum([0, *(q_lens or [q_len] * len(lengths))])
        tensors = {
            "prefix_table": prefix_rows,
            "prefix_seqlens": [pages * PAGE for pages, _ in groups],
            "cu_group_tokens": begins[requests].tolist(),
            "block_table": suffix_rows,
            "cache_seqlens": [n for _, suffixes in groups for n in suffixes],
        }
        self.call = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in tensors.items()}
        self.call |= {"q": self.inputs.q.to(device), "kv_cache": self.inputs.kv_cache.to(device)}
        for name in ("cu_seqlens_q", "sink"):
            if getattr(self.inputs, name) is not None:
                self.call[name] = getattr(self.inputs, name).to(device)
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, needs_gpu))])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("has_sink", [False, True])
def test_ragged_queries(has_sink: bool, causal: bool, device: str) -> None:
    shared = Shared(
        [(2, [5, 64]), (0, [9]), (4, [130, 3, 65])], q_lens=(1, 3, 0, 2, 4, 1), causal=causal, has_sink=has_sink, device=device
    )
    out, lse = mlakit.decode_shared_prefix(**shared.call, **shared.options)
    cases.check(shared.case, shared.inputs, out, lse)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, needs_gpu))])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_sink_counts_once_and_not_in_lse(groups: Any, device: str) -> None:
    shared = Shared(groups, q_len=2, has_sink=True, device=device)
    before = shared.call["sink"].clone()
    out, lse = mlakit.decode_shared_prefix(**shared.call, **shared.options)
    cases.check(shared.case, shared.inputs, out, lse)
    assert torch.equal(shared.call["sink"], before)


def test_a_sink_and_no_keys() -> None:
    shared = Shared([(0, [0, 3]), (1, [0])], has_sink=True)
    out, lse = mlakit.decode_shared_prefix(**shared.call, **shared.options)
    cases.check(shared.case, shared.inputs, out, lse)
    assert torch.isneginf(lse[0]).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, needs_gpu))])
@pytest.mark.parametrize("has_sink", [False, True])
@pytest.mark.parametrize(("q_len", "q_lens"), [(1, ()), (3, ()), (3, (2, 0, 3))])
def test_outputs_are_written_in_place(q_len: int, q_lens: tuple[int, ...], has_sink: bool, device: str) -> None:
    """Into parts of larger buffers, which are else left alone, and to the bits of new outputs."""
    shared = Shared([(2, [7, 64]), (1, [30])], q_len=q_len, q_lens=q_lens, has_sink=has_sink, device=device)
    expected = mlakit.decode_shared_prefix(**shared.call, **shared.options)
    rows = expected[1].shape
    out_memory = torch.full((*(2 * n for n in rows), 520), 7.0, dtype=torch.bfloat16, device=device)
    lse_memory = torch.full([2 * n for n in rows], 7.0, device=device)
    part = tuple(slice(1, 1 + n) for n in rows)
    out, lse = out_memory[(*part, slice(4, 516))], lse_memory[part]
    returned = mlakit.decode_shared_prefix(**shared.call, **shared.options, out=out, lse=lse)
    assert returned[0] is out
    assert returned[1] is lse
    assert cases.has_same_bits(out, expected[0])
    assert cases.has_same_bits(lse, expected[1])
    out.fill_(7.0)
    lse.fill_(7.0)
    assert (out_memory == 7.0).all()
    assert (lse_memory == 7.0).all()


def test_out_may_be_fp32() -> None:
    shared = Shared([(2, [7, 64])])
    rounded, _ = mlakit.decode_shared_prefix(**shared.call, **shared.options)
    out = torch.empty(rounded.shape)
    mlakit.decode_shared_prefix(**shared.call, **shared.options, out=out)
    assert cases.has_same_bits(out.bfloat16(), rounded)
    assert not torch.equal(out, rounded.float())


@pytest.mark.parametrize("name", ["out", "lse"])
def test_outputs_of_another_shape_are_refused(name: str) -> None:
    shared = Shared([(1, [3, 1])], q_len=2)
    wrong = torch.zeros((2, 3, 16, 512) if name == "out" else (2, 3, 16))
    expected = r"\[2, 2, 16, 512\]" if name == "out" else r"\[2, 2, 16\]"
    with pytest.raises(ValueError, match=rf"^{name}: expected shape {expected}, got \[2, 3, 16"):
        mlakit.decode_shared_prefix(**shared.call, **shared.options, **{name: wrong})
    assert not wrong.any()


def test_empty_suffixes_and_empty_requests() -> None:
    shared = Shared([(2, [0, 5, 0]), (0, [0, 3])])
    out, lse = mlakit.decode_shared_prefix(**shared.call, **shared.options)
    cases.check(shared.case, shared.inputs, out, lse)
    assert torch.isneginf(lse[3]).all()


@pytest.mark.parametrize("has_sink", [False, True])
def test_numpy_arrays(has_sink: bool) -> None:
    shared = Shared([(2, [5, 70])], has_sink=has_sink)
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


def test_a_ragged_suffix_shorter_than_its_query_tokens_is_refused() -> None:
    shared = Shared([(1, [3, 1])], q_lens=(4, 3))
    with pytest.raises(ValueError, match=r"^cache_seqlens: .* at least q_len - 1 = 2 tokens, got cache_seqlens\[1\] = 1"):
        mlakit.decode_shared_prefix(**shared.call, **shared.options)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_the_dimensions_of_q_say_whether_it_is_ragged(is_ragged: bool) -> None:
    shared = Shared([(1, [3, 1])], q_lens=(1, 1) if is_ragged else ())
    shared.call["q"] = shared.call["q"][:, None] if is_ragged else shared.call["q"][:, 0]
    expected = r"\[tokens, q_heads, head_dim\] because" if is_ragged else r"\[batch, q_len, q_heads, head_dim\], got"
    with pytest.raises(ValueError, match=rf"^q: expected {expected}.* shape \[2, (1, )?16, 576\]"):
        mlakit.decode_shared_prefix(**shared.call, **shared.options)
