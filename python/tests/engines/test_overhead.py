"""What a call costs in Python beyond the library's own work, as python/benchmarks/bench_call.py measures it.

The bars are 3 us for a bound call and 8 us for every other. The limits here are 4 times those: they hold on a machine that others
use, and a copy, an import or a tensor that is taken apart by slow means breaks them.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mlakit
from mlakit import testing

BARS = {"bound": 3.0, "plan.decode": 8.0, "plan.schedule": 8.0, "mla_decode": 8.0, "mla_decode, new outputs": 8.0}
SLACK = 4.0


def microseconds(call: Callable[[], Any]) -> float:
    """Processor time of the fastest round, so that waiting for a busy machine does not count."""
    call()
    return min(timeit.repeat(call, number=1000, repeat=15, timer=time.process_time)) / 1000 * 1e6


@pytest.mark.parametrize("name", BARS)
def test_a_call_on_torch_tensors_is_cheap(name: str) -> None:
    case = testing.Case("dense:bf16:b1:q1:h16:l256", (130,))
    inputs = testing.make_inputs(case, "torch")
    # No requests: nothing to compute, and every argument to check.
    call = (inputs.q[:0], inputs.kv_cache, inputs.block_table[:0])
    out, lse, lengths = inputs.out[:0], inputs.lse[:0], inputs.cache_seqlens[:0]
    plan = mlakit.Plan(case.problem, mlakit.Context(num_threads=1))
    schedule = plan.schedule(lengths)
    calls: dict[str, Callable[[], Any]] = {
        "bound": plan.bind(*call, schedule, out=out, lse=lse),
        "plan.decode": lambda: plan.decode(*call, schedule, out=out, lse=lse),
        "plan.schedule": lambda: plan.schedule(lengths),
        "mla_decode": lambda: mlakit.mla_decode(*call, lengths, out=out, lse=lse),
        "mla_decode, new outputs": lambda: mlakit.mla_decode(*call, lengths),
    }
    assert microseconds(calls[name]) < SLACK * BARS[name]


def test_a_bound_call_follows_the_values_of_its_tensors() -> None:
    case = testing.mla_case([130, 7])
    inputs = testing.make_inputs(case, "torch")
    plan = mlakit.Plan(case.problem)
    schedule = plan.schedule(inputs.cache_seqlens)
    bound = plan.bind(inputs.q, inputs.kv_cache, inputs.block_table, schedule, out=inputs.out, lse=inputs.lse)
    for scale in (1.0, -0.5):
        inputs.q.mul_(scale)
        inputs.out.fill_(float("nan"))
        bound()
        testing.check_decode(case, inputs)
    # Lengths that grew since the schedule was made: an error, never the old lengths.
    inputs.cache_seqlens += 1
    before = inputs.out.clone()
    with pytest.raises(ValueError, match=r"cache_seqlens: must be those of the schedule.*call mla_schedule again"):
        bound()
    assert torch.equal(inputs.out, before)
