"""Mutated structs and tensors: refused with a status and nothing written, or right numbers; never a crash.

A mutation never points a tensor at memory that is not there: strides only shrink, offsets stay within a margin that the arrays
have. Whatever else a mutation says, the library can tell. Run it against a build under AddressSanitizer as README.md says.
"""

from __future__ import annotations

import ctypes
import string
from ctypes import byref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import abi
import harness
from mlakit import testing
from strategies import any_int, cases, different

REFUSALS = (abi.INVALID_ARGUMENT, abi.UNSUPPORTED, abi.WORKSPACE_TOO_SMALL)
MARGIN = 16  # elements behind each array
TENSORS = ("q", "q_rope", "kv_cache", "kv_rope", "block_table", "cache_seqlens", "cu_seqlens_q", "sink", "out", "lse")
UNUSED = ("kv_scale", "indices", "topk_length", "extra_kv_cache", "extra_block_table", "extra_seqlens", "tree_mask")


def assert_refused(status: int) -> None:
    assert status in REFUSALS, f"{abi.STATUS.get(status, status)}: {abi.library().mla_last_error()}"
    message = abi.library().mla_last_error().decode()
    assert message
    assert "\n" not in message


def with_margin(case: testing.Case) -> testing.Case:
    """Row major tensors, with free elements behind the last one."""
    rows = 2 if case.parsed.ragged_q else 3
    ndims = {"q": rows + 1, "q_rope": rows + 1, "kv_cache": 4, "kv_rope": 4, "block_table": 2, "cache_seqlens": 1}
    ndims |= {"out": rows + 1, "lse": rows}
    return case.replace(memory={name: testing.Memory(tuple(range(n)), (MARGIN, *[0] * (n - 1))) for name, n in ndims.items()})


small_cases = cases(max_batch=3, most=150, has_memory=False).map(with_margin)


# ---------------------------------------------------------------------------------------------------------------- tensors


@st.composite
def mutations(draw: st.DrawFn, array: np.ndarray, is_fixed: bool) -> tuple[str, Any]:
    """(field, value) for the descriptor of an array. is_fixed: never one under which other values would be read."""
    itemsize, axis = array.itemsize, draw(st.integers(0, array.ndim - 1))
    stride = array.strides[axis] // itemsize
    strides = [(f"strides.{axis}", st.one_of(st.integers(-3, stride), any_int(64).filter(lambda n: n < 0)))]
    if array.shape[axis] <= 1:
        strides = [(f"strides.{axis}", any_int(64))]
    choices = [
        ("data", st.sampled_from((0, 1))),  # NULL, or an odd address
        ("device.device_type", different(1, any_int(32))),
        ("device.device_id", any_int(32)),
        ("ndim", different(array.ndim, any_int(32))),
        ("dtype.code", any_int(8, signed=False)),
        ("dtype.bits", any_int(8, signed=False)),
        ("dtype.lanes", different(1, any_int(16, signed=False))),
        (f"shape.{axis}", different(array.shape[axis], any_int(64))),
        ("shape", st.none()),
        *([] if is_fixed else strides),
        *([] if is_fixed else [("strides", st.none()), ("byte_offset", st.integers(0, MARGIN * itemsize))]),
    ]
    field, values = draw(st.sampled_from(choices))
    return field, draw(values)


def mutate(pointer: Any, field: str, value: Any) -> None:
    tensor = pointer.contents
    name, _, rest = field.partition(".")
    if field == "data":
        tensor.data = tensor.data + 1 if value else None
    elif name in ("shape", "strides") and not rest:
        setattr(tensor, name, None)
    elif name in ("shape", "strides"):
        getattr(tensor, name)[int(rest)] = value
    elif rest:
        setattr(getattr(tensor, name), rest, value)
    else:
        setattr(tensor, name, value)


def seen_through(array: np.ndarray, field: str, value: Any) -> np.ndarray | None:
    """The elements that a mutated descriptor names; None if it reaches beyond the array's memory, as only a refused one may."""
    if array.size == 0:
        return array
    itemsize, strides, offset = array.itemsize, list(array.strides), 0
    if field.startswith("strides."):
        axis = int(field[-1])
        if array.shape[axis] > 1:
            strides[axis] = value * itemsize
    elif field == "strides":
        strides = [itemsize * int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)]
    elif field == "byte_offset":
        offset = value
    if any(stride < 0 for stride in strides) or offset % itemsize:
        return None
    memory = array if array.base is None else array.base
    return np.ndarray(array.shape, array.dtype, memory, offset, strides)


