"""The caller's array framework: outputs and workspaces are made in it, its current stream is used. Imports none of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol

from . import _ext
from ._problem import DTYPES


class Framework(Protocol):
    def empty(self, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """An uninitialised compact array that can be written to, on like's device. dtype is one of Problem's names."""

    def workspace(self, like: Any, nbytes: int, stream: int | None) -> Any:
        """Uninitialised device memory, aligned to 256 bytes, for work on the stream (None: the current one), safe to drop once
        that work is enqueued."""

    def stream(self, like: Any) -> int | None:
        """The current stream, where the tensors do not tell it themselves."""

    def finish(self, array: Any) -> Any:
        """What the caller gets for an array made by empty, once it is written."""

    def logaddexp(self, a: Any, b: Any, out: Any) -> None:
        """log(exp(a) + exp(b)) to out."""

    def refuse_gradients(self, *inputs: Any) -> None:
        """Raises RuntimeError if the caller expects a gradient by one of the inputs (or None): there is no backward pass."""


class _Numpy:
    """numpy, and ml_dtypes for the types that numpy lacks."""

    def __init__(self, module: Any) -> None:
        self._np = module

    def dtype(self, name: str) -> Any:
        if name in ("fp32", "fp16", "int32"):
            return self._np.dtype({"fp32": "float32", "fp16": "float16", "int32": "int32"}[name])
        import ml_dtypes

        return self._np.dtype({"bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn}[name])

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return self._np.empty(shape, self.dtype(dtype))

    def workspace(self, like: Any, nbytes: int, stream: int | None) -> Any:
        raise NotImplementedError("numpy arrays live on the CPU, and the plan is for another device")

    def stream(self, like: Any) -> int | None:
        return None

    def finish(self, array: Any) -> Any:
        return array

    def logaddexp(self, a: Any, b: Any, out: Any) -> None:
        self._np.logaddexp(a, b, out=out)

    def refuse_gradients(self, *inputs: Any) -> None:
        return None


class _Cupy(_Numpy):
    def workspace(self, like: Any, nbytes: int, stream: int | None) -> Any:
        if stream is None:
            return self._np.empty(nbytes, self._np.uint8)
        with self._np.cuda.ExternalStream(stream):
            return self._np.empty(nbytes, self._np.uint8)

    def stream(self, like: Any) -> int | None:
        return int(self._np.cuda.get_current_stream().ptr)


class _Plain:
    """Any other producer of DLPack, and memoryviews: a memoryview gets memoryviews, others an object with __dlpack__."""

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        number = DTYPES[dtype]
        itemsize = {"bf16": 2, "fp16": 2, "fp32": 4, "e4m3": 1, "int32": 4}[dtype]
        nbytes = itemsize
        for extent in shape:
            nbytes *= extent
        array = _ext.Buffer(nbytes, 64).array(list(shape), number)
        return memoryview(array) if isinstance(like, memoryview) else array

    def workspace(self, like: Any, nbytes: int, stream: int | None) -> Any:
        raise NotImplementedError(
            f"{type(like).__name__}: device memory can be made for torch and cupy only; pass out=, lse=, buffer= and scratch="
        )

    def stream(self, like: Any) -> int | None:
        return None

    def finish(self, array: Any) -> Any:
        return array

    def logaddexp(self, a: Any, b: Any, out: Any) -> None:
        raise NotImplementedError(f"{type(a).__name__}: mlakit calculates with torch, numpy and cupy arrays only")

    def refuse_gradients(self, *inputs: Any) -> None:
        return None


class _Jax(_Plain):
    """jax arrays cannot be written to, so outputs are plain buffers that jax adopts without a copy."""

    def finish(self, array: Any) -> Any:
        if not isinstance(array, sys.modules["jax"].Array):
            return sys.modules["jax"].dlpack.from_dlpack(array)
        return array


def _framework_of(array_type: type) -> Framework:
    for base in array_type.__mro__:
        root = base.__module__.partition(".")[0]
        if root == "torch":
            from . import _torch

            return _torch.Torch()
        if root == "numpy":
            return _Numpy(sys.modules["numpy"])
        if root == "cupy":
            return _Cupy(sys.modules["cupy"])
        if root in ("jax", "jaxlib"):
            return _Jax()
    return _Plain()


framework_of: Callable[[Any], Framework] = functools.lru_cache(maxsize=256)(_framework_of)
"""The framework of an array type, by the modules of its bases."""
