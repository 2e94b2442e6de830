"""The CPU backends against the machine and against PyTorch, in one run.

    python bench_cpu.py [--backend NAME] [--dtype bf16|fp16|fp32] [--rounds N] [--threads 1 2] [--shapes TEXT] [--json FILE]

Every round runs, one after the other: the multiply-add probe of the backend's instructions, decode, and the PyTorch forms of
the same attention (if torch is there). So all of them meet the same neighbours and clocks. Printed are the best and the median
of the rounds, the share of the probe's peak (best against best, then median against median) and the ratio of the best times.
The PyTorch forms gather each request's pages first, as an engine with a paged cache has to:

    matmul   softmax(q k^T) v by matmul, a request at a time
    compile  the same through torch.compile
    sdpa     scaled_dot_product_attention with the heads folded into query rows

Before the timing, rows of a request are compared with the reference backend.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlakit
from mlakit.bench import cpu as bench
from mlakit.bench import roofs
from mlakit.bench.data import Tensor
from mlakit.bench.provenance import commit

HEAD_DIM, VALUE_DIM, PAGE_SIZE = 576, 512, 64
PROBE_SECONDS = 0.002  # short, and the best of PROBES counts: a slice that another process cut into is no peak
PROBES = 5
SLICE_SECONDS = 0.01  # shorter calls are repeated within a round, and the best of them counts


@dataclasses.dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]
    q_len: int
    heads: int
    causal: bool = False

    def __str__(self) -> str:
        same = len(set(self.lengths)) == 1
        length = str(self.lengths[0]) if same else f"{min(self.lengths)}-{max(self.lengths)}"
        return f"{len(self.lengths)} x {length}, q {self.q_len}, {self.heads} heads{', causal' if self.causal else ''}"

    def flop(self) -> float:
        seen = sum(n - self.q_len + 1 + t if self.causal else n for n in self.lengths for t in range(self.q_len))
        return 2.0 * seen * self.heads * (HEAD_DIM + VALUE_DIM)


SHAPES = (
    Shape((8192,), 1, 128),
    Shape((4096,) * 4, 1, 128),
    Shape((4096,), 2, 128, causal=True),
    Shape((8192,), 1, 16),
    Shape((4096,) * 4, 1, 16),
    Shape((1024,) * 8, 1, 16),
    Shape((65536,), 1, 16),
    Shape((100, 1228, 2357, 3485, 4614, 5742, 6871, 8000), 1, 16),
)


class Probe:
    """Multiply-adds in registers on several threads at once."""

    def __init__(self, isa: str) -> None:
        library = ctypes.CDLL(str(Path(roofs.__file__).with_name("libmlakit_probe.so")))
        self._gflops = library.mlakit_probe_gflops
        self._gflops.argtypes, self._gflops.restype = [ctypes.c_char_p, ctypes.c_double], ctypes.c_double
        self._isa = isa.encode()

    def __call__(self, threads: int) -> float:
        results = [0.0] * threads
        barrier = threading.Barrier(threads)

        def run(i: int) -> None:
            barrier.wait()
            results[i] = self._gflops(self._isa, PROBE_SECONDS)

        helpers = [threading.Thread(target=run, args=(i,)) for i in range(1, threads)]
        for helper in helpers:
            helper.start()
        run(0)
        for helper in helpers:
            helper.join()
        return sum(results)


class Data:
    """One shape's tensors: a paged cache with its pages in random order, every page in use but for the ends of requests."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        rng = random.Random(0)
        pages_of = [-(-n // PAGE_SIZE) for n in shape.lengths]
        ids = list(range(sum(pages_of)))
        rng.shuffle(ids)
        width, rows = max(pages_of), []
        for count in pages_of:
            rows += ids[:count] + [-1] * (width - count)
            del ids[:count]
        batch = len(shape.lengths)
        self.q = Tensor.random((batch, shape.q_len, shape.heads, HEAD_DIM), dtype, rng)
        self.cache = Tensor.random((sum(pages_of), PAGE_SIZE, 1, HEAD_DIM), dtype, rng)
        self.table = Tensor.ints(rows, (batch, width))
        self.lengths = Tensor.ints(shape.lengths, (batch,))
        self.out = Tensor((batch, shape.q_len, shape.heads, VALUE_DIM), dtype)
        self.lse = Tensor((batch, shape.q_len, shape.heads), "fp32")
        self.out.fill_nan()
        self.lse.fill_nan()


def problem_of(shape: Shape, dtype: str) -> mlakit.Problem:
    sizes = f"b{len(shape.lengths)}:q{shape.q_len}:h{shape.heads}:p{PAGE_SIZE}:l{max(shape.lengths)}:m{sum(shape.lengths)}"
    return mlakit.Problem.parse(f"dense:{dtype}:{sizes}{':causal' if shape.causal else ''}")


def decode_call(
    shape: Shape, dtype: str, data: Data, backend: str | None, threads: int
) -> tuple[Callable[[], Any], mlakit.PlanInfo]:
    plan = mlakit.Plan(problem_of(shape, dtype), mlakit.Context(backend, threads))
    schedule = plan.schedule(data.lengths.array)
    call = plan.bind(data.q.array, data.cache.array, data.table.array, schedule, out=data.out.array, lse=data.lse.array)
    return call, plan.info


def torch_calls(shape: Shape, data: Data) -> dict[str, Callable[[], Any]]:
    """The PyTorch forms by name; none without torch."""
    try:
        import torch
        import torch.utils.dlpack
    except ImportError:
        return {}
    q, cache, table = (torch.utils.dlpack.from_dlpack(t.array) for t in (data.q, data.cache, data.table))
    cache = cache.view(-1, PAGE_SIZE, HEAD_DIM)
    scale = HEAD_DIM**-0.5

    def hidden(length: int) -> Any:
        """[rows, length]: True where a causal row must not look; None if all may."""
        if not shape.causal:
            return None
        last = length - shape.q_len + torch.arange(shape.q_len).repeat_interleave(shape.heads)
        return torch.arange(length)[None, :] > last[:, None]

    requests = [(table[r, : -(-n // PAGE_SIZE)].long(), n, hidden(n)) for r, n in enumerate(shape.lengths)]

    def keys_of(r: int) -> Any:
        pages, length, _ = requests[r]
        return cache[pages].view(-1, HEAD_DIM)[:length]

    def by_matmul(rows: Any, keys: Any, mask: Any) -> Any:
        scores = (rows @ keys.T).float() * scale
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return scores.softmax(-1).to(keys.dtype) @ keys[:, :VALUE_DIM]

    def by_sdpa(rows: Any, keys: Any, mask: Any) -> Any:
        allowed = None if mask is None else ~mask
        values = keys[:, :VALUE_DIM]
        return torch.nn.functional.scaled_dot_product_attention(
            rows[None, None], keys[None, None], values[None, None], allowed, scale=scale
        )

    def each(attend: Callable[[Any, Any, Any], Any]) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                for r in range(len(requests)):
                    attend(q[r].reshape(-1, HEAD_DIM), keys_of(r), requests[r][2])

        return call

    return {"matmul": each(by_matmul), "compile": each(torch.compile(by_matmul, dynamic=True)), "sdpa": each(by_sdpa)}


def set_torch_threads(threads: int) -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(threads)


def best_of_slice(call: Callable[[], Any]) -> float:
    """Microseconds of the fastest call within SLICE_SECONDS."""
    best, end = float("inf"), time.perf_counter() + SLICE_SECONDS
    while True:
        begin = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now >= end:
            return 1e6 * best


def summary(times: list[float], mine: list[float]) -> dict[str, float]:
    return {"best_us": min(times), "median_us": statistics.median(times), "ratio": min(times) / min(mine)}


def run_shape(shape: Shape, dtype: str, backend: str | None, rounds: int, threads_list: list[int]) -> list[dict[str, Any]]:
    data = Data(shape, dtype)
    plan = mlakit.Plan(problem_of(shape, dtype), mlakit.Context(backend))
    first = dataclasses.replace(plan.problem, max_batch=1, max_len=shape.lengths[0], max_tokens=0)
    one = bench.Call(first, 1, random.Random(1))
    _, error = bench.check(first, mlakit.Plan(first, mlakit.Context(backend)), one)

    isa = plan.info.backend.removeprefix("cpu-")
    probe = Probe("avx512" if isa == "avx512bf16" and dtype != "bf16" else isa)
    peers = torch_calls(shape, data)
    rows = []
    for threads in threads_list:
        set_torch_threads(threads)
        decode, info = decode_call(shape, dtype, data, backend, threads)
        calls = {"mlakit": decode, **peers}
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        peaks = []
        for _ in range(rounds):
            peaks.append(max(probe(threads) for _ in range(PROBES)))
            for name, call in calls.items():
                times[name].append(best_of_slice(call))
        mine = times["mlakit"]
        low, _, high = statistics.quantiles(mine, n=4)
        gflops = shape.flop() / min(mine) / 1e3
        rows.append(
            {
                "shape": str(shape),
                "problem": info.problem,
                "dtype": dtype,
                "backend": info.backend,
                "variant": info.variant,
                "threads": threads,
                "rounds": rounds,
                "largest_row_error": error,
                "best_us": min(mine),
                "median_us": statistics.median(mine),
                "spread": (high - low) / statistics.median(mine),
                "gflops": gflops,
                "probe_gflops": max(peaks),
                "share": gflops / max(peaks),
                "share_median": shape.flop() / statistics.median(mine) / 1e3 / statistics.median(peaks),
                "peers": {name: summary(t, mine) for name, t in times.items() if name != "mlakit"},
            }
        )
    return rows


COLUMNS = ("th", "best us", "median us", "spread", "GFLOP/s", "probe", "share", "median")
WIDTHS = (2, 10, 10, 7, 7, 7, 6, 6)


def print_line(shape: str, cells: tuple[str, ...], peers: str) -> None:
    print(f"{shape:34} " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), peers, flush=True)


def print_row(row: dict[str, Any]) -> None:
    cells = (
        f"{row['threads']}",
        f"{row['best_us']:.1f}",
        f"{row['median_us']:.1f}",
        f"{row['spread']:.1%}",
        f"{row['gflops']:.1f}",
        f"{row['probe_gflops']:.1f}",
        f"{row['share']:.3f}",
        f"{row['share_median']:.3f}",
    )
    peers = (f"{name} {peer['best_us']:.0f} ({peer['ratio']:.2f}x)" for name, peer in row["peers"].items())
    print_line(row["shape"], cells, "  ".join(peers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="by name; default: the library's choice")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", default="", help="only the shapes whose text has this in it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    print_line("shape", COLUMNS, "peers: best us (times mlakit's)")
    results = []
    for shape in SHAPES:
        if args.shapes not in str(shape):
            continue
        for row in run_shape(shape, args.dtype, args.backend, args.rounds, args.threads):
            results.append(row)
            print_row(row)
    if args.json:
        machine = {
            "machine": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "mlakit": mlakit.__version__,
            "commit": commit(__file__),
            "load": os.getloadavg(),
        }
        args.json.write_text(json.dumps({**machine, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
