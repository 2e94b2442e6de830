"""The error of every CPU backend beside the one that cannot be avoided: rounding the exact result to the element type.

Out is taken in fp32, so that what is compared is the arithmetic alone. Its worst row may be off by no more than the worst row of
the exact result after one rounding to the type of q and cache. Out in that type then has two errors of that size, independent of
each other: at most sqrt(2) of one, and a little for the worst of few rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mlakit
from batches import NUMPY_DTYPES

HEAD_DIM, VALUE_DIM, PAGE_SIZE = 576, 512, 64
BACKENDS = [b.name for b in mlakit.backends() if b.available and b.name.startswith("cpu-")]


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    q_len: int = 1

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}-{self.heads}heads-q{self.q_len}"


# Several parts and steps, both lengths of a step, a short last step, contexts of one step. Rows enough for a worst one.
SHAPES = [Shape(8, 1024, 16), Shape(2, 333, 128), Shape(1, 4096, 16, q_len=2), Shape(16, 64, 16), Shape(8, 200, 4)]

# What the scores are: normal with a standard deviation, or made of one column of the cache that no value has.
SPREADS = [0.2, 1.0, 2.0, 8.0, 32.0]
PATTERNS = ["uniform", "one key above equal ones", "one key below equal ones", "equal weights in two groups"]


def scores_of(pattern: str, shape: Shape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A key's score is its number times the row's: numbers of few bits, exact in bf16 and fp16."""
    keys = np.zeros((shape.batch, shape.length))
    if pattern.startswith("one key"):
        late = rng.integers(shape.length // 2, shape.length - shape.q_len, shape.batch)
        keys[np.arange(shape.batch), late] = 1.0 if "above" in pattern else -1.0
    elif pattern == "equal weights in two groups":
        keys = rng.integers(0, 2, keys.shape).astype(float)
    rows = np.round(np.linspace(4, 128, shape.heads)) / 16  # their weights lie all over the distance between powers of two
    return keys, np.broadcast_to(rows, (shape.batch, shape.q_len, shape.heads))


class Call:
    """Random q and cache, and attention to it in float64."""

    def __init__(self, shape: Shape, dtype: str, spread: float | str) -> None:
        rng = np.random.default_rng(11)
        element = NUMPY_DTYPES[dtype]
        q = rng.standard_normal((shape.batch, shape.q_len, shape.heads, HEAD_DIM)) / 8
        keys = rng.standard_normal((shape.batch, shape.length, HEAD_DIM)) / 8
        if isinstance(spread, str):
            q[:] = 0.0
            keys[..., -1], q[..., -1] = scores_of(spread, shape, rng)
            self.scale = 1.0
        else:
            self.scale = float(np.float32(spread * 64 / HEAD_DIM**0.5))
        pages = -(-shape.length // PAGE_SIZE)
        padded = np.full((shape.batch, pages * PAGE_SIZE, HEAD_DIM), np.nan)
        padded[:, : shape.length] = keys
        self.q = q.astype(element)
        self.cache = padded.astype(element).reshape(-1, PAGE_SIZE, 1, HEAD_DIM)
        self.table = np.arange(shape.batch * pages, dtype=np.int32).reshape(shape.batch, pages)
        self.lengths = np.full(shape.batch, shape.length, np.int32)
        self.causal = shape.q_len > 1

        q, keys = self.q.astype(np.float64), keys.astype(element).astype(np.float64)
        scores = self.scale * (q @ keys[:, None].swapaxes(-1, -2))  # [batch, q_len, heads, length]
        self.largest_score = np.abs(scores).max()
        last = shape.length - shape.q_len + np.arange(shape.q_len)
        scores = np.where(np.arange(shape.length) > last[:, None, None], -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        self.out = weights / weights.sum(-1, keepdims=True) @ keys[:, None, :, :VALUE_DIM]
        self.lse = scores.max(-1) + np.log(weights.sum(-1))

    def decode(self, backend: str, out_dtype: str) -> tuple[np.ndarray, np.ndarray]:
        out = np.full(self.out.shape, np.nan, NUMPY_DTYPES[out_dtype])
        _, lse = mlakit.mla_decode(
            *(self.q, self.cache, self.table, self.lengths),
            causal=self.causal,
            softmax_scale=self.scale,
            out=out,
            context=mlakit.Context(backend, num_threads=2),
        )
        return out.astype(np.float64), lse

    def worst_row(self, out: np.ndarray) -> float:
        return float((np.linalg.norm(out - self.out, axis=-1) / np.linalg.norm(self.out, axis=-1)).max())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [*SPREADS, *PATTERNS], ids=str)
def test_the_error_is_no_larger_than_that_of_rounding_the_exact_result(shape: Shape, spread: float | str, dtype: str) -> None:
    call = Call(shape, dtype, spread)
    rounding = call.worst_row(call.out.astype(NUMPY_DTYPES[dtype]).astype(np.float64))
    for backend in BACKENDS:
        out, lse = call.decode(backend, "fp32")
        assert call.worst_row(out) <= rounding, backend
        assert call.worst_row(call.decode(backend, dtype)[0]) <= 1.5 * rounding, backend
        assert np.abs(lse - call.lse).max() <= 2.0**-19 * (1 + call.largest_score), backend
