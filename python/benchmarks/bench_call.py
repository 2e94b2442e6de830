"""What a call costs in Python, in microseconds over the library's own work: a batch of no requests leaves nothing else to time.

python python/benchmarks/bench_call.py [torch|numpy|torch:cuda]
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from typing import Any

import mlakit
from mlakit import testing


def microseconds(call: Callable[[], Any], number: int = 5000, rounds: int = 15) -> float:
    call()
    return min(timeit.repeat(call, number=number, repeat=rounds)) / number * 1e6


def main(chosen: str) -> None:
    framework, _, device = chosen.partition(":")
    case = testing.Case("dense:bf16:b1:q1:h16:l256" + (":cuda0" if device == "cuda" else ""), (130,))
    full = testing.make_inputs(case, framework, device or "cpu")
    q, cache, table, lengths = full.q[:0], full.kv_cache, full.block_table[:0], full.cache_seqlens[:0]
    out, lse = full.out[:0], full.lse[:0]
    plan = mlakit.Plan(case.problem)
    schedule = plan.schedule(lengths)
    calls: dict[str, Callable[[], Any]] = {
        "bound()": plan.bind(q, cache, table, schedule, out=out, lse=lse),
        "plan.decode(out=, lse=)": lambda: plan.decode(q, cache, table, schedule, out=out, lse=lse),
        "plan.decode()": lambda: plan.decode(q, cache, table, schedule),
        "plan.schedule()": lambda: plan.schedule(lengths),
        "plan.schedule(buffer=)": lambda: plan.schedule(lengths, buffer=schedule.buffer),  # the same without an allocation
        "mla_decode(out=, lse=)": lambda: mlakit.mla_decode(q, cache, table, lengths, out=out, lse=lse),
        "mla_decode()": lambda: mlakit.mla_decode(q, cache, table, lengths),
    }
    if framework == "torch":
        # What new outputs cost at the least.
        calls["torch.empty, twice"] = lambda: (q.new_empty((0, 1, 16, 512)), q.new_empty((0, 1, 16), dtype=lse.dtype))
    for name, call in calls.items():
        print(f"{chosen:10} {name:24} {microseconds(call):6.2f} us")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["torch", "numpy"]:
        main(name)
