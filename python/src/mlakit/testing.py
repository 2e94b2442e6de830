"""Test cases, hostile inputs for them, and the one table of tolerances; shared by tests, fuzzing, benchmarks and replay.

    case = testing.NAMED_CASES["ragged"]
    inputs = testing.make_inputs(case)
    mlakit.mla_decode(*inputs.positional, **inputs.keywords, out=inputs.out, lse=inputs.lse)
    testing.check_decode(case, inputs)

Needs numpy and ml_dtypes, and torch for framework="torch".
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import reference
from ._problem import Problem

# ------------------------------------------------------------------------------------------------------------- tolerances


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a right answer may be from the float64 reference, for q and cache of one element type.

    Bounds are for every element of every row, from the row's own reference numbers, so that an unlucky tiny case passes and a
    wrong row among millions does not:

        |out - ref| <= (weight + score_error + sums) * sum_j p_j |v_j| + one rounding of out
        |lse - ref| <= score_error + sums
    """

    weight: float
    """Relative error of a softmax weight as the plain computation in the element type keeps it, times 2."""
    one_minus_cosine: float
    """For rows of at least COSINE_COLUMNS columns: finds a bias that the element bound lets pass."""


# Unit roundoffs: half the distance from 1 to the next number.
ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}

# The one table. Every row with its reason.
TOLERANCES = {
    # A flash kernel rounds each weight to the element type before the second product; twice that error is what the field accepts.
    # The cosine: the whole row off by one unit roundoff, r^2 / 2.
    "bf16": Tolerance(weight=2 * ROUNDOFF["bf16"], one_minus_cosine=ROUNDOFF["bf16"] ** 2 / 2),
    "fp16": Tolerance(weight=2 * ROUNDOFF["fp16"], one_minus_cosine=ROUNDOFF["fp16"] ** 2 / 2),
    # exp2 by a polynomial in fp32: 2 ulp, twice.
    "fp32": Tolerance(weight=2 * 4 * ROUNDOFF["fp32"], one_minus_cosine=1e-10),
    # The reference backend works in float64: only its fp32 softmax_scale and the rounding of its results are left.
    "exact": Tolerance(weight=2.0**-40, one_minus_cosine=0.0),
}
COSINE_COLUMNS = 64

# fp32 sums of n terms: errors of single additions are independent, so they grow as sqrt(n); 4 standard deviations. The terms of a
# score vary in sign, and its running sum stays near the root of their squares.
SUM_SIGMAS = 4.0
# What fp32 arithmetic adds to any lse: log2 and exp2 by polynomials, the change of base.
LSE_FLOOR = 2.0**-20
# Smallest distances of numbers near 0, where a rounding is no longer relative.
SMALLEST = {"bf16": 2.0**-133, "fp16": 2.0**-24, "fp32": 2.0**-126}


@dataclasses.dataclass(frozen=True)
class Expected:
    """The reference result of a call, with what a right answer may differ by at each element."""

    out: Any
    lse: Any
    out_limit: Any
    lse_limit: Any
    one_minus_cosine: Any
    """For each row."""


