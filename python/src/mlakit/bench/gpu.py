"""GPU benchmark: checks a problem, then times graph replays of decode, next to the roofs and to other installed kernels.

Every figure is the median over rounds; in a round all candidates run one after the other, so that they meet the same clocks.
A graph holds many calls that rotate over several caches (cold: together at least COLD_BYTES, so that L2 holds none of them) or
use one (warm).

A problem is named by its string. With " varlen" after it, the lengths of its requests are drawn evenly up to its max_len, always
the same ones; without, every request is max_len long.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import mlakit

COLD_BYTES = 150_000_000
GRAPH_SECONDS = 0.02
CHECKED_REQUESTS = 4
PROFILED_CALLS = 16
CUBLAS_SIZE = 8192
CUBLAS_FLOP = 2 * CUBLAS_SIZE**3
ROW_ERROR = {"bf16": 6e-3, "fp16": 1e-3}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
VARLEN = " varlen"

cuda: Any = torch.cuda  # torch types few of its classes


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
class Subject:
    """What was measured, and that it was right."""

    problem: str
    variant: str
    mean_len: float
    """Cached tokens of a request."""
    largest_error: float
    """Of a row, relative to its length."""


@dataclasses.dataclass
class Result(Subject):
    cold: Times
    warm: Times
    schedule: Times
    gbytes: float
    """Of the cold time: the pages that hold the lengths, q and out."""
    tflops: float
    roof: str
    roof_share: float
    cublas_share: float
    clock_mhz: int
    """Of the multiprocessors, right after the cold rounds."""
    peers: dict[str, Times]
    """Cold, on the same data, interleaved round by round."""
    peers_warm: dict[str, Times]
    """Likewise, on one cache."""
    combine_us: float | None = None
    """From decode's end to combine's. None: not measured (see combine_us()), or the plan has a single part and no combine."""


# ---- lengths, and the work they make ------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[mlakit.Problem, list[int]]:
    """A problem on the GPU and its requests' lengths, from a problem string that VARLEN may follow."""
    problem = mlakit.Problem.parse(text.removesuffix(VARLEN))
    problem = dataclasses.replace(problem, device="cuda:0") if problem.device == "cpu" else problem
    if problem.ragged_q:
        raise ValueError("bench: expected a problem of uniform q: leave out 'ragged'")
    return problem, draw_lengths(problem) if text.endswith(VARLEN) else [problem.max_len] * problem.max_batch


def draw_lengths(problem: mlakit.Problem) -> list[int]:
    """One for each request, evenly from q_len (the query's own tokens are cached too) to max_len."""
    rng = random.Random(0)
    return [rng.randint(problem.q_len, problem.max_len) for _ in range(problem.max_batch)]


def flop(problem: mlakit.Problem, lengths: Sequence[int]) -> float:
    """Both products, for the keys that each query token sees."""
    hidden = range(problem.q_len) if problem.causal else [0] * problem.q_len  # keys after each query token
    seen = sum(max(n - after, 0) for n in lengths for after in hidden)
    return 2.0 * problem.q_heads * seen * (problem.head_dim + problem.value_dim)


