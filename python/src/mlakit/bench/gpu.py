"""GPU benchmark: checks a problem, then times graph replays of decode, next to the roofs and to other installed kernels.

Every figure is the median over rounds; in a round all candidates run one after the other, so that they meet the same clocks.
A graph holds many calls that rotate over several caches (cold: together at least COLD_BYTES, so that L2 holds none of them) or
use one (warm).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import mlakit

COLD_BYTES = 150_000_000
GRAPH_SECONDS = 0.02
CHECKED_REQUESTS = 4
ROW_ERROR = {"bf16": 6e-3, "fp16": 1e-3}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Times:
    median_us: float
    min_us: float
    max_us: float


@dataclasses.dataclass
class Roofs:
    """In the same process, before the problems: GB/s and TFLOP/s."""

    pages_gbytes: float | None
    """Cache pages into shared memory. None: the probe library is not there."""
    products_tflops: float | None
    """The products of decode without loads."""
    cublas_tflops: float
    """bf16, 8192 x 8192 x 8192."""


@dataclasses.dataclass
class Result:
    problem: str
    variant: str
    largest_error: float
    cold: Times
    warm: Times
    schedule: Times
    gbytes: float
    """Of the cold time: cache, q and out."""
    tflops: float
    roof: str
    roof_share: float
    cublas_share: float
    clock_mhz: int
    """Of the multiprocessors, right after the cold rounds."""
    peers: dict[str, Times]
    """Cold, on the same data, interleaved round by round."""


class Inputs:
    """A problem's tensors: every request max_len long, pages in random order, several caches to rotate over."""

    def __init__(self, problem: mlakit.Problem) -> None:
        batch, dtype = problem.max_batch, DTYPES[problem.q_dtype]
        pages_of_one = -(-problem.max_len // problem.page_size)
        cache = (batch * pages_of_one, problem.page_size, problem.kv_heads, problem.head_dim)
        generator = torch.Generator(device="cuda").manual_seed(0)
        bytes_of_one = 2 * cache[0] * cache[1] * cache[2] * cache[3]
        sets = -(-COLD_BYTES // bytes_of_one)
        self.caches = [torch.empty(cache, dtype=dtype, device="cuda").normal_(generator=generator) for _ in range(sets)]
        self.q = torch.empty(batch, problem.q_len, problem.q_heads, problem.head_dim, dtype=dtype, device="cuda").normal_(
            generator=generator
        )
        self.block_table = torch.randperm(cache[0], generator=generator, device="cuda").int().view(batch, pages_of_one)
        self.lengths = torch.full((batch,), problem.max_len, dtype=torch.int32, device="cuda")
        self.out = torch.full((*self.q.shape[:-1], problem.value_dim), float("nan"), dtype=dtype, device="cuda")
        self.lse = torch.full(self.q.shape[:-1], float("nan"), device="cuda")
        self.bytes = bytes_of_one + 2 * (self.q.numel() + self.out.numel())


def flop(problem: mlakit.Problem) -> float:
    """Both products, for the keys that each query token sees."""
    hidden = problem.q_len * (problem.q_len - 1) // 2 if problem.causal else 0
    seen = problem.q_len * problem.max_len - hidden
    return 2.0 * problem.max_batch * problem.q_heads * seen * (problem.head_dim + problem.value_dim)


def check(problem: mlakit.Problem, x: Inputs, scale: float) -> float:
    """Rows of some requests against double precision; returns the largest error of a row relative to its length."""
    largest = 0.0
    requests = sorted({*range(0, problem.max_batch, max(1, problem.max_batch // CHECKED_REQUESTS)), problem.max_batch - 1})
    group = problem.q_heads // problem.kv_heads
    for i in requests:
        kv = x.caches[0][x.block_table[i].long()].flatten(0, 1)[: problem.max_len].double()
        q = x.q[i].double().view(problem.q_len, problem.kv_heads, group, -1)
        s = torch.einsum("tkgd,nkd->tkgn", q, kv) * scale
        if problem.causal:
            last = torch.arange(problem.q_len, device="cuda") + problem.max_len - problem.q_len
            s.masked_fill_((torch.arange(problem.max_len, device="cuda") > last[:, None])[:, None, None, :], -torch.inf)
        expected = torch.einsum("tkgn,nkd->tkgd", s.softmax(-1), kv[..., : problem.value_dim]).flatten(1, 2)
        error = ((x.out[i].double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        unit = 1.0 if problem.lse_base == "e" else math.log(2.0)
        lse_error = (x.lse[i].double() * unit - s.logsumexp(-1).flatten(1, 2)).abs().max().item()
        if not (error <= ROW_ERROR[problem.q_dtype] and lse_error <= 1e-3):
            raise RuntimeError(f"{problem}: request {i} is off by {error:.2g} of a row's length, its lse by {lse_error:.2g}")
        largest = max(largest, error)
    return largest


class Graph:
    """Calls captured in a CUDA graph, about GRAPH_SECONDS long."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()
        estimate = _seconds(lambda: [call() for call in calls]) / len(calls)
        rounds = max(1, round(GRAPH_SECONDS / estimate / len(calls)))
        self._calls = rounds * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream()):
            for _ in range(rounds):
                for call in calls:
                    call()
        self._graph.replay()
        torch.cuda.synchronize()

    def call_us(self) -> float:
        return 1e6 * _seconds(self._graph.replay) / self._calls


def _seconds(fn: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(graphs: dict[str, Graph], rounds: int) -> dict[str, Times]:
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(graph.call_us())
    return {name: Times(statistics.median(t), min(t), max(t)) for name, t in times.items()}


# ---- roofs --------------------------------------------------------------------------------------------------------------------


def _probe_library() -> ctypes.CDLL | None:
    here = Path(__file__).parent
    path = next(iter(here.glob("*mlakit_gpu_probe*.so")), None)
    if path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.mlakit_probe_slot_bytes.restype = ctypes.c_int64
    lib.mlakit_probe_products_flop.restype = ctypes.c_double
    return lib


def _checked(error: int) -> None:
    if error:
        raise RuntimeError(f"probe: CUDA error {error}")


def measure_roofs(rounds: int = 7) -> Roofs:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    graphs = {"cublas": Graph([lambda: torch.mm(a, b, out=c)])}
    lib = _probe_library()
    if lib is not None:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        slot, slots, products = lib.mlakit_probe_slot_bytes(), 40_000, 4000
        data = torch.randn(slot // 2 * slots, device="cuda", dtype=torch.bfloat16)
        order = torch.randperm(slots, device="cuda").int()
        sink = torch.zeros(1, device="cuda")
        pointer = lambda t: ctypes.c_void_p(t.data_ptr())  # noqa: E731
        stream = lambda: ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)  # noqa: E731
        graphs["pages"] = Graph([lambda: _checked(lib.mlakit_probe_pages(pointer(data), pointer(order), slots, sms, stream()))])
        graphs["products"] = Graph(
            [lambda: _checked(lib.mlakit_probe_products(pointer(data), products, sms, pointer(sink), stream()))]
        )
    t = interleave(graphs, rounds)
    return Roofs(
        slot * slots / t["pages"].median_us / 1e3 if lib is not None else None,
        lib.mlakit_probe_products_flop() * products * sms / t["products"].median_us / 1e6 if lib is not None else None,
        2 * 8192**3 / t["cublas"].median_us / 1e6,
    )


# ---- peers: other kernels on the same data ------------------------------------------------------------


def _flash_mla(problem: mlakit.Problem, x: Inputs, scale: float) -> Callable[[int], Callable[[], None]]:
    flash_mla = importlib.import_module("flash_mla")

    meta, splits = flash_mla.get_mla_metadata(x.lengths, problem.q_len * problem.q_heads, 1)
    return lambda i: (
        lambda: flash_mla.flash_mla_with_kvcache(
            x.q,
            x.caches[i],
            x.block_table,
            x.lengths,
            problem.value_dim,
            meta,
            splits,
            softmax_scale=scale,
            causal=problem.causal,
        )
    )


def _flash_attention(problem: mlakit.Problem, x: Inputs, scale: float) -> Callable[[int], Callable[[], None]]:
    flash_attn_interface = importlib.import_module("flash_attn_interface")

    v = problem.value_dim
    return lambda i: (
        lambda: flash_attn_interface.flash_attn_with_kvcache(
            q=x.q[..., v:],
            k_cache=x.caches[i][..., v:],
            v_cache=x.caches[i][..., :v],
            qv=x.q[..., :v],
            page_table=x.block_table,
            cache_seqlens=x.lengths,
            softmax_scale=scale,
            causal=problem.causal,
        )
    )


def _flash_infer(problem: mlakit.Problem, x: Inputs, scale: float) -> Callable[[int], Callable[[], None]]:
    mla = importlib.import_module("flashinfer.mla")

    v, tokens = problem.value_dim, problem.max_batch * problem.q_len
    wrapper = mla.BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), backend="fa3")
    q_indptr = torch.arange(problem.max_batch + 1, dtype=torch.int32, device="cuda") * problem.q_len
    kv_indptr = torch.arange(problem.max_batch + 1, dtype=torch.int32, device="cuda") * x.block_table.shape[1]
    wrapper.plan(
        q_indptr,
        kv_indptr,
        x.block_table.flatten(),
        x.lengths,
        problem.q_heads,
        v,
        problem.head_dim - v,
        problem.page_size,
        problem.causal,
        scale,
        x.q.dtype,
        x.q.dtype,
    )
    q = x.q.view(tokens, problem.q_heads, -1)
    return lambda i: (
        lambda: wrapper.run(
            q[..., :v], q[..., v:], x.caches[i][:, :, 0, :v], x.caches[i][:, :, 0, v:], out=x.out.view(tokens, -1, v)
        )
    )


def _flash_mla_library(path: str) -> Callable[[mlakit.Problem, Inputs, float], Callable[[int], Callable[[], None]]]:
    """A build of FlashMLA's dense decode behind C functions: fm_num_parts, fm_sched, fm_dense."""
    lib = ctypes.CDLL(path)
    ptr = lambda t: ctypes.c_void_p(t.data_ptr())  # noqa: E731
    stream = lambda: ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)  # noqa: E731

    def make(problem: mlakit.Problem, x: Inputs, scale: float) -> Callable[[int], Callable[[], None]]:
        batch, rows = problem.max_batch, problem.q_len * problem.q_heads
        parts = lib.fm_num_parts(torch.cuda.get_device_properties(0).multi_processor_count, 1, problem.q_len, problem.q_heads)
        meta = torch.empty(parts, 8, dtype=torch.int32, device="cuda")
        splits = torch.empty(batch + 1, dtype=torch.int32, device="cuda")
        out, lse = (
            torch.empty(batch, rows, problem.value_dim, dtype=x.q.dtype, device="cuda"),
            torch.empty(batch, rows, device="cuda"),
        )
        lse_parts = torch.empty(batch + parts, rows, device="cuda")
        out_parts = torch.empty(batch + parts, rows, problem.value_dim, device="cuda")
        lib.fm_sched(batch, problem.q_len, -1, None, ptr(x.lengths), ptr(meta), ptr(splits), parts, stream())
        return lambda i: (
            lambda: lib.fm_dense(
                batch,
                problem.q_len,
                problem.q_heads,
                x.caches[i].shape[0],
                int(problem.causal),
                ctypes.c_float(scale),
                ptr(x.q),
                ptr(x.caches[i]),
                ptr(out),
                ptr(lse),
                ptr(x.block_table),
                ctypes.c_long(x.block_table.stride(0)),
                ptr(x.lengths),
                ptr(meta),
                ptr(splits),
                parts,
                ptr(lse_parts),
                ptr(out_parts),
                stream(),
            )
        )

    return make


def peers(library: str | None) -> Iterator[tuple[str, Any]]:
    """Those that can be imported here."""
    if library is not None:
        yield "flash_mla_library", _flash_mla_library(library)
    for name, make, module in (
        ("flash_mla", _flash_mla, "flash_mla"),
        ("flash_attention_3", _flash_attention, "flash_attn_interface"),
        ("flashinfer", _flash_infer, "flashinfer"),
    ):
        try:
            __import__(module)
        except ImportError:
            continue
        yield name, make


# ---- one problem ------------------------------------------------------------


def clock_mhz() -> int:
    text = subprocess.run(
        ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(text.stdout.strip() or 0) if text.stdout.strip().isdigit() else 0


def run(text: str, roofs: Roofs, rounds: int = 7, with_peers: bool = False, peer_library: str | None = None) -> Result:
    problem = mlakit.Problem.parse(text)
    problem = dataclasses.replace(problem, device="cuda:0") if problem.device == "cpu" else problem
    if problem.ragged_q:
        raise ValueError("bench: expected a problem of uniform q: leave out 'ragged'")
    scale = problem.softmax_scale or problem.head_dim**-0.5
    plan = mlakit.Plan(problem)
    x = Inputs(problem)
    schedule = plan.schedule(x.lengths)
    scratch = torch.empty(plan.info.scratch_bytes, dtype=torch.uint8, device="cuda")
    # Streams differ between warm-up and capture, so each call takes the current one.
    decode = [
        functools.partial(plan.decode, x.q, kv, x.block_table, schedule, out=x.out, lse=x.lse, scratch=scratch) for kv in x.caches
    ]
    decode[0]()
    torch.cuda.synchronize()
    largest_error = check(problem, x, scale)
    graphs = {"cold": Graph(decode)}
    for name, make in peers(peer_library) if with_peers else ():
        call = make(problem, x, scale)
        graphs[name] = Graph([call(i) for i in range(len(x.caches))])
    times = interleave(graphs, rounds)
    clock = clock_mhz()
    rest = interleave(
        {"warm": Graph(decode[:1]), "schedule": Graph([lambda: plan.schedule(x.lengths, buffer=schedule.buffer)])}, rounds
    )
    median = times["cold"].median_us
    gbytes, tflops = x.bytes / median / 1e3, flop(problem) / median / 1e6
    shares = {
        "compute": tflops / (roofs.products_tflops or roofs.cublas_tflops),
        "memory": gbytes / (roofs.pages_gbytes or 3350.0),
    }
    roof = max(shares, key=lambda name: shares[name])
    return Result(
        plan.info.problem,
        plan.info.variant,
        largest_error,
        times.pop("cold"),
        rest["warm"],
        rest["schedule"],
        gbytes,
        tflops,
        roof,
        shares[roof],
        tflops / roofs.cublas_tflops,
        clock,
        times,
    )


def machine() -> dict[str, Any]:
    """What a committed result says about where it comes from."""
    query = ["nvidia-smi", "-i", "0", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    smi = subprocess.run(query, capture_output=True, text=True, check=False)
    return {
        "gpu": smi.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "mlakit": mlakit.__version__,
        "python": sys.version.split()[0],
    }


HEADER = (
    f"{'problem':<58} {'cold us':>9} {'spread':>13} {'warm us':>9} {'sched':>6} {'GB/s':>6} {'TFLOP/s':>8} "
    f"{'nearer roof':>13} {'cuBLAS':>7} {'MHz':>5}"
)


def line(r: Result) -> str:
    spread = f"{r.cold.min_us:.1f}-{r.cold.max_us:.1f}"
    others = "".join(f"  {name} {t.median_us:.1f}" for name, t in r.peers.items())
    return (
        f"{r.problem:<58} {r.cold.median_us:>9.1f} {spread:>13} {r.warm.median_us:>9.1f} {r.schedule.median_us:>6.2f} "
        f"{r.gbytes:>6.0f} {r.tflops:>8.1f} {r.roof + f' {r.roof_share:.2f}':>13} {r.cublas_share:>7.2f} {r.clock_mhz:>5}{others}"
    )


def main(
    problems: list[str], rounds: int = 7, as_json: bool = False, with_peers: bool = False, peer_library: str | None = None
) -> bool:
    """Prints a table, or a line of JSON for each problem. An error of any row is raised."""
    roofs = measure_roofs(rounds)
    if not as_json:
        print(f"{machine()['gpu']}; roofs: {roofs}")
        print(HEADER)
    for text in problems:
        result = run(text, roofs, rounds, with_peers, peer_library)
        print(
            json.dumps({**dataclasses.asdict(result), "roofs": dataclasses.asdict(roofs), "machine": machine()})
            if as_json
            else line(result),
            flush=True,
        )
        torch.cuda.empty_cache()
    return True