@given(case=small_cases, data=st.data())
def test_mutated_tensors(case: testing.Case, data: st.DataObject) -> None:
    backend = data.draw(st.sampled_from(harness.backends(case)))
    harness.last_case = case
    inputs = testing.make_inputs(case)
    present = [name for name in TENSORS if getattr(inputs, name) is not None]
    names = data.draw(st.lists(st.sampled_from(present), min_size=1, max_size=2, unique=True))
    changes = {}
    for name in names:
        array = getattr(inputs, name)
        changes[name] = data.draw(mutations(array, is_fixed=name in ("cu_seqlens_q", "sink")), label=name)
    before = {name: getattr(inputs, name).base.tobytes() for name in ("out", "lse") if getattr(inputs, name) is not None}

    with abi.Plan(case.problem, backend) as plan:
        schedule_args, decode_args = plan.schedule_args(inputs), plan.decode_args(inputs)
        for name, (field, value) in changes.items():
            for args in (schedule_args, decode_args):
                if hasattr(args, name):
                    pointer = abi.tensor(getattr(inputs, name))
                    mutate(pointer, field, value)
                    setattr(args, name, pointer)
        status = abi.library().mla_schedule(plan.handle, byref(schedule_args), None)
        if status == abi.OK:
            status = abi.library().mla_decode(plan.handle, byref(decode_args), None)
    if status != abi.OK:
        assert_refused(status)
        for name, old in before.items():
            assert getattr(inputs, name).base.tobytes() == old, f"{name} was written by a refused call"
        return
    for name, (field, value) in changes.items():
        view = seen_through(getattr(inputs, name), field, value)
        assert view is not None, f"{name}.{field} = {value} was taken"
        setattr(inputs, name, view)
    testing.check_decode(case, inputs, what=f"{backend} with {changes}", exact=harness.is_exact(backend))


# ---------------------------------------------------------------------------------------------------------------- structs


def resized(args: ctypes.Structure, struct_size: int, tail: int) -> Any:
    """A copy of args with this struct_size and `tail` in the bytes behind the fields that the library knows."""
    size = ctypes.sizeof(args)
    memory = ctypes.create_string_buffer(bytes(args) + bytes([tail]) * max(struct_size - size, 0))
    copy = ctypes.cast(memory, ctypes.POINTER(type(args)))
    copy.contents.struct_size = struct_size
    copy.keep = (memory, args)
    return copy


@given(case=small_cases, data=st.data())
def test_mutated_structs(case: testing.Case, data: st.DataObject) -> None:
    backend = data.draw(st.sampled_from(harness.backends(case)))
    harness.last_case = case
    inputs = testing.make_inputs(case)
    before = {name: getattr(inputs, name).base.tobytes() for name in ("out", "lse") if getattr(inputs, name) is not None}
    expected = {"sink": inputs.sink, "lse": inputs.lse}
    with abi.Plan(case.problem, backend) as plan:
        plan.schedule(inputs)
        args = plan.decode_args(inputs)
        kind = data.draw(st.sampled_from(("null", "flags", "unused", "buffer", "struct_size")))
        must_refuse, pointer = True, byref(args)
        if kind == "null":
            name = data.draw(
                st.sampled_from([name for name in TENSORS if hasattr(args, name) and getattr(inputs, name) is not None])
            )
            setattr(args, name, None)
            # Without one rope view the other tensor has too few columns.
            must_refuse = name in ("q", "q_rope", "kv_cache", "kv_rope", "block_table", "out")
            if name in expected:
                expected[name] = None
        elif kind == "flags":
            args.flags = data.draw(st.integers(1, 2**32 - 1))
        elif kind == "unused":
            setattr(args, data.draw(st.sampled_from(UNUSED)), abi.tensor(inputs.q))
        elif kind == "buffer":
            name = data.draw(st.sampled_from(("schedule", "scratch")))
            needed = getattr(plan.info, f"{name}_bytes")
            must_refuse = needed > 0
            change = data.draw(st.sampled_from(("null", "short", "unaligned", "endless")))
            if change == "null":
                setattr(args, name, None)
            elif change == "short":
                setattr(args, f"{name}_bytes", data.draw(st.integers(0, max(needed - 1, 0))))
            elif change == "endless":
                setattr(args, f"{name}_bytes", data.draw(st.integers(2**63, 2**64 - 1)))
            else:
                step = data.draw(st.sampled_from((1, 4, 64)))
                setattr(args, name, getattr(args, name) + step)
                must_refuse = must_refuse and getattr(plan.info, f"{name}_alignment") > step
        else:
            known = ctypes.sizeof(args)
            # What an older header would say (whole fields only), what a newer one would, and what nobody would.
            older = [offset for offset in range(8, known + 1, 8) if offset > abi.DecodeArgs.scratch_bytes.offset]
            size = data.draw(st.one_of(st.sampled_from(older), st.integers(known, known + 64), st.integers(0, 7), st.just(2**31)))
            tail = data.draw(st.sampled_from((0, 1)))
            pointer = resized(args, min(size, known + 64), tail)
            pointer.contents.struct_size = size
            must_refuse = size < 8 or size > known + 64 or (size > known and tail != 0)
        status = abi.library().mla_decode(plan.handle, pointer, None)
    if status != abi.OK:
        assert must_refuse, abi.library().mla_last_error()
        assert_refused(status)
        for name, old in before.items():
            assert getattr(inputs, name).base.tobytes() == old, f"{name} was written by a refused call"
        return
    assert not must_refuse
    if expected["lse"] is None and inputs.lse is not None:
        assert inputs.lse.base.tobytes() == before["lse"]
    inputs.sink, inputs.lse = expected["sink"], expected["lse"]
    testing.check_decode(case, inputs, what=backend, exact=harness.is_exact(backend))


