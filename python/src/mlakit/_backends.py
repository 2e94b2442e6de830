"""What this build holds and this machine can run, and where the C side of the package lies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from . import _ext
from ._problem import DEVICES

_PACKAGE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    name: str
    device: str
    """cpu or cuda."""
    available: bool
    reason: str
    """Why this machine cannot run it; empty if it can."""


def backends() -> list[Backend]:
    """Every backend of this build, in the order in which they are tried."""
    device_names = {number: name for name, number in DEVICES.items()}
    return [Backend(name, device_names[device], available, reason) for name, device, available, reason in _ext.backends()]


def get_include() -> str:
    """The folder to add to a C or C++ compiler's include path: it holds mlakit/mla.h and mlakit/mla.hpp."""
    return str(_PACKAGE / "include")


def get_library_path() -> str:
    """libmlakit.so, to link against or to load with ctypes."""
    return str(_PACKAGE / "lib" / "libmlakit.so")


def get_cmake_dir() -> str:
    """The folder of the CMake package: `cmake -DCMAKE_PREFIX_PATH=...`, then `find_package(mlakit)` gives `mlakit::mlakit`."""
    return str(_PACKAGE / "lib" / "cmake" / "mlakit")
