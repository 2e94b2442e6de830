"""Every call of bad_calls.json, through the C ABI and from Python: refused with a message that helps, and nothing written.

An entry says which call it is, what is changed from a good one, and what the message has to hold:

    argument   what the message begins with
    came       what came, in the message's words
    allowed    what would have been right, or what to do: all of these

status is MLA_INVALID_ARGUMENT where none is given; only: "c" or "python" for what the other side cannot express.
Changes of arrays are in `change` below; "base" picks one of BASES.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import byref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlakit
from mlakit import testing

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "fuzz"))
import abi

ENTRIES = {entry["name"]: entry for entry in json.loads((Path(__file__).parent / "bad_calls.json").read_text())}
IN_C = [name for name, entry in ENTRIES.items() if entry.get("only") != "python"]
IN_PYTHON = [name for name, entry in ENTRIES.items() if entry.get("only") != "c"]

# Every size is another number, so that a message cannot be right by chance.
BASES = {
    "uniform": testing.Case("dense:fp32:b5:q2:h6:k2:d16:v12:p4:l32", (9, 20, 5), has_sink=True),
    "few_tokens": testing.Case("dense:fp32:b5:q2:h6:k2:d16:v12:p4:l32:m120", (9, 20, 5)),
    "ragged": testing.Case("dense:fp32:b5:q2:h6:k2:d16:v12:p4:l32:ragged:t5", (9, 20, 5), (1, 2, 1)),
    "two_views": testing.Case("dense:fp32:b5:q2:h6:k2:d16:v12:p4:l32", (9, 20, 5), is_split=True),
    "shard": testing.Case("dense:fp32:b5:q2:h6:k2:d16:v12:p4:l32:causal:cp0of2", (9, 20, 5)),
    "no_rope": testing.Case("dense:fp32:b5:q2:h6:k2:d16:v16:p4:l32", (9, 20, 5)),
}
EXCEPTIONS = {
    "INVALID_ARGUMENT": ValueError,
    "UNSUPPORTED": NotImplementedError,
    "WORKSPACE_TOO_SMALL": ValueError,
    "TypeError": TypeError,
}
MERGE_SHAPES = {"out_parts": (2, 3, 4, 5), "lse_parts": (2, 3, 4), "out": (3, 4, 5), "lse": (3, 4)}


# ----------------------------------------------------------------------------------------------------------------- arrays


def change(arrays: dict[str, Any], name: str, how: dict[str, Any]) -> Any:
    """The array that a call gets instead of arrays[name]."""
    array = arrays[name]
    dtype = np.dtype(np.float32) if array is None else array.dtype
    if "dtype" in how:
        with np.errstate(invalid="ignore"):  # outputs are NaN, which is no int
            return array.astype(testing.numpy_dtype("bf16") if how["dtype"] == "bfloat16" else how["dtype"])
    if "shape" in how:
        return np.ones(how["shape"], dtype)
    if "values" in how:
        return np.array(how["values"], np.int32)
    if "set" in how:
        index, value = how["set"]
        changed = array.copy()
        changed[tuple(index)] = value
        return changed
    if "narrow" in how:
        return np.ascontiguousarray(array[..., : how["narrow"]])
    if "step" in how:
        return np.repeat(array, how["step"], axis=-1)[..., :: how["step"]]
    if "reverse" in how:
        return np.flip(array.copy(), how["reverse"])
    if "misaligned" in how:
        memory = np.zeros(array.nbytes + 1, np.uint8)
        return np.ndarray(array.shape, dtype, memory, 1)
    if "broadcast" in how:
        strides = [0 if axis == how["broadcast"] else stride for axis, stride in enumerate(array.strides)]
        return np.ndarray(array.shape, dtype, array.base, 0, strides)
    if "over" in how:
        return np.ndarray(array.shape, dtype, arrays[how["over"]].base)
    if "read_only" in how:
        array = array.copy()
        array.flags.writeable = False
        return array
    return {"list": [1, 2, 3], "triple": (array, array, array)}[how["object"]]


def changed(arrays: dict[str, Any], entry_change: dict[str, Any]) -> dict[str, Any]:
    """arrays after the changes that are about arrays and mean something on both sides."""
    result = dict(arrays)
    for name, how in entry_change.items():
        if name in arrays and "field" not in how:
            result[name] = None if "none" in how else change(arrays, name, how)
    return result


def arrays_of(entry: dict[str, Any]) -> dict[str, Any]:
    if entry["call"] == "merge":
        rng = np.random.default_rng(0)
        arrays = {name: np.full(int(np.prod(shape)), np.nan, np.float32).reshape(shape) for name, shape in MERGE_SHAPES.items()}
        for name in ("out_parts", "lse_parts"):
            arrays[name][...] = rng.standard_normal(arrays[name].shape)
        return arrays
    return testing.make_inputs(BASES[entry.get("base", "uniform")]).tensors()


def check_message(entry: dict[str, Any], message: str) -> None:
    assert message.startswith(entry["argument"]), message
    for part in (entry["came"], *entry["allowed"]):
        assert part in message, f"{part!r} is not in: {message}"
    assert "\n" not in message


def written(arrays: dict[str, Any]) -> list[bytes]:
    """The memory of the outputs, with what lies beside them."""
    return [arrays[name].base.tobytes() for name in ("out", "lse") if arrays[name] is not None]


# ---------------------------------------------------------------------------------------------------------------- the C ABI


def resized(struct: ctypes.Structure, how: dict[str, Any], tail: int) -> Any:
    """struct with other leading fields, in memory that is long enough for any struct_size of the corpus."""
    memory = ctypes.create_string_buffer(bytes(struct) + bytes([tail]) * 64)
    pointer = ctypes.cast(memory, ctypes.POINTER(type(struct)))
    pointer.keep = (memory, struct)
    for name, value in how.items():
        setattr(pointer.contents, name, value)
    return pointer


def c_problem(entry: dict[str, Any]) -> abi.Problem:
    problem = abi.parse(BASES[entry.get("base", "uniform")].problem)
    dtypes = {"bf16": 1, "fp16": 2, "fp32": 3, "e4m3": 4}
    for name, value in entry["change"].get("problem", {}).items():
        if name in ("q_dtype", "kv_dtype", "out_dtype"):
            value = dtypes[value]
        elif name == "softmax_scale":
            value = float(value)
        elif name == "split":
            name, value = "split_policy", {"balanced": 0, "fixed_chunk": 1}[value]
        elif name == "kv_format" and value == "fp8_656":
            value = 2
        elif name in ("tree_mask", "extra_segment"):
            name, value = "flags", {"tree_mask": abi.TREE_MASK, "extra_segment": abi.EXTRA_SEGMENT}[name]
        setattr(problem, name.removesuffix("_number"), value)
    return problem


def c_pointers(arrays: dict[str, Any], entry_change: dict[str, Any]) -> dict[str, Any]:
    pointers = {name: abi.tensor(array) for name, array in changed(arrays, entry_change).items()}
    for name, how in entry_change.items():
        if name not in pointers or "field" not in how:
            continue
        (field, value), target = how["field"], pointers[name].contents
        head, _, rest = field.partition(".")
        if rest.isdigit():
            getattr(target, head)[int(rest)] = value
        elif rest:
            setattr(getattr(target, head), rest, value)
        else:
            setattr(target, head, value)
    return pointers


def set_buffer(args: Any, name: str, how: str, arrays: dict[str, Any]) -> None:
    if how == "null":
        setattr(args, name, None)
    elif how == "short":
        setattr(args, f"{name}_bytes", 16)
    elif how == "unaligned":
        setattr(args, name, getattr(args, name) + 4)
    elif how == "garbage":
        ctypes.memset(args.schedule, 0x5A, args.schedule_bytes)
    else:
        setattr(args, name, arrays[how.removeprefix("over ")].ctypes.data)
        setattr(args, f"{name}_bytes", 1 << 30)


def with_room_for_buffers(array: np.ndarray) -> np.ndarray:
    """A copy where a workspace may begin: aligned, with room for what a call would write that is not refused."""
    memory = abi.aligned_buffer(array.nbytes + (1 << 24), 256)
    copy = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def call_c(entry: dict[str, Any], arrays: dict[str, Any]) -> int:
    lib, kind, what = abi.library(), entry["call"], entry["change"]
    is_null = {name: what.get("null") == name for name in ("context", "problem", "out", "args", "plan")}
    context = None if is_null["context"] else abi.context("reference")
    if kind == "parse":
        return lib.mla_problem_parse(byref(abi.Problem()), what["text"].encode())
    if kind == "backend_info":
        return lib.mla_get_backend_info(what["index"], byref(abi.BackendInfo(struct_size=ctypes.sizeof(abi.BackendInfo))))
    if kind == "context":
        options = abi.ContextOptions(struct_size=ctypes.sizeof(abi.ContextOptions))
        for name, value in what.items():
            setattr(options, name, value.encode() if isinstance(value, str) else value)
        handle = ctypes.c_void_p(1)
        status = lib.mla_context_create(byref(handle), byref(options))
        assert handle.value is None
        return status
    if kind == "plan":
        problem = c_problem(entry)
        head = {"struct_size": what["struct_size"]} if "struct_size" in what else {}
        handle = ctypes.c_void_p(1)
        pointer = None if is_null["problem"] else resized(problem, head, what.get("tail", 0))
        status = lib.mla_plan_create(None if is_null["out"] else byref(handle), context, pointer)
        assert is_null["out"] or handle.value is None
        return status
    if kind == "merge":
        args = abi.MergeArgs(ctypes.sizeof(abi.MergeArgs), 0, *c_pointers(arrays, what).values())
        return lib.mla_merge(context, resized(args, what.get("args", {}), 0), None)

    base = BASES[entry.get("base", "uniform")]
    with abi.Plan(base.problem, abi.cpu_backends()[0]) as plan:
        inputs = testing.make_inputs(base)
        args = plan.schedule_args(inputs) if kind == "schedule" else plan.decode_args(inputs)
        if kind == "decode":
            for name, how in what.get("scheduled", {}).items():
                setattr(inputs, name, change(inputs.tensors(), name, how))
            if "schedule_of" in what:
                with abi.Plan(what["schedule_of"], abi.cpu_backends()[0]) as other:
                    other.schedule(inputs)
                    # As large as both plans want, so that only its content is wrong.
                    size = max(plan.info.schedule_bytes, other.info.schedule_bytes)
                    plan.schedule_buffer = abi.aligned_buffer(size, plan.info.schedule_alignment)
                    plan.schedule_buffer[: other.schedule_buffer.size] = other.schedule_buffer
                    args.schedule, args.schedule_bytes = plan.schedule_buffer.ctypes.data, size
            else:
                plan.schedule(inputs)
        for how in what.get("buffers", {}).values():
            if how.startswith("over "):
                name = how.removeprefix("over ")
                arrays = {**arrays, name: with_room_for_buffers(arrays[name])}
        pointers = c_pointers(arrays, {**what, **what.get("later", {})})
        for name, pointer in pointers.items():
            if hasattr(args, name):
                setattr(args, name, pointer)
        if "unused" in what:
            setattr(args, what["unused"], abi.tensor(arrays["q"]))
        for name, how in what.get("buffers", {}).items():
            set_buffer(args, name, how, arrays)
        pointer = None if is_null["args"] else resized(args, what.get("args", {}), what.get("tail", 0))
        function = lib.mla_schedule if kind == "schedule" else lib.mla_decode
        return function(None if is_null["plan"] else plan.handle, pointer, None)


@pytest.mark.parametrize("name", IN_C)
def test_in_c(name: str) -> None:
    entry = ENTRIES[name]
    arrays = arrays_of(entry)
    before = written(arrays)
    status = call_c(entry, arrays)
    assert abi.STATUS[status] == entry.get("status", "INVALID_ARGUMENT"), abi.library().mla_last_error()
    check_message(entry, abi.library().mla_last_error().decode())
    assert written(arrays) == before


# ------------------------------------------------------------------------------------------------------------------ Python


def python_problem(entry: dict[str, Any]) -> mlakit.Problem:
    base = BASES[entry.get("base", "uniform")].parsed
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__} | entry["change"].get("problem", {})
    if isinstance(fields["softmax_scale"], str):
        fields["softmax_scale"] = float(fields["softmax_scale"])
    return mlakit.Problem(**fields)


def python_buffer(how: str, nbytes: int) -> Any:
    if how == "short":
        return np.zeros(16, np.uint8)
    return abi.aligned_buffer(nbytes + 4, 256)[4:]


def call_python(entry: dict[str, Any], arrays: dict[str, Any]) -> None:
    kind, what = entry["call"], entry["change"]
    if kind == "parse":
        mlakit.Problem.parse(what["text"])
    elif kind == "context":
        mlakit.Context(**what)
    elif kind == "plan":
        mlakit.Plan(python_problem(entry))
    elif kind == "merge":
        t = changed(arrays, what)
        mlakit.merge_states(t["out_parts"], t["lse_parts"], out=t["out"], lse=t["lse"])
    elif kind == "mla_decode":
        t = changed(arrays, what)
        base = BASES[entry.get("base", "uniform")]
        keywords = {**testing.make_inputs(base).keywords, "sink": t["sink"], **what.get("keywords", {})}
        mlakit.mla_decode(
            *(t[name] for name in ("q", "kv_cache", "block_table", "cache_seqlens")), **keywords, out=t["out"], lse=t["lse"]
        )
    else:
        plan = mlakit.Plan(BASES[entry.get("base", "uniform")].problem)
        t, buffers = changed(arrays, what), what.get("buffers", {})
        if kind == "schedule":
            buffer = python_buffer(buffers["schedule"], plan.info.schedule_bytes) if buffers else None
            plan.schedule(t["cache_seqlens"], t["cu_seqlens_q"], buffer=buffer)
            return
        schedule = plan.schedule(arrays["cache_seqlens"], arrays["cu_seqlens_q"])
        schedule.cache_seqlens = changed(arrays, what.get("later", {}))["cache_seqlens"]
        scratch = python_buffer(buffers["scratch"], plan.info.scratch_bytes) if buffers else None
        plan.decode(
            *(t["q"], t["kv_cache"], t["block_table"], schedule),
            **{name: t[name] for name in ("q_rope", "kv_rope", "global_seqlens", "sink", "out", "lse")},
            scratch=scratch,
        )


@pytest.mark.parametrize("name", IN_PYTHON)
def test_in_python(name: str) -> None:
    entry = ENTRIES[name]
    arrays = arrays_of(entry)
    before = written(arrays)
    references = {key: sys.getrefcount(array) for key, array in arrays.items() if array is not None}
    with pytest.raises(EXCEPTIONS[entry.get("status", "INVALID_ARGUMENT")]) as caught:
        call_python(entry, arrays)
    assert type(caught.value) is EXCEPTIONS[entry.get("status", "INVALID_ARGUMENT")]
    check_message(entry, str(caught.value))
    assert written(arrays) == before
    del caught
    assert {key: sys.getrefcount(array) for key, array in arrays.items() if array is not None} == references


def test_the_corpus_is_large_and_has_no_twins() -> None:
    changes = [json.dumps({**entry, "name": ""}, sort_keys=True) for entry in ENTRIES.values()]
    assert len(set(changes)) == len(changes)
    assert len(IN_C) >= 100
    assert len(IN_PYTHON) >= 100


@pytest.mark.parametrize("base", [base for base in BASES if base != "shard"])
def test_the_base_calls_are_good(base: str) -> None:
    """What is refused is refused for its change alone."""
    case = BASES[base]
    inputs = testing.make_inputs(case)
    abi.run(case.problem, inputs, abi.cpu_backends()[0])
    testing.check_decode(case, inputs)
