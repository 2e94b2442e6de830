"""The C ABI by ctypes: a mirror of mla.h, and one call that runs a test case through it.

Field names, order and types are those of the header; test_abi_mirror.py checks sizes and offsets against a compiled C program.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np

OK, INVALID_ARGUMENT, UNSUPPORTED, WORKSPACE_TOO_SMALL = 0, 1, 2, 3
STATUS = {0: "OK", 1: "INVALID_ARGUMENT", 2: "UNSUPPORTED", 3: "WORKSPACE_TOO_SMALL", 4: "OUT_OF_MEMORY", 10: "CUDA_ERROR"}
STATUS |= {11: "NO_DRIVER", 90: "INTERNAL"}
DEVICE_CPU, DEVICE_CUDA = 1, 2
CAUSAL, RAGGED_Q, LSE_BASE2, TREE_MASK, EXTRA_SEGMENT, DEBUG = (1 << bit for bit in range(6))

# numpy's name of an element type -> DLPack's (code, bits)
DLPACK_TYPES = {
    "bfloat16": (4, 16),
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "float8_e4m3fn": (10, 8),
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "bool": (6, 8),
}


class Device(ctypes.Structure):
    _fields_ = [("device_type", c_int32), ("device_id", c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", Device),
        ("ndim", c_int32),
        ("dtype", DataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class TensorStorage(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("shape", c_int64 * 4), ("strides", c_int64 * 4)]


class Problem(ctypes.Structure):
    _fields_ = [
        *[(name, c_uint32) for name in ("struct_size", "flags")],
        *[(name, c_int32) for name in ("device_type", "device_id", "q_dtype", "kv_dtype", "out_dtype", "kv_format")],
        *[(name, c_int64) for name in ("max_batch", "q_len", "max_q_tokens", "max_len", "max_tokens")],
        *[(name, c_int32) for name in ("q_heads", "kv_heads", "head_dim", "value_dim", "page_size")],
        *[(name, c_int32) for name in ("split_policy", "chunk_tokens", "topk", "cp_world", "cp_rank")],
        ("softmax_scale", c_float),
        ("cp_turn", c_int32),
    ]


class BackendInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("device_type", c_int32),
        ("is_available", c_int32),
        ("reserved", c_uint32),
        ("name", c_char_p),
        ("reason", c_char_p),
    ]


class ContextOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("backend", c_char_p),
        ("num_threads", c_int32),
        ("reserved", c_int32),
        ("parallel_for", c_void_p),
        ("parallel_for_user", c_void_p),
    ]


class PlanInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("parts", c_int32),
        ("schedule_bytes", c_uint64),
        ("schedule_alignment", c_uint64),
        ("scratch_bytes", c_uint64),
        ("scratch_alignment", c_uint64),
        ("backend", c_char_p),
        ("variant", c_char_p),
        ("problem", c_char_p),
        ("block_tokens", c_int32),
        ("item_rows", c_int32),
        ("slots", c_int64),
    ]


class ScheduleArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("cache_seqlens", POINTER(Tensor)),
        ("cu_seqlens_q", POINTER(Tensor)),
        ("schedule", c_void_p),
        ("schedule_bytes", c_uint64),
    ]


class DecodeArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        *[(name, POINTER(Tensor)) for name in ("q", "q_rope", "kv_cache", "kv_rope", "block_table", "cache_seqlens")],
        *[(name, POINTER(Tensor)) for name in ("sink", "out", "lse")],
        ("schedule", c_void_p),
        ("schedule_bytes", c_uint64),
        ("scratch", c_void_p),
        ("scratch_bytes", c_uint64),
        *[(name, POINTER(Tensor)) for name in ("kv_scale", "indices", "topk_length", "extra_kv_cache")],
        *[(name, POINTER(Tensor)) for name in ("extra_block_table", "extra_seqlens", "tree_mask", "global_seqlens")],
    ]


class MergeArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        *[(name, POINTER(Tensor)) for name in ("out_parts", "lse_parts", "out", "lse")],
    ]


# C name -> mirror
STRUCTS = {
    "mla_device": Device,
    "mla_data_type": DataType,
    "mla_tensor": Tensor,
    "mla_tensor_storage": TensorStorage,
    "mla_problem": Problem,
    "mla_backend_info": BackendInfo,
    "mla_context_options": ContextOptions,
    "mla_plan_info": PlanInfo,
    "mla_schedule_args": ScheduleArgs,
    "mla_decode_args": DecodeArgs,
    "mla_merge_args": MergeArgs,
}

_FUNCTIONS = {
    "mla_problem_init": [POINTER(Problem)],
    "mla_problem_format": [POINTER(Problem), c_char_p, c_size_t, POINTER(c_size_t)],
    "mla_problem_parse": [POINTER(Problem), c_char_p],
    "mla_get_backend_info": [c_int32, POINTER(BackendInfo)],
    "mla_context_create": [POINTER(c_void_p), POINTER(ContextOptions)],
    "mla_plan_create": [POINTER(c_void_p), c_void_p, POINTER(Problem)],
    "mla_plan_get_info": [c_void_p, POINTER(PlanInfo)],
    "mla_schedule": [c_void_p, POINTER(ScheduleArgs), c_void_p],
    "mla_decode": [c_void_p, POINTER(DecodeArgs), c_void_p],
    "mla_merge": [c_void_p, POINTER(MergeArgs), c_void_p],
}


def library_path() -> str:
    """MLAKIT_LIBRARY, or the library of the installed package."""
    path = os.environ.get("MLAKIT_LIBRARY")
    if path:
        return path
    import mlakit

    return mlakit.get_library_path()


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(library_path())
    for name, arguments in _FUNCTIONS.items():
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = c_int32
    lib.mla_context_destroy.argtypes = lib.mla_plan_destroy.argtypes = [c_void_p]
    lib.mla_context_destroy.restype = lib.mla_plan_destroy.restype = None
    lib.mla_last_error.restype = c_char_p
    lib.mla_version.restype = c_int32
    lib.mla_tensor_init.restype = POINTER(Tensor)
    lib.mla_tensor_init.argtypes = [
        *(POINTER(TensorStorage), c_void_p, c_int32, c_int32, c_int32, c_int32),
        *(POINTER(c_int64), POINTER(c_int64)),
    ]
    lib.mla_status_string.argtypes, lib.mla_status_string.restype = [c_int32], c_char_p
    return lib


class Refused(Exception):
    """A call that did not return MLA_OK; str() is the library's message."""

    def __init__(self, status: int) -> None:
        super().__init__(library().mla_last_error().decode())
        self.status = status


