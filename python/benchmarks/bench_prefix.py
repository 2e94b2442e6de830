"""What decode_shared_prefix saves: requests with a common prefix, beside plain decode, whose page lists repeat the prefix.

python python/benchmarks/bench_prefix.py [cpu|cuda] [--prefix 8192] [--own 512] [--requests 16 64] [--heads 16]

On CUDA each call is a graph of its own, with its schedules, and what the L2 holds is overwritten before every replay.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import mlakit

PAGE = 64
# Most that a row may differ between both ways, relative to its length. Each way rounds its weights to bf16, by one unit roundoff
# at most, but as parts of other blocks, so to other numbers. Over random keys these errors add up as the values themselves do,
# and stay that part of the row; single elements of a row with one heavy key may be off by more than any fixed number.
ROW_ERROR = 2 * 2.0**-8
SCALE = 192**-0.5


def calls(device: str, requests: int, heads: int, prefix: int, own: int) -> dict[str, Callable[[], Any]]:
    """Both ways over the same cache, to outputs of their own; pages lie in random order."""
    shared, each = -(-prefix // PAGE), -(-own // PAGE)
    generator = torch.Generator().manual_seed(0)
    q, cache = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((requests, 1, heads, 576), (shared + requests * each, PAGE, 1, 576))
    )
    ids = torch.randperm(cache.shape[0], generator=generator, dtype=torch.int64).to(device, torch.int32)
    prefix_table, own_table = ids[None, :shared].contiguous(), ids[shared:].reshape(requests, each)
    whole_table = torch.cat([prefix_table.expand(requests, shared), own_table], dim=1)

    def lengths(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    begins, own_lengths, whole_lengths = lengths(0, requests), lengths(*[own] * requests), lengths(*[prefix + own] * requests)
    prefix_length = lengths(prefix)
    outputs = [
        {"out": torch.empty(requests, 1, heads, 512, device=device), "lse": torch.empty(requests, 1, heads, device=device)}
        for _ in range(2)
    ]
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: mlakit.mla_decode(q, cache, whole_table, whole_lengths, softmax_scale=SCALE, **outputs[0]),
        "shared": lambda: mlakit.decode_shared_prefix(
            *(q, cache, prefix_table, prefix_length, begins, own_table, own_lengths), softmax_scale=SCALE, **outputs[1]
        ),
    }
    (plain, plain_lse), (got, got_lse) = (way() for way in ways.values())
    error = ((got - plain).norm(dim=-1) / plain.norm(dim=-1)).max().item()
    if not error <= ROW_ERROR:
        raise RuntimeError(f"a row differs by {error:.2g} of its length (allowed {ROW_ERROR:.2g})")
    torch.testing.assert_close(got_lse, plain_lse, atol=1e-4, rtol=1e-5)
    return ways


def on_cpu(call: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return seconds


def on_cuda(call: Callable[[], Any]) -> Callable[[], float]:
    graph, flush = torch.cuda.CUDAGraph(), torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    with torch.cuda.graph(graph):
        call()

    def seconds() -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        flush.zero_()
        events[0].record()
        graph.replay()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prefix", type=int, default=8192, help="common tokens")
    parser.add_argument("--own", type=int, default=512, help="tokens of each request after them")
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for requests in options.requests:
        ways = calls(options.device, requests, options.heads, options.prefix, options.own)
        timers = {name: (on_cuda if options.device == "cuda" else on_cpu)(call) for name, call in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(options.rounds):  # in turns, so that whatever else the machine does meets both
            for name, seconds in timers.items():
                times[name].append(seconds() * 1e6)
        plain, shared = (statistics.median(times[name]) for name in ("plain", "shared"))
        spread = ", ".join(f"{name} {min(t):.0f} to {max(t):.0f}" for name, t in times.items())
        print(
            f"{options.device} {requests} x ({options.prefix} + {options.own}), {options.heads} heads: "
            f"plain {plain:.0f} us, shared {shared:.0f} us, {plain / shared:.2f} times as fast ({spread})"
        )


if __name__ == "__main__":
    main()