def cache_bytes(problem: mlakit.Problem, lengths: Sequence[int]) -> int:
    """Of the pages that hold the lengths, in a type of 2 bytes."""
    pages = sum(-(-n // problem.page_size) for n in lengths)
    return 2 * pages * problem.page_size * problem.kv_heads * problem.head_dim


class Inputs:
    """A problem's tensors: pages in random order, several caches to rotate over.

    lengths: cached tokens of each request, q_len .. max_len; None: all of max_len. Caches and table have room for max_len.
    """

    def __init__(self, problem: mlakit.Problem, lengths: Sequence[int] | None = None) -> None:
        self.host_lengths = [problem.max_len] * problem.max_batch if lengths is None else list(lengths)
        batch, dtype = problem.max_batch, DTYPES[problem.q_dtype]
        pages_of_one = -(-problem.max_len // problem.page_size)
        cache = (batch * pages_of_one, problem.page_size, problem.kv_heads, problem.head_dim)
        generator = torch.Generator(device="cuda").manual_seed(0)
        bytes_of_one = cache_bytes(problem, self.host_lengths)
        sets = -(-COLD_BYTES // bytes_of_one)
        self.caches = [torch.empty(cache, dtype=dtype, device="cuda").normal_(generator=generator) for _ in range(sets)]
        self.q = torch.empty(batch, problem.q_len, problem.q_heads, problem.head_dim, dtype=dtype, device="cuda").normal_(
            generator=generator
        )
        self.block_table = torch.randperm(cache[0], generator=generator, device="cuda").int().view(batch, pages_of_one)
        self.lengths = torch.tensor(self.host_lengths, dtype=torch.int32, device="cuda")
        self.out = torch.full((*self.q.shape[:-1], problem.value_dim), float("nan"), dtype=dtype, device="cuda")
        self.lse = torch.full(self.q.shape[:-1], float("nan"), device="cuda")
        self.bytes = bytes_of_one + 2 * (self.q.numel() + self.out.numel())


def check(problem: mlakit.Problem, x: Inputs, scale: float) -> float:
    """Rows of some requests against double precision; returns the largest error of a row relative to its length."""
    largest = 0.0
    requests = sorted({*range(0, problem.max_batch, max(1, problem.max_batch // CHECKED_REQUESTS)), problem.max_batch - 1})
    group = problem.q_heads // problem.kv_heads
    for i in requests:
        length = x.host_lengths[i]
        kv = x.caches[0][x.block_table[i].long()].flatten(0, 1)[:length].double()
        q = x.q[i].double().view(problem.q_len, problem.kv_heads, group, -1)
        s = torch.einsum("tkgd,nkd->tkgn", q, kv) * scale
        if problem.causal:
            last = torch.arange(problem.q_len, device="cuda") + length - problem.q_len
            s.masked_fill_((torch.arange(length, device="cuda") > last[:, None])[:, None, None, :], -torch.inf)
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
        self.calls = rounds * len(calls)
        self._captured = list(calls)  # they own the memory that the graph reads
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=cuda.Stream()):
            for _ in range(rounds):
                for call in calls:
                    call()
        self.replay()
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Runs its calls, `calls` of them, in the current stream."""
        self._graph.replay()

    def call_us(self) -> float:
        return 1e6 * _seconds(self.replay) / self.calls


def _seconds(fn: Callable[[], Any]) -> float:
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


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


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _stream() -> ctypes.c_void_p:
    """The current one: warm-up and capture differ in it."""
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def cublas_graph() -> Graph:
    """Products of bf16 matrices, CUBLAS_SIZE wide, CUBLAS_FLOP a call."""
    a, b = (torch.randn(CUBLAS_SIZE, CUBLAS_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return Graph([lambda: torch.mm(a, b, out=c)])


def measure_roofs(rounds: int = 7) -> Roofs:
    graphs = {"cublas": cublas_graph()}
    lib = _probe_library()
    if lib is not None:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        slot, slots, products = lib.mlakit_probe_slot_bytes(), 40_000, 4000
        data = torch.randn(slot // 2 * slots, device="cuda", dtype=torch.bfloat16)
        order = torch.randperm(slots, device="cuda").int()
        sink = torch.zeros(1, device="cuda")
        graphs["pages"] = Graph(
            [lambda: _checked(lib.mlakit_probe_pages(_pointer(data), _pointer(order), slots, sms, _stream()))]
        )
        graphs["products"] = Graph(
            [lambda: _checked(lib.mlakit_probe_products(_pointer(data), products, sms, _pointer(sink), _stream()))]
        )
    t = interleave(graphs, rounds)
    return Roofs(
        slot * slots / t["pages"].median_us / 1e3 if lib is not None else None,
        lib.mlakit_probe_products_flop() * products * sms / t["products"].median_us / 1e6 if lib is not None else None,
        CUBLAS_FLOP / t["cublas"].median_us / 1e6,
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
        lib.fm_sched(batch, problem.q_len, -1, None, _pointer(x.lengths), _pointer(meta), _pointer(splits), parts, _stream())
        return lambda i: (
            lambda: lib.fm_dense(
                batch,
                problem.q_len,
                problem.q_heads,
                x.caches[i].shape[0],
                int(problem.causal),
                ctypes.c_float(scale),
                _pointer(x.q),
                _pointer(x.caches[i]),
                _pointer(out),
                _pointer(lse),
                _pointer(x.block_table),
                ctypes.c_long(x.block_table.stride(0)),
                _pointer(x.lengths),
                _pointer(meta),
                _pointer(splits),
                parts,
                _pointer(lse_parts),
                _pointer(out_parts),
                _stream(),
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


class Workload:
    """A problem on the device: its tensors, its schedule, and decode as calls, one for each cache."""

    def __init__(self, text: str) -> None:
        self.problem, lengths = parse(text)
        self.scale = self.problem.softmax_scale or self.problem.head_dim**-0.5
        self.plan = plan = mlakit.Plan(self.problem)
        self.x = x = Inputs(self.problem, lengths)
        self.mean_len = statistics.fmean(lengths)
        self.flop = flop(self.problem, lengths)
        self.schedule = schedule = plan.schedule(x.lengths)
        scratch = torch.empty(plan.info.scratch_bytes, dtype=torch.uint8, device="cuda")
        # Streams differ between warm-up and capture, so each call takes the current one.
        self.decode = [
            functools.partial(plan.decode, x.q, kv, x.block_table, schedule, out=x.out, lse=x.lse, scratch=scratch)
            for kv in x.caches
        ]

    def check(self) -> dict[str, Any]:
        """Decodes over the first cache and compares; returns the fields of Subject. An error of any row is raised."""
        self.decode[0]()
        torch.cuda.synchronize()
        largest_error = check(self.problem, self.x, self.scale)
        info = self.plan.info
        return {"problem": info.problem, "variant": info.variant, "mean_len": self.mean_len, "largest_error": largest_error}

    def peers(self, library: str | None) -> dict[str, list[Callable[[], Any]]]:
        """The peers' calls, one for each cache. They may overwrite out."""
        made = {name: make(self.problem, self.x, self.scale) for name, make in peers(library)}
        return {name: [call(i) for i in range(len(self.x.caches))] for name, call in made.items()}


def run(text: str, roofs: Roofs, rounds: int = 7, with_peers: bool = False, peer_library: str | None = None) -> Result:
    work = Workload(text)
    subject = work.check()
    calls: dict[str, Sequence[Callable[[], Any]]] = {"ours": work.decode, **(work.peers(peer_library) if with_peers else {})}
    cold = interleave({name: Graph(each) for name, each in calls.items()}, rounds)
    clock = clock_mhz()
    graphs = {name: Graph(each[:1]) for name, each in calls.items()}
    graphs["schedule"] = Graph([lambda: work.plan.schedule(work.x.lengths, buffer=work.schedule.buffer)])
    warm = interleave(graphs, rounds)
    ours, ours_warm, schedule = cold.pop("ours"), warm.pop("ours"), warm.pop("schedule")
    gbytes, tflops = work.x.bytes / ours.median_us / 1e3, work.flop / ours.median_us / 1e6
    shares = {
        "compute": tflops / (roofs.products_tflops or roofs.cublas_tflops),
        "memory": gbytes / (roofs.pages_gbytes or 3350.0),
    }
    roof = max(shares, key=lambda name: shares[name])
    return Result(
        **subject,
        cold=ours,
        warm=ours_warm,
        schedule=schedule,
        gbytes=gbytes,
        tflops=tflops,
        roof=roof,
        roof_share=shares[roof],
        cublas_share=tflops / roofs.cublas_tflops,
        clock_mhz=clock,
        peers=cold,
        peers_warm=warm,
    )


def combine_us(text: str) -> float | None:
    """Median time from decode's end to combine's, in microseconds, over cold eager calls. None: no such kernels were seen.

    The profiler slows graphs that the process times afterwards: call this when everything else is timed.
    """
    work = Workload(text)
    for call in work.decode:
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        # The device is kept busy for about a millisecond, until all calls are in its stream; else a short one waits for launches.
        cuda._sleep(2_000_000)
        for i in range(PROFILED_CALLS):
            work.decode[i % len(work.decode)]()
        torch.cuda.synchronize()
    return combine_after_decode((e.name, e.time_range.start, e.time_range.end) for e in profile.events() or ())


def combine_after_decode(kernels: Iterable[tuple[str, float, float]]) -> float | None:
    """kernels: names, begins and ends. Median of end(combine) - end(decode) over calls, None without any.

    Combine starts while decode still runs, so the difference of ends is what it adds to a call. Kernels of one stream begin in
    order.
    """
    times = []
    decode_end: float | None = None
    for name, _, end in sorted(kernels, key=lambda kernel: kernel[1]):
        if "decode_dense_kernel" in name:
            decode_end = end
        elif "combine_kernel" in name and decode_end is not None:
            times.append(end - decode_end)
            decode_end = None
    return statistics.median(times) if times else None


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
    f"{'problem':<62} {'mean len':>8} {'cold us':>9} {'spread':>13} {'warm us':>9} {'sched':>6} {'GB/s':>6} {'TFLOP/s':>8} "
    f"{'nearer roof':>13} {'cuBLAS':>7} {'MHz':>5}"
)


def line(r: Result) -> str:
    """A row under HEADER; then each peer's times, cold/warm."""
    spread = f"{r.cold.min_us:.1f}-{r.cold.max_us:.1f}"
    others = "".join(f"  {name} {t.median_us:.1f}/{r.peers_warm[name].median_us:.1f}" for name, t in r.peers.items())
    roof = f"{r.roof} {r.roof_share:.2f}"
    return (
        f"{r.problem:<62} {r.mean_len:>8.0f} {r.cold.median_us:>9.1f} {spread:>13} {r.warm.median_us:>9.1f} "
        f"{r.schedule.median_us:>6.2f} {r.gbytes:>6.0f} {r.tflops:>8.1f} {roof:>13} {r.cublas_share:>7.2f} "
        f"{r.clock_mhz:>5}{others}"
    )


def table(
    problems: list[str],
    roofs: Roofs,
    rounds: int = 7,
    with_peers: bool = False,
    peer_library: str | None = None,
    show: Callable[[str], None] = print,
) -> list[Result]:
    """Times the problems one after the other, and shows each as it comes. An error of any row is raised."""
    show(f"{machine()['gpu']}; roofs: {roofs}\n{HEADER}")
    results = []
    for text in problems:
        results.append(run(text, roofs, rounds, with_peers, peer_library))
        show(line(results[-1]))
        cuda.empty_cache()
    return results


def add_combine(problems: list[str], results: list[Result], show: Callable[[str], None] = print) -> None:
    """Fills in combine_us. After everything else: the profiler slows the graphs that a process times later."""
    for text, result in zip(problems, results, strict=True):
        result.combine_us = combine_us(text)
        found = "no combine seen" if result.combine_us is None else f"combine {result.combine_us:.2f} us after decode"
        show(f"{result.problem:<62} {result.mean_len:>8.0f} {found}")
        cuda.empty_cache()


def main(problems: list[str], rounds: int = 7, as_json: bool = False, with_peers: bool = False) -> bool:
    """Prints a table, or a line of JSON for each problem."""
    if not cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    for text in problems:
        parse(text)  # refuses nonsense before anything is measured
    show = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    roofs = measure_roofs(rounds)
    results = table(problems, roofs, rounds, with_peers, show=show)
    add_combine(problems, results, show)
    if as_json:
        for result in results:
            print(json.dumps({**dataclasses.asdict(result), "roofs": dataclasses.asdict(roofs), "machine": machine()}))
    return True
