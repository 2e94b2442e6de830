"""The machine's roofs, measured in the same run: multiply-adds in registers for each instruction set, and a read sweep."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path

from mlakit import _ext

READ_BYTES = 128 << 20  # for each thread: more than its share of any cache
SECONDS = 0.15
ISAS = ("avx512bf16", "avx512", "avx2", "scalar")


@dataclasses.dataclass(frozen=True)
class Roofs:
    """Of all threads together."""

    gflops_of: dict[str, float]
    """By instruction set; those that the CPU lacks are missing."""
    gbytes: float

    def gflops(self, dtype: str, backend: str) -> float:
        """The peak of the instructions that a backend can use for an element type: bf16 dot products for bf16 only."""
        isa = backend.removeprefix("cpu-")
        if isa == "avx512bf16" and dtype != "bf16":
            isa = "avx512"
        return self.gflops_of.get(isa, self.gflops_of["scalar"])


def measure(threads: int = 0) -> Roofs:
    """threads: 0 for all CPUs that this process may use."""
    library = ctypes.CDLL(str(Path(__file__).with_name("libmlakit_probe.so")))
    gflops, read = library.mlakit_probe_gflops, library.mlakit_probe_read
    gflops.argtypes, gflops.restype = [ctypes.c_char_p, ctypes.c_double], ctypes.c_double
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double], ctypes.c_double
    count = threads or len(os.sched_getaffinity(0))

    def together(work: Callable[[int], float]) -> float:
        """The sum over threads that run at the same time."""
        results = [0.0] * count

        def run(i: int) -> None:
            results[i] = work(i)

        workers = [threading.Thread(target=run, args=(i,)) for i in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(results)

    gflops_of = {isa: together(lambda _, isa=isa: float(gflops(isa.encode(), SECONDS))) for isa in ISAS}  # type: ignore[misc]
    buffers = [memoryview(_ext.Buffer(READ_BYTES, 64).array([READ_BYTES // 4], _ext.dtypes()["int32"])) for _ in range(count)]
    for buffer in buffers:
        buffer.cast("B")[:] = b"\1" * READ_BYTES  # pages of its own, not the zero page
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer.cast("B"))) for buffer in buffers]
    gbytes = together(lambda i: float(read(addresses[i], READ_BYTES // 8, SECONDS)))
    return Roofs({isa: peak for isa, peak in gflops_of.items() if peak > 0}, gbytes)
