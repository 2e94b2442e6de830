"""CPU benchmark of one problem: check, then time decode over caches that together do not fit into the processor's caches."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlakit

from .data import Tensor
from .roofs import Roofs

COLD_BYTES = 96 << 20  # rotated over, so that each call reads its cache from memory as an engine's layers do
MAX_SETS = 16
CHECK_FLOP = 1e9  # the check takes the first requests, about this much work of them and at least one
ROUND_SECONDS = 0.004  # shorter calls are repeated within a round
# Largest |out - reference| of a row, by its length: one unit roundoff of the element type; of fp32, its sums over long rows.
ROW_ERROR = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-18}


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the benchmark. Times are of one decode call, in microseconds."""

    problem: str
    backend: str
    variant: str
    threads: int
    checked_rows: int
    largest_error: float
    """Largest error of a checked row, relative to the row."""
    median_us: float
    min_us: float
    max_us: float
    spread: float
    """Interquartile range over the median."""
    schedule_us: float
    gflops: float
    gbytes: float
    """Cache, q and out, in GB/s."""
    roof: str
    """The nearer one: compute or memory."""
    roof_share: float
    roof_gflops: float
    roof_gbytes: float


class Call:
    """A problem's tensors: every request max_len long, pages in random order, and several caches to rotate over."""

    def __init__(self, problem: mlakit.Problem, sets: int, rng: random.Random) -> None:
        batch, dtype = problem.max_batch, problem.q_dtype
        pages_of_one = -(-problem.max_len // problem.page_size)
        pages = batch * pages_of_one
        ids = list(range(pages))
        rng.shuffle(ids)
        kv_dtype = problem.kv_dtype or dtype
        shape = (pages, problem.page_size, problem.kv_heads, problem.head_dim)
        self.caches = [Tensor.random(shape, kv_dtype, rng) for _ in range(sets)]
        self.q = Tensor.random((batch, problem.q_len, problem.q_heads, problem.head_dim), dtype, rng)
        self.block_table = Tensor.ints(ids, (batch, pages_of_one))
        self.cache_seqlens = Tensor.ints([problem.max_len] * batch, (batch,))

    def first(self, requests: int) -> tuple[Any, Any, Any]:
        """q, block_table and cache_seqlens of the first requests."""
        return tuple(t.first(requests).array for t in (self.q, self.block_table, self.cache_seqlens))


def flop(problem: mlakit.Problem, batch: int) -> float:
    """Both products, for the keys that each query token sees."""
    seen = sum(
        max(problem.max_len - problem.q_len + 1 + t, 0) if problem.causal else problem.max_len for t in range(problem.q_len)
    )
    return 2.0 * batch * seen * problem.q_heads * (problem.head_dim + problem.value_dim)


def check(problem: mlakit.Problem, plan: mlakit.Plan, call: Call) -> tuple[int, float]:
    """Compares rows with the reference backend. Returns how many, and the largest error relative to a row's length."""
    requests = min(problem.max_batch, max(1, int(CHECK_FLOP / flop(problem, 1))))
    q, table, lengths = call.first(requests)
    exact = dataclasses.replace(problem, out_dtype="fp32", max_batch=requests)
    results = []
    for p, dtype in ((plan, problem.out_dtype or problem.q_dtype), (mlakit.Plan(exact, mlakit.Context("reference")), "fp32")):
        out = Tensor((requests, problem.q_len, problem.q_heads, problem.value_dim), dtype)
        lse = Tensor((requests, problem.q_len, problem.q_heads), "fp32")
        out.fill_nan()
        lse.fill_nan()
        p.decode(q, call.caches[0].array, table, p.schedule(lengths), out=out.array, lse=lse.array)
        results.append((out, lse))
    (out, lse), (expected, expected_lse) = results
    rows, width = len(lse.bits), problem.value_dim
    allowed = ROW_ERROR[problem.q_dtype]
    largest = 0.0
    for row in range(rows):
        a, b = out.floats(row * width, width), expected.floats(row * width, width)
        length = math.hypot(*b)
        error = math.dist(a, b) / length if length else math.hypot(*a)
        lse_error = abs(lse.floats(row, 1)[0] - expected_lse.floats(row, 1)[0])
        if not (error <= allowed and lse_error <= 1e-3):
            raise RuntimeError(
                f"{plan.info.problem} on {plan.info.backend}: row {row} is off by {error:.2g} of its length "
                f"(allowed {allowed:.2g}), its lse by {lse_error:.2g} (allowed 1e-3)"
            )
        largest = max(largest, error)
    return rows, largest


def run(
    text: str, context: mlakit.Context, threads: int, rounds: int, roofs: Roofs, tick: Callable[[], None] = lambda: None
) -> Result:
    """Benchmarks one problem string. tick is called after the check and after each round."""
    problem = mlakit.Problem.parse(text)
    if problem.ragged_q:
        raise ValueError("bench: expected a problem of uniform q: leave out 'ragged'")
    plan = mlakit.Plan(problem, context)
    itemsize = 4 if (problem.kv_dtype or problem.q_dtype) == "fp32" else 2
    cache_bytes = problem.max_batch * problem.max_len * problem.kv_heads * problem.head_dim * itemsize
    call = Call(problem, min(MAX_SETS, max(1, -(-COLD_BYTES // cache_bytes))), random.Random(0))
    checked_rows, largest_error = check(problem, plan, call)
    tick()

    out = Tensor((problem.max_batch, problem.q_len, problem.q_heads, problem.value_dim), problem.out_dtype or problem.q_dtype)
    lse = Tensor((problem.max_batch, problem.q_len, problem.q_heads), "fp32")
    schedule = plan.schedule(call.cache_seqlens.array)
    arrays = [cache.array for cache in call.caches]
    position = 0

    def decode() -> None:
        nonlocal position
        position = (position + 1) % len(arrays)
        plan.decode(call.q.array, arrays[position], call.block_table.array, schedule, out=out.array, lse=lse.array)

    decode()
    repeats = max(1, math.ceil(ROUND_SECONDS / max(seconds(decode, 1), 1e-7)))
    times = []
    for _ in range(rounds):
        times.append(1e6 * seconds(decode, repeats))
        tick()
    schedule_us = 1e6 * statistics.median(seconds(lambda: plan.schedule(call.cache_seqlens.array), 20) for _ in range(5))

    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    gflops = flop(problem, problem.max_batch) / median / 1e3
    gbytes = (cache_bytes + call.q.nbytes + out.nbytes) / median / 1e3
    peak = roofs.gflops(problem.q_dtype, plan.info.backend)
    shares = {"compute": gflops / peak, "memory": gbytes / roofs.gbytes}
    roof = max(shares, key=lambda name: shares[name])
    return Result(
        problem=plan.info.problem,
        backend=plan.info.backend,
        variant=plan.info.variant,
        threads=threads or len(os.sched_getaffinity(0)),
        checked_rows=checked_rows,
        largest_error=largest_error,
        median_us=median,
        min_us=min(times),
        max_us=max(times),
        spread=(high - low) / median,
        schedule_us=schedule_us,
        gflops=gflops,
        gbytes=gbytes,
        roof=roof,
        roof_share=shares[roof],
        roof_gflops=peak,
        roof_gbytes=roofs.gbytes,
    )


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call, the mean of repeats."""
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats
