"""Random tensors without an array framework: plain buffers of the library's element types, filled by the standard library."""

from __future__ import annotations

import array
import math
import random
from collections.abc import Sequence
from typing import Any

from mlakit import _ext
from mlakit._problem import DTYPES

# For each type: bits of an element, the bits that are random (sign, the exponent's low three bits, mantissa) and those that are
# set. Magnitudes are then log-uniform in [2^-7, 2), the same for each type.
_BITS = {"bf16": (16, 0x83FF, 0x3C00), "fp16": (16, 0x9FFF, 0x2000), "fp32": (32, 0x83FFFFFF, 0x3C000000)}


class Tensor:
    """A compact host tensor: `array` for the library (DLPack), `bits` for reading and writing elements as unsigned ints."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        itemsize = 4 if dtype in ("fp32", "int32") else 2
        self.shape = tuple(shape)
        self.dtype = dtype
        self.nbytes = itemsize * math.prod(shape)
        self._buffer = _ext.Buffer(-(-self.nbytes // 4) * 4, 64)
        self.array: Any = self._buffer.array(list(shape), DTYPES[dtype])
        words = self._buffer.array([self._buffer.nbytes // 4], DTYPES["int32"])
        self.bits = memoryview(words).cast("B")[: self.nbytes].cast("I" if itemsize == 4 else "H")

    def first(self, count: int) -> Tensor:
        """The first entries of the first dimension, in the same memory."""
        part: Tensor = Tensor.__new__(Tensor)
        part.shape = (count, *self.shape[1:])
        part.dtype, part.nbytes = self.dtype, self.nbytes // self.shape[0] * count
        part._buffer = self._buffer
        part.array = self._buffer.array(list(part.shape), DTYPES[self.dtype])
        part.bits = self.bits[: part.nbytes // self.bits.itemsize]
        return part

    @classmethod
    def random(cls, shape: Sequence[int], dtype: str, rng: random.Random) -> Tensor:
        tensor = cls(shape, dtype)
        width, mask, base = _BITS[dtype]
        nbytes = tensor.bits.nbytes
        step = 1 << 20  # bytes at a time, for the sake of memory
        for begin in range(0, nbytes, step):
            count = min(step, nbytes - begin)
            words = count * 8 // width
            ones = int.from_bytes((1).to_bytes(width // 8, "little") * words, "little")
            value = (rng.getrandbits(count * 8) & (ones * mask)) | (ones * base)
            tensor.bits.cast("B")[begin : begin + count] = value.to_bytes(count, "little")
        return tensor

    @classmethod
    def ints(cls, values: Sequence[int], shape: Sequence[int]) -> Tensor:
        tensor = cls(shape, "int32")
        tensor.bits.cast("B")[:] = array.array("i", values).tobytes()
        return tensor

    def fill_nan(self) -> None:
        nan = {"bf16": 0x7FC0, "fp16": 0x7E00, "fp32": 0x7FC00000}[self.dtype]
        self.bits.cast("B")[:] = nan.to_bytes(self.bits.itemsize, "little") * len(self.bits)

    def floats(self, begin: int, count: int) -> array.array[float]:
        """count elements from begin on, as Python floats."""
        raw = bytes(self.bits[begin : begin + count])
        if self.dtype == "bf16":
            wide = bytearray(4 * count)
            wide[2::4] = raw[0::2]
            wide[3::4] = raw[1::2]
            raw = bytes(wide)
        if self.dtype == "fp16":
            import struct

            return array.array("d", struct.unpack(f"<{count}e", raw))
        return array.array("d", array.array("f", raw))
