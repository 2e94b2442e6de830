"""Every backend gives the reference's numbers, for any number of threads, policy and way to call it."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import abi
import harness
import mlakit
from mlakit import testing
from strategies import cases


@given(case=cases())
def test_right_numbers(case: testing.Case) -> None:
    inputs = testing.make_inputs(case)
    want = testing.expect(case, inputs)
    for backend in harness.backends(case):
        harness.decode(case, backend, inputs)
        if harness.is_exact(backend):
            testing.check_decode(case, inputs, exact=True, what=backend)
        else:
            testing.check_decode(case, inputs, want=want, what=backend)


@given(case=cases(has_memory=False))
def test_backends_agree(case: testing.Case) -> None:
    """Straight against each other, so that a reference that is wrong alike in Python and C cannot hide a difference."""
    want = testing.expect(case, testing.make_inputs(case))
    results = {backend: harness.decode(case, backend) for backend in harness.backends(case)}
    for one, other in itertools.combinations(results, 2):
        for name in ("out", "lse"):
            if getattr(results[one], name) is not None:
                # Each may be off by its limit, on either side.
                limit = 2 * getattr(want, f"{name}_limit")
                a = testing.reference.float64(getattr(results[one], name))
                testing.check_close(getattr(results[other], name), a, limit, f"{name} of {one} and {other}")


@given(case=cases(), threads=st.sampled_from((2, 3, 7)))
def test_threads_change_no_bit(case: testing.Case, threads: int) -> None:
    for backend in harness.backends(case):
        one, many = harness.decode(case, backend), harness.decode(case, backend, threads=threads)
        harness.assert_same_bits(one, many, f"{backend} with 1 and {threads} threads")


@given(case=cases())
def test_runs_repeat(case: testing.Case) -> None:
    """A second decode with the same schedule, on whatever the first left in scratch or on other bytes, gives the same bits."""
    harness.last_case = case
    inputs = testing.make_inputs(case)
    for backend in harness.backends(case):
        with abi.Plan(case.problem, backend) as plan:
            plan.schedule(inputs)
            results = []
            for fill in (None, None, 0xFF):
                if fill is not None:
                    plan.scratch_buffer[...] = fill
                plan.decode(inputs)
                results.append(abi.Result.of(inputs))
        for later in results[1:]:
            harness.assert_same_bits(results[0], later, f"{backend}, run again")


@pytest.mark.skipif("MLAKIT_LIBRARY" in os.environ, reason="the package has a library of its own, perhaps another build")
@given(case=cases())
def test_the_python_package_gives_the_bits_of_the_c_abi(case: testing.Case) -> None:
    """Plan.schedule and Plan.decode, on the backend that is chosen by default."""
    harness.last_case = case
    plan = mlakit.Plan(case.problem)
    inputs = testing.make_inputs(case)
    schedule = plan.schedule(inputs.cache_seqlens, inputs.cu_seqlens_q)
    optional = {"q_rope": inputs.q_rope, "kv_rope": inputs.kv_rope, "sink": inputs.sink}
    plan.decode(
        *(inputs.q, inputs.kv_cache, inputs.block_table, schedule),
        **optional,
        out=inputs.out,
        lse=inputs.lse,
        return_lse=case.has_lse,
    )
    harness.assert_same_bits(harness.decode(case, plan.info.backend), abi.Result.of(inputs), "C and Python")


@given(case=cases())
def test_mla_decode_in_one_call(case: testing.Case) -> None:
    """The call that makes its own plan and outputs; without out= it answers in q's type."""
    harness.last_case = case
    inputs = testing.make_inputs(case)
    given_out = {"out": inputs.out} if case.parsed.out_dtype else {}
    inputs.out, inputs.lse = mlakit.mla_decode(*inputs.positional, **inputs.keywords, **given_out)
    testing.check_decode(case, inputs, what="mlakit.mla_decode")


@given(case=cases())
def test_problem_strings_survive(case: testing.Case) -> None:
    """format says the same again after parse, and the C plan prints what Python prints for the same problem."""
    text = str(case.parsed)
    assert str(mlakit.Problem.parse(text)) == text
    with abi.Plan(case.problem, "reference") as plan:
        printed = plan.info.problem.decode()
    assert str(mlakit.Problem.parse(printed)) == printed
    # The plan's string has the defaults filled in; where nothing was left to default it is the same.
    assert printed.startswith(text.split(":scale")[0].split(":l")[0])
