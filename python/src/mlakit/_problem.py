"""Problem: what one plan is for, as a frozen dataclass; the one place that maps its names to mla_problem's numbers."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from . import _ext

DType = Literal["bf16", "fp16", "fp32", "e4m3"]
KvFormat = Literal["plain", "fp8_tensor", "fp8_656", "fp8_584"]
Split = Literal["balanced", "fixed_chunk"]
LseBase = Literal["e", "2"]

DEVICES, DTYPES, KV_FORMATS, SPLITS = _ext.devices(), _ext.dtypes(), _ext.kv_formats(), _ext.splits()
_FLAG_BITS = _ext.flags()

# Fields that mla_problem has under the same name, as plain numbers.
_NUMBERS = (
    *("max_batch", "q_len", "max_q_tokens", "max_len", "max_tokens", "q_heads", "kv_heads", "head_dim", "value_dim"),
    *("page_size", "chunk_tokens", "topk", "cp_world", "cp_rank", "cp_turn"),
)
_FLAGS = ("causal", "ragged_q", "tree_mask", "extra_segment", "debug")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Static facts and maxima of the calls that one plan serves.

    The batch, the lengths and the tables come with each call and may be anything up to the maxima. Values are checked by the
    library when a plan is made (`ValueError`), or refused for want of a backend (`NotImplementedError`).

    `str(problem)` is the library's one-line form, which messages, benchmarks and the command line share;
    `Problem.parse` reads it.
    """

    q_heads: int
    """Query heads, a multiple of kv_heads."""
    max_len: int
    """Most cached tokens of one request."""
    max_batch: int = 1
    """Most requests in a call."""
    q_len: int = 1
    """Query tokens of a request: exact for uniform q, the most of any one request for ragged q."""
    max_q_tokens: int = 0
    """Ragged q: most query tokens in a call; 0: max_batch * q_len."""
    max_tokens: int = 0
    """Most cached tokens of all requests of a call together; 0: max_batch * max_len. Kernels are chosen for it: a close number
    is the fast one."""
    kv_heads: int = 1
    head_dim: int = 576
    """Width of q and of a cache row, in elements."""
    value_dim: int = 512
    """Width of out: the first part of a cache row."""
    page_size: int = 64
    """Tokens of a page of the cache."""
    q_dtype: DType = "bf16"
    kv_dtype: DType | None = None
    """None: as q_dtype."""
    out_dtype: DType | None = None
    """None: as q_dtype."""
    kv_format: KvFormat = "plain"
    softmax_scale: float | None = None
    """Factor of the scores; None: head_dim ** -0.5. Models with absorbed weights pass the scale of the original head."""
    causal: bool = False
    """Bottom-right causal: query token t of q_len sees the first len - q_len + 1 + t cached tokens."""
    ragged_q: bool = False
    """q is [tokens, q_heads, head_dim] with cu_seqlens_q."""
    lse_base: LseBase = "e"
    split: Split = "balanced"
    """balanced: fastest; fixed_chunk: a row's bits depend on its own request only, whatever else is in the batch."""
    chunk_tokens: int = 0
    """fixed_chunk: tokens between cuts, a multiple of 64; 0: 2048."""
    device: str = "cpu"
    """cpu, cuda or cuda:<ordinal>."""
    topk: int = 0
    cp_world: int = 1
    cp_rank: int = 0
    cp_turn: int = 0
    """Keys that a rank takes at a time; 0: 1."""
    tree_mask: bool = False
    extra_segment: bool = False
    debug: bool = False
    """CUDA: check device-side lengths, page ids and stale schedules, at a price."""

    @classmethod
    def parse(cls, text: str) -> Problem:
        """Reads the one-line form, such as "dense:bf16:b128:q1:h128:d576:v512:p64:l16384:causal". Raises ValueError."""
        native = _ext.Problem.parse(text)
        flags = {name: bool(native.flags & _FLAG_BITS[name]) for name in _FLAGS}
        device = _name(DEVICES, native.device_type)
        return cls(
            **{name: getattr(native, name) for name in _NUMBERS},
            **flags,
            device=f"{device}:{native.device_id}" if native.device_id else device,
            q_dtype=_name(DTYPES, native.q_dtype),
            kv_dtype=_name(DTYPES, native.kv_dtype) if native.kv_dtype else None,
            out_dtype=_name(DTYPES, native.out_dtype) if native.out_dtype else None,
            kv_format=_name(KV_FORMATS, native.kv_format),
            split=_name(SPLITS, native.split_policy),
            lse_base="2" if native.flags & _FLAG_BITS["lse_base2"] else "e",
            softmax_scale=native.softmax_scale or None,
        )

    def __str__(self) -> str:
        return self._native().format()

    def _native(self) -> _ext.Problem:
        native = _ext.Problem()
        for name in _NUMBERS:
            setattr(native, name, getattr(self, name))
        kind, _, ordinal = self.device.partition(":")
        native.device_type = _number(DEVICES, "device", kind)
        native.device_id = int(ordinal) if ordinal else 0
        native.q_dtype = _number(DTYPES, "q_dtype", self.q_dtype)
        native.kv_dtype = _number(DTYPES, "kv_dtype", self.kv_dtype) if self.kv_dtype is not None else 0
        native.out_dtype = _number(DTYPES, "out_dtype", self.out_dtype) if self.out_dtype is not None else 0
        native.kv_format = _number(KV_FORMATS, "kv_format", self.kv_format)
        native.split_policy = _number(SPLITS, "split", self.split)
        if self.softmax_scale == 0:
            raise ValueError("softmax_scale: expected a number other than 0, or None for head_dim ** -0.5, got 0")
        native.softmax_scale = self.softmax_scale if self.softmax_scale is not None else 0.0
        native.flags = sum(_FLAG_BITS[name] for name in _FLAGS if getattr(self, name))
        if _number({"e": 0, "2": 1}, "lse_base", self.lse_base):
            native.flags |= _FLAG_BITS["lse_base2"]
        return native


def _number(names: dict[str, int], field: str, value: str) -> int:
    number = names.get(value) if isinstance(value, str) else None
    if number is None:
        raise ValueError(f"{field}: expected one of {', '.join(map(repr, names))}, got {value!r}")
    return number


def _name(names: dict[str, int], value: int) -> Any:
    return next(name for name, number in names.items() if number == value)