def expect(case: Case, inputs: Inputs, *, exact: bool = False) -> Expected:
    """The float64 reference of a case and its limits. exact: for a backend that computes in float64 ("reference")."""
    import numpy as np

    problem = case.parsed
    tolerance = TOLERANCES["exact" if exact else problem.q_dtype]
    arguments = {name: None if value is None else reference.to_numpy(value) for name, value in inputs.tensors().items()}
    queries, kv, sink = arguments["q"], arguments["kv_cache"], arguments["sink"]
    scale = problem.softmax_scale or problem.head_dim**-0.5
    keywords: dict[str, Any] = {
        "cu_seqlens_q": arguments["cu_seqlens_q"],
        "causal": problem.causal,
        "q_rope": arguments["q_rope"],
        "kv_rope": arguments["kv_rope"],
    }
    table, lengths = arguments["block_table"], arguments["cache_seqlens"]
    out, lse = reference.mla_decode_reference(
        *(queries, kv, table, lengths),
        **keywords,
        value_dim=problem.value_dim,
        softmax_scale=scale,
        sink=sink,
        lse_base=problem.lse_base,
    )
    out_limit, lse_limit = np.zeros_like(out), np.zeros_like(lse)
    out_dtype = problem.out_dtype or problem.q_dtype
    cosine = np.full_like(lse, max(tolerance.one_minus_cosine, ROUNDOFF[out_dtype] ** 2 / 2, 1e-12))
    sum_error = SUM_SIGMAS * ROUNDOFF["fp32"]
    with np.errstate(all="ignore"):
        for group in reference.groups(queries, kv, table, lengths, **keywords):
            seen = group.visible[:, None, :]
            weights, row_lse = reference.softmax(scale * (group.q @ group.keys.T), seen)
            magnitude = scale * math.sqrt(problem.head_dim) * np.sqrt(np.where(seen, group.q**2 @ (group.keys**2).T, 0.0).max(-1))
            n = np.maximum(group.visible.sum(-1), 1)[:, None]
            if exact:
                # The default scale is rounded to fp32 once, which moves all scores of a row alike.
                score_error = ROUNDOFF["fp32"] * magnitude
                sums, floor = np.zeros_like(magnitude), 0.0
            else:
                score_error = sum_error * magnitude
                sums, floor = sum_error * (np.sqrt(n) + np.abs(np.nan_to_num(row_lse, neginf=0.0))), LSE_FLOOR
            values = np.abs(group.keys[:, : problem.value_dim])
            spread = reference.weighted_sum(weights, values, group.visible)
            # An error of the scores moves a row by as much, so its cosine by the square of that.
            cosine[group.index] += (2 * score_error) ** 2 / 2
            out_limit[group.index] = (tolerance.weight + 2 * score_error + sums)[..., None] * spread
            lse_limit[group.index] = score_error + sums + floor
    if problem.lse_base == "2":
        lse_limit = lse_limit / reference.LN2
    lse_limit = lse_limit + ROUNDOFF["fp32"] * np.abs(np.nan_to_num(lse, neginf=0.0))
    out_limit = out_limit + ROUNDOFF[out_dtype] * np.abs(out) * (1 + 2.0**-6) + SMALLEST[out_dtype]
    # A row of numbers so small that the type holds only some of their bits (a sink can do that) has no direction.
    cosine[np.abs(out).max(-1) < 4 * SMALLEST[out_dtype] / ROUNDOFF[out_dtype]] = np.inf
    return Expected(out, lse, out_limit, lse_limit, cosine)


def check_decode(case: Case, inputs: Inputs, *, exact: bool = False, what: str = "", want: Expected | None = None) -> None:
    """Checks inputs.out and inputs.lse, written by a decode, against the float64 reference (want, if it is known already)."""
    want = want or expect(case, inputs, exact=exact)
    try:
        check_close(inputs.out, want.out, want.out_limit, "out", one_minus_cosine=want.one_minus_cosine)
        if inputs.lse is not None:
            check_close(inputs.lse, want.lse, want.lse_limit, "lse")
    except AssertionError as failure:
        raise AssertionError(f"{what + ': ' if what else ''}{failure}; case {case}") from None


