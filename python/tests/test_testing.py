"""mlakit.testing: inputs are hostile where they must be, cases survive JSON, and the checks catch what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from mlakit import testing
from mlakit.testing import NAMED_CASES, Case, Memory, check_close


def answered(case: Case) -> tuple[testing.Inputs, testing.Expected]:
    """Inputs with the right answer in their outputs."""
    inputs = testing.make_inputs(case)
    want = testing.expect(case, inputs)
    inputs.out[...] = want.out.astype(inputs.out.dtype)
    if inputs.lse is not None:
        inputs.lse[...] = want.lse.astype(np.float32)
    return inputs, want


# ------------------------------------------------------------------------------------------------------------------ cases


@pytest.mark.parametrize("name", NAMED_CASES)
def test_named_cases_survive_json(name: str) -> None:
    case = NAMED_CASES[name]
    assert Case.from_json(case.to_json()) == case
    assert "\n" not in case.to_json()
    assert str(case) == case.to_json()


def test_json_leaves_defaults_out() -> None:
    assert Case("dense:fp32:h1:l4", (3,)).to_json() == '{"problem": "dense:fp32:h1:l4", "lengths": [3]}'


def test_json_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="lenghts"):
        Case.from_json('{"problem": "dense:fp32:h1:l4", "lenghts": [3]}')


# ----------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("name", NAMED_CASES)
def test_a_case_gives_the_same_bits_every_time(name: str) -> None:
    first, second = (testing.make_inputs(NAMED_CASES[name]).tensors() for _ in range(2))
    for key, array in first.items():
        if array is not None:
            assert array.base is None or array.base.tobytes() == second[key].base.tobytes(), key
            assert array.tobytes() == second[key].tobytes(), key
            assert array.strides == second[key].strides, key


@pytest.mark.parametrize("name", NAMED_CASES)
def test_what_must_not_be_read_is_poison_and_what_is_read_is_not(name: str) -> None:
    case = NAMED_CASES[name]
    problem, inputs = case.parsed, testing.make_inputs(case)
    pages, page_size = inputs.kv_cache.shape[:2]
    is_used = np.zeros((pages, page_size), bool)
    for request, length in enumerate(case.lengths):
        used = -(-length // page_size)
        ids = inputs.block_table[request, :used]
        assert ((ids >= 0) & (ids < pages)).all()
        tail = inputs.block_table[request, used:]
        assert tail.size >= 1
        assert ((tail < 0) | (tail >= pages)).all()
        position = np.arange(length)
        where = (inputs.block_table[request, position // page_size], position % page_size)
        assert not is_used[where].any(), "two requests share a slot"
        is_used[where] = True
    for cache in filter(lambda c: c is not None, (inputs.kv_cache, inputs.kv_rope)):
        numbers = testing.reference.float64(cache)
        assert np.isfinite(numbers[is_used]).all()
        assert np.isnan(numbers[~is_used]).all()
        assert not is_used.any() or np.abs(numbers[is_used]).max() > 0
    assert np.isfinite(testing.reference.float64(inputs.q)).all()
    for output in filter(lambda o: o is not None, (inputs.out, inputs.lse)):
        assert np.isnan(output.base if output.base is not None else output).all()
    assert inputs.q.shape[-1] == (problem.value_dim if case.is_split else problem.head_dim)


def test_pages_are_spread_over_the_pool() -> None:
    table = testing.make_inputs(NAMED_CASES["long"]).block_table[0, :79]
    assert (np.diff(table) != 1).sum() > 60


def test_memory_says_where_elements_lie() -> None:
    case = Case("dense:fp32:b2:q3:h4:d8:v8:p4:l5", (5, 2), memory={"lse": Memory((2, 0, 1), (1, 2, 3), 2)})
    lse = testing.make_inputs(case).lse
    assert [stride // 4 for stride in lse.strides] == [3 * 2 + 2, 2, (3 * 2 + 2) * 2 + 1]


def test_torch_has_the_same_numbers_and_strides() -> None:
    pytest.importorskip("torch")
    for name in ("strided", "two_views", "fp16", "ragged"):
        arrays = testing.make_inputs(NAMED_CASES[name]).tensors()
        tensors = testing.make_inputs(NAMED_CASES[name], "torch").tensors()
        for key, array in arrays.items():
            if array is not None:
                assert [stride // array.itemsize for stride in array.strides] == list(tensors[key].stride()), key
                np.testing.assert_array_equal(testing.reference.float64(tensors[key]), testing.reference.float64(array))


# ----------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("name", NAMED_CASES)
def test_the_rounded_reference_passes(name: str) -> None:
    testing.check_decode(NAMED_CASES[name], answered(NAMED_CASES[name])[0])


def round_to(values: np.ndarray, roundoff: float) -> np.ndarray:
    """values with as many bits as a type of this unit roundoff has."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa / roundoff / 2) * roundoff * 2, exponent)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("length", [1, 2, 5, 64, 1000])
