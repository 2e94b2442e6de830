"""The C ABI by ctypes, for torch tensors: what a native engine would do, without mlakit's own Python package in between."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

CUDA = 2


class Device(Structure):
    _fields_ = [("device_type", c_int32), ("device_id", c_int32)]


class DataType(Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class Tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", Device),
        ("ndim", c_int32),
        ("dtype", DataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class Problem(Structure):
    _fields_ = [
        *((n, c_uint32) for n in ("struct_size", "flags")),
        *((n, c_int32) for n in ("device_type", "device_id", "q_dtype", "kv_dtype", "out_dtype", "kv_format")),
        *((n, c_int64) for n in ("max_batch", "q_len", "max_q_tokens", "max_len", "max_tokens")),
        *((n, c_int32) for n in ("q_heads", "kv_heads", "head_dim", "value_dim", "page_size", "split_policy", "chunk_tokens")),
        *((n, c_int32) for n in ("topk", "cp_world", "cp_rank")),
        ("softmax_scale", c_float),
        ("cp_turn", c_int32),
    ]


class PlanInfo(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("parts", c_int32),
        *((n, c_uint64) for n in ("schedule_bytes", "schedule_alignment", "scratch_bytes", "scratch_alignment")),
        *((n, c_char_p) for n in ("backend", "variant", "problem")),
        ("block_tokens", c_int32),
        ("item_rows", c_int32),
        ("slots", c_int64),
    ]


class ScheduleArgs(Structure):
    _fields_ = [
        *((n, c_uint32) for n in ("struct_size", "flags")),
        *((n, POINTER(Tensor)) for n in ("cache_seqlens", "cu_seqlens_q")),
        ("schedule", c_void_p),
        ("schedule_bytes", c_uint64),
    ]


class DecodeArgs(Structure):
    _fields_ = [
        *((n, c_uint32) for n in ("struct_size", "flags")),
        *(
            (n, POINTER(Tensor))
            for n in ("q", "q_rope", "kv_cache", "kv_rope", "block_table", "cache_seqlens", "sink", "out", "lse")
        ),
        ("schedule", c_void_p),
        ("schedule_bytes", c_uint64),
        ("scratch", c_void_p),
        ("scratch_bytes", c_uint64),
        *(
            (n, POINTER(Tensor))
            for n in ("kv_scale", "indices", "topk_length", "extra_kv_cache", "extra_block_table", "extra_seqlens", "tree_mask")
        ),
    ]


class MergeArgs(Structure):
    _fields_ = [
        *((n, c_uint32) for n in ("struct_size", "flags")),
        *((n, POINTER(Tensor)) for n in ("out_parts", "lse_parts", "out", "lse")),
    ]


def library_path() -> Path:
    """MLAKIT_LIBRARY, or the one that the installed package carries."""
    if "MLAKIT_LIBRARY" in os.environ:
        return Path(os.environ["MLAKIT_LIBRARY"])
    import mlakit

    return Path(mlakit.__file__).parent / "lib" / "libmlakit.so"


lib = ctypes.CDLL(str(library_path()))
lib.mla_last_error.restype = c_char_p


class MlaError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{status}: {lib.mla_last_error().decode()}")


def check(status: int) -> None:
    if status != 0:
        raise MlaError(status)


_DTYPES = {torch.bfloat16: (4, 16), torch.float16: (2, 16), torch.float32: (2, 32), torch.int32: (0, 32)}


def tensor(x: torch.Tensor | None) -> Any:
    """A pointer to an mla_tensor over x's memory, which keeps its own shape arrays alive; None stays None."""
    if x is None:
        return None
    code, bits = _DTYPES[x.dtype]
    shape, strides = (c_int64 * x.dim())(*x.shape), (c_int64 * x.dim())(*x.stride())
    is_cuda = x.device.type == "cuda"
    t = Tensor(
        x.data_ptr(), Device(CUDA if is_cuda else 1, x.device.index or 0), x.dim(), DataType(code, bits, 1), shape, strides, 0
    )
    pointer = ctypes.pointer(t)
    pointer._keep = (shape, strides, x)
    return pointer


def stream() -> c_void_p:
    return c_void_p(torch.cuda.current_stream().cuda_stream)


class Plan:
    """A plan with its schedule and scratch buffers on the device, both poisoned."""

    def __init__(self, problem: str, **fields: Any) -> None:
        self.problem = Problem()
        check(lib.mla_problem_parse(byref(self.problem), problem.encode()))
        for name, value in fields.items():
            setattr(self.problem, name, value)
        context = c_void_p()
        check(lib.mla_context_create(byref(context), None))
        self._handle = c_void_p()
        try:
            check(lib.mla_plan_create(byref(self._handle), context, byref(self.problem)))
        finally:
            lib.mla_context_destroy(context)
        self.info = PlanInfo(struct_size=ctypes.sizeof(PlanInfo))
        check(lib.mla_plan_get_info(self._handle, byref(self.info)))
        device = torch.device("cuda", self.problem.device_id) if self.problem.device_type == CUDA else torch.device("cpu")
        self.schedule_buffer = torch.full((self.info.schedule_bytes,), 0xA5, dtype=torch.uint8, device=device)
        self.scratch = torch.full((self.info.scratch_bytes,), 0xFF, dtype=torch.uint8, device=device)  # NaN as fp32

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            lib.mla_plan_destroy(self._handle)

    def schedule(self, cache_seqlens: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None) -> None:
        args = ScheduleArgs(
            struct_size=ctypes.sizeof(ScheduleArgs), cache_seqlens=tensor(cache_seqlens), cu_seqlens_q=tensor(cu_seqlens_q)
        )
        args.schedule, args.schedule_bytes = self.schedule_buffer.data_ptr(), self.schedule_buffer.numel()
        check(lib.mla_schedule(self._handle, byref(args), stream()))

    def decode_args(self, **tensors: torch.Tensor | None) -> DecodeArgs:
        args = DecodeArgs(struct_size=ctypes.sizeof(DecodeArgs))
        for name, x in tensors.items():
            setattr(args, name, tensor(x))
        args.schedule, args.schedule_bytes = self.schedule_buffer.data_ptr(), self.schedule_buffer.numel()
        args.scratch, args.scratch_bytes = self.scratch.data_ptr(), self.scratch.numel()
        args._keep = tensors
        return args

    def decode(self, **tensors: torch.Tensor | None) -> None:
        self.enqueue(self.decode_args(**tensors))

    def enqueue(self, args: DecodeArgs) -> None:
        check(lib.mla_decode(self._handle, byref(args), stream()))


def merge(
    out_parts: torch.Tensor, lse_parts: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None, is_base2: bool = False
) -> None:
    context = c_void_p()
    check(lib.mla_context_create(byref(context), None))
    args = MergeArgs(struct_size=ctypes.sizeof(MergeArgs), flags=4 if is_base2 else 0)
    args.out_parts, args.lse_parts, args.out, args.lse = tensor(out_parts), tensor(lse_parts), tensor(out), tensor(lse)
    try:
        check(lib.mla_merge(context, byref(args), stream()))
    finally:
        lib.mla_context_destroy(context)
