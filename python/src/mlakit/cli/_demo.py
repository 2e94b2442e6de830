"""`mlakit demo`: a small engine's decode loop over a paged cache, each row checked in double precision. Needs the stdlib only."""

from __future__ import annotations

import math
import random
import statistics
import time
from operator import mul

from rich.console import Console
from rich.table import Table

import mlakit
from mlakit.bench.data import Tensor

PAGE_SIZE, HEADS, HEAD_DIM, VALUE_DIM = 64, 8, 576, 512
START_LENGTHS = (700, 200, 63, 1, 0)  # the last request stays empty
STEPS = 4
SCALE = 192**-0.5  # of DeepSeek's heads before the absorption: 128 + 64 columns


class PagedRequests:
    """The pool of pages that an engine owns, and the pages of each request."""

    def __init__(self, lengths: tuple[int, ...], steps: int, rng: random.Random) -> None:
        counts = [-(-(n + steps) // PAGE_SIZE) if n else 0 for n in lengths]
        self.cache = Tensor((sum(counts), PAGE_SIZE, 1, HEAD_DIM), "bf16")
        self.cache.fill_nan()  # a slot that no token was written to must not matter
        page_ids = list(range(sum(counts)))
        rng.shuffle(page_ids)
        self.pages_of = [[page_ids.pop() for _ in range(count)] for count in counts]
        self.lengths = [0 for _ in lengths]
        self.rows: list[list[list[float]]] = [[] for _ in lengths]
        for request, length in enumerate(lengths):
            self.append(request, Tensor.random((length, HEAD_DIM), "bf16", rng))

    def append(self, request: int, tokens: Tensor) -> None:
        for i in range(tokens.shape[0]):
            page, slot = divmod(self.lengths[request], PAGE_SIZE)
            begin = (self.pages_of[request][page] * PAGE_SIZE + slot) * HEAD_DIM
            self.cache.bits[begin : begin + HEAD_DIM] = tokens.bits[i * HEAD_DIM : (i + 1) * HEAD_DIM]
            self.rows[request].append(tokens.floats(i * HEAD_DIM, HEAD_DIM).tolist())
            self.lengths[request] += 1

    def block_table(self) -> Tensor:
        width = max(map(len, self.pages_of))
        rows = [[*pages, *[-1] * (width - len(pages))] for pages in self.pages_of]
        return Tensor.ints([page for row in rows for page in row], (len(rows), width))


class Check:
    """The worst differences of one request's rows from double precision."""

    def __init__(self) -> None:
        self.rows = self.failed = 0
        self.out_error = self.out_allowed = self.lse_error = 0.0

    def add(
        self, q: list[float], keys: list[list[float]], columns: list[tuple[float, ...]], out: list[float], lse: float
    ) -> None:
        self.rows += 1
        if not keys:
            self.failed += any(out) or lse != -math.inf
            return
        scores = [SCALE * sum(map(mul, q, key)) for key in keys]
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        total = sum(weights)
        expected = [sum(map(mul, weights, column)) / total for column in columns]
        out_error = max(abs(a - b) for a, b in zip(out, expected, strict=True))
        lse_error = abs(lse - top - math.log(total))
        # Half a unit in the last place of a bf16 out, twice; and softmax weights rounded to bf16, whose independent errors add up
        # like the root of the sum of squares (factor: values are below 2, and five sigma).
        spread = math.sqrt(sum(map(mul, weights, weights))) / total
        allowed = 2**-8 * max(map(abs, expected)) + 2**-8 * spread
        self.failed += not (out_error <= allowed and lse_error <= 1e-3)
        if out_error >= self.out_error:
            self.out_error, self.out_allowed = out_error, allowed
        self.lse_error = max(self.lse_error, lse_error)


def run(seed: int) -> bool:
    """Prints the table; returns whether every row was right."""
    console = Console()
    rng = random.Random(seed)
    batch = len(START_LENGTHS)
    requests = PagedRequests(START_LENGTHS, STEPS, rng)
    problem = mlakit.Problem(
        q_heads=HEADS,
        max_batch=batch,
        max_len=1024,
        page_size=PAGE_SIZE,
        head_dim=HEAD_DIM,
        value_dim=VALUE_DIM,
        softmax_scale=SCALE,
    )
    plan = mlakit.Plan(problem)
    console.print(f"problem  {problem}\nbackend  {plan.info.backend}  ({plan.info.variant})", soft_wrap=True)

    checks = [Check() for _ in START_LENGTHS]
    step_seconds = []
    for _ in range(STEPS):
        for request, start in enumerate(START_LENGTHS):
            if start:
                requests.append(request, Tensor.random((1, HEAD_DIM), "bf16", rng))
        q = Tensor.random((batch, 1, HEADS, HEAD_DIM), "bf16", rng)
        table, lengths = requests.block_table(), Tensor.ints(requests.lengths, (batch,))
        out, lse = Tensor((batch, 1, HEADS, VALUE_DIM), "bf16"), Tensor((batch, 1, HEADS), "fp32")
        out.fill_nan()
        lse.fill_nan()

        begin = time.perf_counter()
        schedule = plan.schedule(lengths.array)
        plan.decode(q.array, requests.cache.array, table.array, schedule, out=out.array, lse=lse.array)
        step_seconds.append(time.perf_counter() - begin)

        for request, check in enumerate(checks):
            keys = requests.rows[request]
            columns = list(zip(*keys, strict=True))[:VALUE_DIM]
            for row in range(request * HEADS, (request + 1) * HEADS):
                check.add(
                    q.floats(row * HEAD_DIM, HEAD_DIM).tolist(),
                    keys,
                    columns,
                    out.floats(row * VALUE_DIM, VALUE_DIM).tolist(),
                    lse.floats(row, 1)[0],
                )

    table_ = Table("request", "tokens", "rows checked", "out: largest error", "allowed", "lse: largest error", "")
    for request, check in enumerate(checks):
        table_.add_row(
            str(request),
            str(requests.lengths[request]) if requests.lengths[request] else "0 (empty)",
            str(check.rows),
            f"{check.out_error:.1e}",
            f"{check.out_allowed:.1e}",
            f"{check.lse_error:.1e}",
            "[red]wrong[/]" if check.failed else "[green]right[/]",
        )
    console.print(table_)
    median = statistics.median(step_seconds)
    bytes_read = 2 * HEAD_DIM * sum(requests.lengths)
    console.print(
        f"{STEPS} steps of {batch} requests: {median * 1e6:.0f} µs a step (schedule and decode, median), "
        f"{bytes_read / median / 1e9:.2f} GB/s of cache",
        soft_wrap=True,
    )
    return not any(check.failed for check in checks)