def check_close(got: Any, want: Any, limit: Any, label: str = "", *, one_minus_cosine: Any = None) -> None:
    """Raises AssertionError with the first coordinate that is off, both values, and the label.

    Args:
        got: any framework, any element type.
        want: float64; NaN and infinities must be at exactly the same places.
        limit: the largest |got - want|, a number or an array of want's shape.
        one_minus_cosine: also the largest 1 - cosine of each row (last axis) of at least COSINE_COLUMNS finite columns; a
            number, or one for each row.
    """
    import numpy as np

    got, want = reference.float64(got), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{label}: shape {got.shape}, expected {want.shape}"
    is_finite = np.isfinite(want)
    with np.errstate(all="ignore"):
        is_same = np.where(is_finite, np.abs(got - want) <= limit, (got == want) | (np.isnan(got) & np.isnan(want)))
    if not is_same.all():
        at = tuple(int(i) for i in np.argwhere(~is_same)[0])
        allowed = np.broadcast_to(limit, want.shape)[at]
        raise AssertionError(
            f"{label}: {np.count_nonzero(~is_same)} of {want.size} are off, first {list(at)}: got {got[at]!r}, expected "
            f"{want[at]!r} +- {allowed:.3g}"
        )
    if one_minus_cosine is None or want.ndim == 0 or want.shape[-1] < COSINE_COLUMNS:
        return
    rows = is_finite.all(-1) & (want != 0).any(-1)
    a, b = got[rows], want[rows]
    allowed = np.broadcast_to(one_minus_cosine, want.shape[:-1])[rows]
    with np.errstate(invalid="ignore"):
        off = 1 - (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    off = np.where(np.isnan(off), np.where(allowed == np.inf, 0.0, 1.0), off)  # a row of zeros
    if (off > allowed).any():
        row = int(np.argmax(off - allowed))
        raise AssertionError(
            f"{label}: row {np.argwhere(rows)[row].tolist()}: 1 - cosine is {off[row]:.3g}, allowed {allowed[row]:.3g}"
        )


# ------------------------------------------------------------------------------------------------------------------ cases


@dataclasses.dataclass(frozen=True)
class Memory:
    """A layout: axes from the outermost in memory to the innermost, elements left free after the extent of each axis (by axis),
    and the stride of the innermost axis."""

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, in full: everything about it follows from these fields. Its JSON is the format of every stored case."""

    problem: str
    """The one-line form, such as "dense:fp32:b2:q1:h4:d16:v8:p4:l32"."""
    lengths: tuple[int, ...]
    """Cached tokens of each request."""
    q_lens: tuple[int, ...] = ()
    """Ragged q only: query tokens of each request."""
    seed: int = 0
    spread: float = 1.0
    """Standard deviation of the scores: large ones make a softmax that sees a single key."""
    spare_pages: int = 3
    """Pages of the pool that no request owns; their ids are spread among the others."""
    table_tail: int = 1
    """Entries of garbage after the last page of the longest request."""
    memory: Mapping[str, Memory] = dataclasses.field(default_factory=dict)
    """How tensors lie in memory, by their names in Inputs; compact and row major where nothing is said."""
    is_split: bool = False
    """latent and rope come as two tensors."""
    has_sink: bool = False
    has_lse: bool = True
    note: str = ""
    """What the case is kept for."""

    @property
    def parsed(self) -> Problem:
        return _parse(self.problem)

    @classmethod
    def from_json(cls, text: str) -> Case:
        fields = json.loads(text)
        for name in ("lengths", "q_lens"):
            fields[name] = tuple(fields.get(name, ()))
        fields["memory"] = {
            name: Memory(tuple(memory["order"]), tuple(memory["gaps"]), memory["step"])
            for name, memory in fields.get("memory", {}).items()
        }
        return cls(**fields)

    def to_json(self) -> str:
        """One line; fields at their default are left out."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)} | {"memory": {}}
        fields = dataclasses.asdict(self)
        return json.dumps({name: value for name, value in fields.items() if value != defaults[name]})

    def __str__(self) -> str:
        return self.to_json()

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Problem:
    return Problem.parse(text)


def mla_case(lengths: Sequence[int], options: str = "", *, q_heads: int = 16, q_len: int = 1, **fields: Any) -> Case:
    """A 576/512 bf16 case with page size 64 of these lengths; options go to the end of the problem string."""
    head = f"dense:bf16:b{len(lengths)}:q{q_len}:h{q_heads}:k1:d576:v512:p64:l{max(1, *lengths)}"
    return Case(head + (f":{options}" if options else ""), tuple(lengths), **fields)


def _small(dtype: str, shape: str, lengths: Sequence[int], **fields: Any) -> Case:
    return Case(f"dense:{dtype}:b{len(lengths)}:{shape}:l{max(1, *lengths)}", tuple(lengths), **fields)


# What tests run by name and benchmarks may time. Lengths cover 0, 1, a page less one, a page, a page and one.
NAMED_CASES: dict[str, Case] = {
    "one_token": mla_case([1]),
    "one_page": mla_case([64]),
    "page_edges": mla_case([63, 64, 65, 127, 128, 129]),
    "mixed": mla_case([130, 0, 1000, 1, 64]),
    "all_empty": mla_case([0, 0, 0]),
    "two_tokens_causal": mla_case([5, 64, 200], "causal", q_len=2),
    "causal_hides_all": mla_case([1, 2, 0, 300], "causal", q_len=4),
    "many_heads": mla_case([300, 77], q_heads=128),
    "odd_heads": mla_case([300, 77], q_heads=63),
    "three_heads": mla_case([200], q_heads=3),
    "ragged": mla_case([100, 0, 65, 300], "ragged", q_len=5, q_lens=(1, 3, 0, 5)),
    "ragged_causal": mla_case([100, 2, 65, 300], "ragged:causal", q_len=5, q_lens=(1, 3, 0, 5)),
    "sink": mla_case([130, 0, 65], has_sink=True),
    "lse_base_2": mla_case([130, 0, 65], "lse2"),
    "no_lse": mla_case([130, 0, 65], has_lse=False),
    "softmax_scale": mla_case([130, 0, 65], "scale0.07216878"),
    "peaky": mla_case([500, 65], spread=16.0),
    "two_views": mla_case([130, 0, 65], is_split=True),
    "strided": mla_case(
        [130, 0, 65],
        q_len=2,
        memory={
            "q": Memory((1, 0, 2, 3), (3, 0, 5, 32)),
            "kv_cache": Memory((0, 1, 2, 3), (7, 0, 0, 64)),
            "block_table": Memory((0, 1), (0, 9)),
            "cache_seqlens": Memory((0,), (0,), 2),
            "out": Memory((0, 2, 1, 3), (0, 8, 0, 16)),
            "lse": Memory((0, 2, 1), (1, 2, 3), 2),
        },
    ),
    "fixed_chunk": mla_case([1000, 0, 64, 257], "chunk64"),
    "long": mla_case([5000]),
    "fp32_out": mla_case([130, 65], "outfp32"),
    "fp16": _small("fp16", "q1:h16:k1:d576:v512:p64", [130, 0, 65]),
    "fp32": _small("fp32", "q1:h16:k1:d576:v512:p64", [130, 0, 65]),
    "no_rope": _small("bf16", "q1:h16:k1:d512:v512:p64", [130, 0, 65]),
    "dim_320": _small("bf16", "q1:h16:k1:d320:v256:p64", [130, 0, 65]),
    "two_kv_heads": _small("bf16", "q2:h18:k2:d576:v512:p64", [130, 0, 65]),
    "page_1": _small("bf16", "q1:h16:k1:d576:v512:p1", [130, 0, 65]),
    "page_16": _small("bf16", "q1:h16:k1:d576:v512:p16", [130, 0, 65]),
    "page_256": _small("bf16", "q1:h16:k1:d576:v512:p256", [300, 0, 65]),
    "tiny": _small("fp32", "q3:h2:k1:d5:v3:p3:causal", [7, 0, 1]),
}


# ----------------------------------------------------------------------------------------------------------------- inputs


@dataclasses.dataclass
class Inputs:
    """The tensors of a case. Whatever a right decode must not read is NaN or garbage; whatever it must write is NaN."""

    q: Any
    q_rope: Any
    kv_cache: Any
    kv_rope: Any
    block_table: Any
    cache_seqlens: Any
    cu_seqlens_q: Any
    sink: Any
    out: Any
    lse: Any
    keywords: dict[str, Any]
    """The keyword arguments of mlakit.mla_decode, but for out and lse."""
    global_seqlens: Any = None
    """Never made by make_inputs: a case is whole, and a test that shards it sets this."""

    @property
    def positional(self) -> tuple[Any, Any, Any, Any]:
        """The positional arguments of mlakit.mla_decode."""
        kv = self.kv_cache if self.kv_rope is None else (self.kv_cache, self.kv_rope)
        return self.q, kv, self.block_table, self.cache_seqlens

    def tensors(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in TENSOR_NAMES}


TENSOR_NAMES = (
    *("q", "q_rope", "kv_cache", "kv_rope", "block_table", "cache_seqlens", "cu_seqlens_q", "sink", "out", "lse"),
    "global_seqlens",
)
# What the unused entries of a block table hold, in turn.
TABLE_GARBAGE = (2147480000, -1, -(2**31), 7_000_000)


def make_inputs(case: Case, framework: str = "numpy", device: str = "cpu") -> Inputs:
    """The case's tensors: "numpy" (bf16 by ml_dtypes) or "torch" on a device.

    The pages of each request are spread at random over a pool that is larger than needed. Cached tokens past a request's length,
    pages of nobody, gaps between rows, and the outputs are NaN; table entries past a request's last page are garbage.
    """
    import numpy as np

    problem = case.parsed
    rng = np.random.default_rng(case.seed)
    batch, page_size, lengths = len(case.lengths), problem.page_size, case.lengths
    split = problem.value_dim if case.is_split else problem.head_dim
    q_dtype, kv_dtype = numpy_dtype(problem.q_dtype), numpy_dtype(problem.kv_dtype or problem.q_dtype)
    rows: tuple[int, ...] = (batch, problem.q_len, problem.q_heads)
    cu_seqlens_q = None
    if problem.ragged_q:
        rows = (sum(case.q_lens), problem.q_heads)
        cu_seqlens_q = np.cumsum([0, *case.q_lens]).astype(np.int32)

    def place(name: str, shape: tuple[int, ...], dtype: Any, fill: Any) -> Any:
        return _strided(shape, dtype, case.memory.get(name) or Memory(tuple(range(len(shape))), (0,) * len(shape)), fill)

    # With the default softmax_scale, products of standard normal rows have deviation 1.
    queries = (case.spread * rng.standard_normal((*rows, problem.head_dim), np.float32)).astype(q_dtype)
    q = place("q", (*rows, split), q_dtype, np.nan)
    q[...] = queries[..., :split]
    q_rope = kv_rope = None
    if case.is_split:
        q_rope = place("q_rope", (*rows, problem.head_dim - split), q_dtype, np.nan)
        q_rope[...] = queries[..., split:]

    counts = [-(-n // page_size) for n in lengths]
    pages = sum(counts) + case.spare_pages
    ids = rng.permutation(max(pages, 1)).astype(np.int32)
    cache_shape = (max(pages, 1), page_size, problem.kv_heads)
    kv_cache = place("kv_cache", (*cache_shape, split), kv_dtype, np.nan)
    if case.is_split:
        kv_rope = place("kv_rope", (*cache_shape, problem.head_dim - split), kv_dtype, np.nan)
    table = place("block_table", (batch, max([1, *counts]) + case.table_tail), np.int32, TABLE_GARBAGE[0])
    table[...] = np.resize(np.array(TABLE_GARBAGE, np.int32), table.shape)
    first = 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count] = ids[first : first + count]
        first += count
        values = rng.standard_normal((length, problem.kv_heads, problem.head_dim), np.float32).astype(kv_dtype)
        position = np.arange(length)
        where = (table[b, position // page_size], position % page_size)
        kv_cache[where] = values[..., :split]
        if kv_rope is not None:
            kv_rope[where] = values[..., split:]

    cache_seqlens = place("cache_seqlens", (batch,), np.int32, -1)
    cache_seqlens[...] = lengths
    sink = rng.standard_normal(problem.q_heads, np.float32) if case.has_sink else None
    out = place("out", (*rows, problem.value_dim), numpy_dtype(problem.out_dtype or problem.q_dtype), np.nan)
    lse = place("lse", rows, np.dtype(np.float32), np.nan) if case.has_lse else None

    arrays = {
        "q": q,
        "q_rope": q_rope,
        "kv_cache": kv_cache,
        "kv_rope": kv_rope,
        "block_table": table,
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_q": cu_seqlens_q,
        "sink": sink,
        "out": out,
        "lse": lse,
    }
    arrays = {name: None if array is None else convert(array, framework, device) for name, array in arrays.items()}
    keywords = {
        "value_dim": problem.value_dim,
        "causal": problem.causal,
        "softmax_scale": problem.softmax_scale,
        "lse_base": problem.lse_base,
        "split": problem.split,
        "chunk_tokens": problem.chunk_tokens,
        **{name: arrays[name] for name in ("cu_seqlens_q", "q_rope", "sink")},
    }
    return Inputs(**arrays, keywords=keywords)


def numpy_dtype(name: str) -> Any:
    """The numpy type of one of Problem's element types."""
    import numpy as np

    if name == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"fp16": np.float16, "fp32": np.float32, "int32": np.int32}[name])


def convert(array: Any, framework: str, device: str = "cpu") -> Any:
    """A numpy array as one of another framework with the same strides; on the CPU it shares the memory."""
    if framework == "numpy":
        return array
    if framework != "torch":
        raise ValueError(f"framework: expected 'numpy' or 'torch', got {framework!r}")
    import torch

    is_bf16 = array.dtype.name == "bfloat16"
    base = array if array.base is None else array.base
    flat = torch.from_numpy(base.view("int16") if is_bf16 else base)
    flat = (flat.view(torch.bfloat16) if is_bf16 else flat).to(device)
    return flat.as_strided(array.shape, [stride // array.itemsize for stride in array.strides])


def _strided(shape: tuple[int, ...], dtype: Any, memory: Memory, fill: Any) -> Any:
    """An array of this layout over memory of its own, all of it filled."""
    import numpy as np

    strides, step = [0] * len(shape), memory.step
    for axis in reversed(memory.order):
        strides[axis] = step
        step = step * shape[axis] + memory.gaps[axis]
    base = np.full(max(step, 1), fill, dtype)
    return np.ndarray(shape, base.dtype, base, 0, [stride * base.itemsize for stride in strides])
