"""Every backend gives the reference's numbers, for any number of threads, policy and way to call it."""

from __future__ import annotations

import itertools

import mlakit
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlakit import testing

import abi
import harness
from strategies import cases


@given(data=st.data())
def test_right_numbers(backend: str, data: st.DataObject) -> None:
    harness.decode_and_check(data.draw(cases(dtypes=harness.dtypes(backend))), backend)


@pytest.mark.parametrize("pair", list(itertools.combinations(abi.cpu_backends(), 2)), ids="~".join)
@given(data=st.data())
def test_backends_agree(pair: tuple[str, str], data: st.DataObject) -> None:
    """Straight against each other, so that a reference that is wrong alike in Python and C cannot hide a difference."""
    one, other = pair
    common = tuple(name for name in harness.dtypes(one) if name in harness.dtypes(other))
    case = data.draw(cases(dtypes=common, has_memory=False))
    first, second = testing.make_inputs(case), testing.make_inputs(case)
    harness.decode(case, one, first)
    harness.decode(case, other, second)
    want = testing.expect(case, first)
    for name in ("out", "lse"):
        if getattr(first, name) is not None:
            # Each may be off by its limit, on either side.
            limit = 2 * getattr(want, f"{name}_limit")
            a = testing.reference.float64(getattr(first, name))
            testing.check_close(getattr(second, name), a, limit, f"{name} of {one} and {other}: {case}")


@given(data=st.data())
def test_threads_change_no_bit(backend: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtypes=harness.dtypes(backend)))
    threads = data.draw(st.sampled_from((2, 3, 7)))
    harness.assert_same_bits(harness.decode(case, backend), harness.decode(case, backend, threads=threads), f"1 and {threads} threads")


@given(data=st.data())
def test_runs_repeat(backend: str, data: st.DataObject) -> None:
    """A second decode with the same schedule and scratch, after another call used them, gives the same bits."""
    case = data.draw(cases(dtypes=harness.dtypes(backend)))
    inputs, again = testing.make_inputs(case), testing.make_inputs(case)
    harness.last_case = case
    with abi.Plan(case.problem, backend) as plan:
        plan.schedule(inputs)
        plan.decode(inputs)
        plan.scratch_buffer[...] = 0xFF
        plan.decode(again)
    first, second = abi.Result(inputs.out.copy(), inputs.lse), abi.Result(again.out.copy(), again.lse)
    if case.has_lse:
        first.lse, second.lse = inputs.lse.copy(), again.lse.copy()
    harness.assert_same_bits(first, second, "run again")


@given(case=cases())
def test_the_python_package_gives_the_bits_of_the_c_abi(case: testing.Case) -> None:
    """Plan.schedule and Plan.decode, on the backend that is chosen by default."""
    harness.last_case = case
    plan = mlakit.Plan(case.problem)
    inputs = testing.make_inputs(case)
    schedule = plan.schedule(inputs.cache_seqlens, inputs.cu_seqlens_q)
    optional = {"q_rope": inputs.q_rope, "kv_rope": inputs.kv_rope, "sink": inputs.sink}
    out, lse = plan.decode(
        *(inputs.q, inputs.kv_cache, inputs.block_table, schedule),
        **optional,
        out=inputs.out,
        lse=inputs.lse,
        return_lse=case.has_lse,
    )
    result = abi.Result(out.copy(), None if lse is None else lse.copy())
    harness.assert_same_bits(harness.decode(case, plan.info.backend), result, "C and Python")


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