def test_a_plain_computation_in_the_type_passes(dtype: str, length: int) -> None:
    """Weights rounded to the type before the second product, as every flash kernel does, is what the table allows."""
    case = Case(f"dense:{dtype}:b1:q1:h16:d576:v512:p64:l{length}", (length,))
    inputs = testing.make_inputs(case)
    [group] = testing.reference.groups(
        inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, *(False, None, None, None)
    )
    scores = 576**-0.5 * (group.q @ group.keys.T)
    exps = np.exp(scores - scores.max(-1, keepdims=True))
    out = round_to(exps, testing.ROUNDOFF[dtype]) @ group.keys[:, :512] / exps.sum(-1, keepdims=True)
    inputs.out[...] = out.astype(inputs.out.dtype)
    inputs.lse[...] = scores.max(-1) + np.log(exps.sum(-1))
    testing.check_decode(case, inputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_wrong_answers_fail(dtype: str) -> None:
    """Each of these has been somebody's bug; none of them moves a whole tensor's cosine by much."""
    case = Case(f"dense:{dtype}:b3:q2:h16:d576:v512:p64:l300:causal", (300, 65, 2))

    def fails(break_it: object, match: str) -> None:
        inputs, _ = answered(case)
        break_it(inputs)
        with pytest.raises(AssertionError, match=match):
            testing.check_decode(case, inputs)

    def zero_a_row(inputs: testing.Inputs) -> None:
        inputs.out[1, 0, 5] = 0

    def swap_heads(inputs: testing.Inputs) -> None:
        inputs.out[0, 0, [2, 3]] = inputs.out[0, 0, [3, 2]]

    def leave_one_unwritten(inputs: testing.Inputs) -> None:
        inputs.out[2, 1, 15, 511] = np.nan

    def forget_a_key(inputs: testing.Inputs) -> None:
        shorter = testing.make_inputs(case)
        shorter.cache_seqlens[0] = 299
        inputs.out[0], inputs.lse[0] = testing.expect(case, shorter).out[0], testing.expect(case, shorter).lse[0]

    def other_base(inputs: testing.Inputs) -> None:
        inputs.lse[0] /= np.float32(np.log(2))

    def bias(inputs: testing.Inputs) -> None:
        inputs.out[...] = (testing.reference.float64(inputs.out) * (1 + 2e-3)).astype(inputs.out.dtype)

    fails(zero_a_row, r"out: \d+ of \d+ are off, first \[1, 0, 5, \d+\]")
    fails(swap_heads, r"first \[0, 0, 2, \d+\]")
    fails(leave_one_unwritten, r"1 of \d+ are off, first \[2, 1, 15, 511\]: got np.float64\(nan\)")
    fails(forget_a_key, r"first \[0, 0, 0, \d+\]")
    fails(other_base, r"lse: \d+ of \d+ are off")
    if dtype != "bf16":
        fails(bias, "are off")


def test_the_cosine_finds_what_each_element_hides() -> None:
    rng = np.random.default_rng(0)
    want = rng.standard_normal((2, 512))
    got = want + 0.01 * rng.standard_normal((2, 512))
    check_close(got, want, 0.1, "row")
    with pytest.raises(AssertionError, match=r"row: row \[\d\]: 1 - cosine is \S+, allowed 1e-06"):
        check_close(got, want, 0.1, "row", one_minus_cosine=1e-6)


@pytest.mark.parametrize(("got", "want"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, np.nan), (np.inf, -np.inf), (3e38, np.inf)])
def test_what_is_not_finite_is_at_the_same_places(got: float, want: float) -> None:
    with pytest.raises(AssertionError, match="1 of 2 are off"):
        check_close(np.array([got, 0.0]), np.array([want, 0.0]), 1e30)
    for same in (np.nan, np.inf, -np.inf):
        check_close(np.array([same]), np.array([same]), 0.0)


def test_a_failure_names_the_case() -> None:
    inputs, _ = answered(NAMED_CASES["tiny"])
    inputs.out[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError) as caught:
        testing.check_decode(NAMED_CASES["tiny"], inputs, what="cpu-scalar")
    assert "cpu-scalar: out: 1 of" in str(caught.value)
    assert str(caught.value).endswith(NAMED_CASES["tiny"].to_json())


def test_shapes_must_be_equal() -> None:
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(3,\)"):
        check_close(np.zeros(2), np.zeros(3), 1.0)