# ---------------------------------------------------------------------------------------------------------------- problem

_WIDTHS = {ctypes.c_uint32: (32, False), ctypes.c_int32: (32, True), ctypes.c_int64: (64, True)}


@given(case=small_cases, data=st.data())
def test_mutated_problems(case: testing.Case, data: st.DataObject) -> None:
    """A field of any value: no plan and a reason, or a plan that refuses the call's tensors or gives its own right numbers."""
    backend = data.draw(st.sampled_from(harness.backends(case)))
    harness.last_case = case
    problem = abi.parse(case.problem)
    for name in data.draw(st.lists(st.sampled_from([name for name, _ in abi.Problem._fields_[1:]]), min_size=1, max_size=2)):
        kind = dict(abi.Problem._fields_)[name]
        values = st.floats(width=32) if kind is ctypes.c_float else any_int(_WIDTHS[kind][0], signed=_WIDTHS[kind][1])
        setattr(problem, name, data.draw(values, label=name))
    handle = ctypes.c_void_p(1)
    status = abi.library().mla_plan_create(byref(handle), abi.context(backend), byref(problem))
    if status != abi.OK:
        assert_refused(status)
        assert handle.value is None
        return
    info = abi.PlanInfo(struct_size=ctypes.sizeof(abi.PlanInfo))
    abi.check(abi.library().mla_plan_get_info(handle, byref(info)))
    printed, needed = info.problem.decode(), info.schedule_bytes + info.scratch_bytes
    abi.library().mla_plan_destroy(handle)
    assert info.schedule_bytes > 0
    assert bin(info.schedule_alignment).count("1") == bin(info.scratch_alignment).count("1") == 1
    if needed > 2**25:
        return
    inputs = testing.make_inputs(case)
    before = inputs.out.base.tobytes()
    try:
        abi.run(problem, inputs, backend)
    except abi.Refused as refusal:
        assert_refused(refusal.status)
        assert inputs.out.base.tobytes() == before
    else:
        changed = case.replace(problem=printed)
        assert changed.parsed.softmax_scale is None or np.isfinite(changed.parsed.softmax_scale)
        testing.check_decode(changed, inputs, what=backend, exact=harness.is_exact(backend))


@given(
    text=st.one_of(st.text(st.sampled_from(string.printable), max_size=40), st.text(max_size=20)), case=cases(), data=st.data()
)
def test_any_text_as_a_problem(text: str, case: testing.Case, data: st.DataObject) -> None:
    """Random text, and a valid line with a piece of it replaced, doubled or cut."""
    line = case.problem
    begin = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(begin, len(line)))
    for candidate in (text, line[:begin] + text + line[end:], line[:begin], line[:end] + line[begin:]):
        problem = abi.Problem()
        status = abi.library().mla_problem_parse(byref(problem), candidate.encode().replace(b"\0", b"0"))
        if status != abi.OK:
            assert status == abi.INVALID_ARGUMENT
            assert_refused(status)
            continue
        # Whatever parse takes, format prints so that parse takes it again, or refuses because its values have no form.
        formatted = format_problem(problem)
        if formatted is not None:
            assert format_problem(abi.parse(formatted)) == formatted