def check(status: int) -> None:
    if status != OK:
        raise Refused(status)


def parse(text: str) -> Problem:
    problem = Problem()
    check(library().mla_problem_parse(byref(problem), text.encode()))
    return problem


@functools.cache
def cpu_backends() -> tuple[str, ...]:
    """The CPU backends that this machine can run, in order of preference."""
    names, index = [], 0
    info = BackendInfo(struct_size=ctypes.sizeof(BackendInfo))
    while library().mla_get_backend_info(index, byref(info)) == OK:
        if info.device_type == DEVICE_CPU and info.is_available:
            names.append(info.name.decode())
        index += 1
    return tuple(names)


@functools.cache
def context(backend: str, threads: int = 1) -> c_void_p:
    """A context that lives as long as the process."""
    handle = c_void_p()
    options = ContextOptions(struct_size=ctypes.sizeof(ContextOptions), backend=backend.encode(), num_threads=threads)
    check(library().mla_context_create(byref(handle), byref(options)))
    return handle


def tensor(array: Any) -> Any:
    """A pointer to a Tensor over a numpy array's memory (None: NULL). It keeps the array alive."""
    if array is None:
        return None
    ndim = array.ndim
    code, bits = DLPACK_TYPES[array.dtype.name]
    itemsize = array.itemsize
    shape = (c_int64 * ndim)(*array.shape)
    strides = (c_int64 * ndim)(*(stride // itemsize for stride in array.strides))
    made = Tensor(array.ctypes.data, Device(DEVICE_CPU, 0), ndim, DataType(code, bits, 1), shape, strides, 0)
    pointer = ctypes.pointer(made)
    pointer.keep = (array, shape, strides)
    return pointer


def aligned_buffer(nbytes: int, alignment: int, fill: int = 0xA5) -> np.ndarray:
    """nbytes of memory at a multiple of alignment, filled with garbage."""
    memory = np.full(nbytes + alignment, fill, np.uint8)
    offset = -memory.ctypes.data % alignment
    return memory[offset : offset + nbytes]


class Plan:
    """A plan with buffers for one call at a time. Ends with `close()` or as a context manager."""

    def __init__(self, problem: Problem | str, backend: str, threads: int = 1) -> None:
        self.handle = c_void_p()
        self.problem = parse(problem) if isinstance(problem, str) else problem
        check(library().mla_plan_create(byref(self.handle), context(backend, threads), byref(self.problem)))
        self.info = PlanInfo(struct_size=ctypes.sizeof(PlanInfo))
        check(library().mla_plan_get_info(self.handle, byref(self.info)))
        self.schedule_buffer = aligned_buffer(self.info.schedule_bytes, self.info.schedule_alignment)
        self.scratch_buffer = aligned_buffer(self.info.scratch_bytes, self.info.scratch_alignment)

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        library().mla_plan_destroy(self.handle)
        self.handle = None

    def schedule_args(self, inputs: Any) -> ScheduleArgs:
        return ScheduleArgs(
            struct_size=ctypes.sizeof(ScheduleArgs),
            cache_seqlens=tensor(inputs.cache_seqlens),
            cu_seqlens_q=tensor(inputs.cu_seqlens_q),
            schedule=self.schedule_buffer.ctypes.data,
            schedule_bytes=self.schedule_buffer.nbytes,
        )

    def decode_args(self, inputs: Any) -> DecodeArgs:
        args = DecodeArgs(struct_size=ctypes.sizeof(DecodeArgs))
        for name, kind in DecodeArgs._fields_:
            if kind is POINTER(Tensor) and hasattr(inputs, name):
                setattr(args, name, tensor(getattr(inputs, name)))
        args.schedule, args.schedule_bytes = self.schedule_buffer.ctypes.data, self.schedule_buffer.nbytes
        args.scratch, args.scratch_bytes = self.scratch_buffer.ctypes.data, self.scratch_buffer.nbytes
        return args

    def schedule(self, inputs: Any) -> None:
        check(library().mla_schedule(self.handle, byref(self.schedule_args(inputs)), None))

    def decode(self, inputs: Any) -> None:
        check(library().mla_decode(self.handle, byref(self.decode_args(inputs)), None))


@dataclasses.dataclass
class Result:
    """Compact copies of what a call wrote."""

    out: Any
    lse: Any

    @classmethod
    def of(cls, inputs: Any) -> Result:
        return cls(inputs.out.copy(), None if inputs.lse is None else inputs.lse.copy())


def run(problem: str, inputs: Any, backend: str, threads: int = 1) -> Result:
    """Plan, schedule and decode; the outputs are written into inputs and also returned."""
    with Plan(problem, backend, threads) as plan:
        plan.schedule(inputs)
        plan.decode(inputs)
    return Result.of(inputs)


def merge(out_parts: Any, lse_parts: Any, out: Any, lse: Any, backend: str, *, is_base2: bool = False) -> None:
    args = MergeArgs(ctypes.sizeof(MergeArgs), LSE_BASE2 if is_base2 else 0, *map(tensor, (out_parts, lse_parts, out, lse)))
    check(library().mla_merge(context(backend), byref(args), None))