def format_problem(problem: abi.Problem) -> str | None:
    buffer, needed = ctypes.create_string_buffer(512), ctypes.c_size_t()
    if abi.library().mla_problem_format(byref(problem), buffer, 512, byref(needed)) != abi.OK:
        return None
    assert needed.value == len(buffer.value) + 1
    return buffer.value.decode()


@given(case=cases(), room=st.integers(0, 80))
def test_format_stays_in_its_buffer(case: testing.Case, room: int) -> None:
    problem, needed = abi.parse(case.problem), ctypes.c_size_t()
    buffer = ctypes.create_string_buffer(b"\x7f" * 200, 200)
    status = abi.library().mla_problem_format(byref(problem), buffer, room, byref(needed))
    assert buffer.raw[room:] == b"\x7f" * (200 - room)
    assert (status == abi.OK) == (room >= needed.value)
    if status == abi.OK:
        assert buffer.raw[needed.value - 1] == 0


# ---------------------------------------------------------------------------------------------------------- context, merge


@given(
    name=st.one_of(
        st.none(), st.binary(max_size=20).filter(lambda b: b"\0" not in b), st.sampled_from(abi.cpu_backends()).map(str.encode)
    ),
    threads=any_int(32),
    flags=st.sampled_from((0, 0, 0, 1, 2**31)),
    reserved=st.sampled_from((0, 0, 0, 1, -1)),
    index=any_int(32),
)
def test_any_context(name: bytes | None, threads: int, flags: int, reserved: int, index: int) -> None:
    options = abi.ContextOptions(ctypes.sizeof(abi.ContextOptions), flags, name, threads, reserved, None, None)
    handle = ctypes.c_void_p(1)
    status = abi.library().mla_context_create(byref(handle), byref(options))
    if status == abi.OK:
        assert flags == reserved == 0
        assert threads >= 0
        abi.library().mla_context_destroy(handle)
    else:
        assert_refused(status)
        assert handle.value is None
    info = abi.BackendInfo(struct_size=ctypes.sizeof(abi.BackendInfo))
    status = abi.library().mla_get_backend_info(index, byref(info))
    assert (status == abi.OK) == (info.name is not None)


@given(data=st.data())
def test_mutated_merges(data: st.DataObject) -> None:
    backend = data.draw(st.sampled_from(harness.chosen()))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    parts, tokens, heads, dim = (data.draw(st.integers(0, 3)) for _ in range(4))
    parts += 1

    def padded(shape: tuple[int, ...], values: Any) -> np.ndarray:
        memory = np.full(int(np.prod(shape)) + MARGIN, np.nan, np.float32)
        array = np.ndarray(shape, np.float32, memory)
        array[...] = values
        return array

    arrays = {
        "out_parts": padded((parts, tokens, heads, dim), rng.standard_normal((parts, tokens, heads, dim))),
        "lse_parts": padded((parts, tokens, heads), rng.standard_normal((parts, tokens, heads))),
        "out": padded((tokens, heads, dim), np.nan),
        "lse": padded((tokens, heads), np.nan),
    }
    name = data.draw(st.sampled_from(tuple(arrays)))
    field, value = data.draw(mutations(arrays[name], is_fixed=False), label=name)
    pointers = {key: abi.tensor(array) for key, array in arrays.items()}
    mutate(pointers[name], field, value)
    args = abi.MergeArgs(ctypes.sizeof(abi.MergeArgs), 0, *pointers.values())
    status = abi.library().mla_merge(abi.context(backend), byref(args), None)
    if status != abi.OK:
        assert_refused(status)
        assert np.isnan(arrays["out"].base).all()
        assert np.isnan(arrays["lse"].base).all()
        return
    view = seen_through(arrays[name], field, value)
    assert view is not None, f"{name}.{field} = {value} was taken"
    arrays[name] = view
    want_out, want_lse = testing.reference.merge_states_reference(arrays["out_parts"], arrays["lse_parts"])
    testing.check_close(arrays["out"], want_out, 1e-5, f"merged out with {name}.{field} = {value}")
    testing.check_close(arrays["lse"], want_lse, 1e-5, f"merged lse with {name}.{field} = {value}")


@pytest.mark.parametrize(
    "text", [b"", b"\xff\xfe", b"dense", b"dense:bf16:" + b"b1:" * 5000, b"dense:bf16:b99999999999999999999"]
)
def test_hostile_texts(text: bytes) -> None:
    problem = abi.Problem()
    assert_refused(abi.library().mla_problem_parse(byref(problem), text))
