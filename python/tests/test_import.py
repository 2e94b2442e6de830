"""Importing the package is quick and pulls in nothing; the C side is where it says."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import mlakit
from mlakit import _ext


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_takes_a_tenth_of_a_second_at_most() -> None:
    # Processor time: unlike wall time, what else the machine does hardly changes it.
    code = "import time; t = time.process_time(); import mlakit; print(time.process_time() - t)"
    assert statistics.median(float(python(code)) for _ in range(5)) <= 0.1


def test_import_pulls_in_no_framework_and_no_driver() -> None:
    code = (
        "import sys, mlakit; mlakit.backends();"
        "print([m for m in ('torch', 'numpy', 'ml_dtypes', 'typer', 'rich', 'cupy', 'jax') if m in sys.modules],"
        "'libcuda' in open('/proc/self/maps').read())"
    )
    assert python(code) == "[] False"


def test_decoding_numpy_arrays_does_not_import_torch() -> None:
    code = (
        "import sys, numpy as np, mlakit;"
        "z = np.ones; mlakit.mla_decode(z((1, 1, 1, 576), 'f4'), z((1, 64, 1, 576), 'f4'), z((1, 1), 'i4') * 0, z(1, 'i4'));"
        "print('torch' in sys.modules)"
    )
    assert python(code) == "False"


def test_versions_agree() -> None:
    major, minor, patch = map(int, mlakit.__version__.split("."))
    assert _ext.library_version() == major * 10000 + minor * 100 + patch


def test_the_c_side_is_where_the_package_says() -> None:
    assert (Path(mlakit.get_include()) / "mlakit" / "mla.h").is_file()
    assert (Path(mlakit.get_include()) / "mlakit" / "mla.hpp").is_file()
    assert Path(mlakit.get_library_path()).is_file()
    assert (Path(mlakit.get_cmake_dir()) / "mlakitConfig.cmake").is_file()


def test_backends_say_why_they_cannot_run() -> None:
    backends = mlakit.backends()
    assert [b.name for b in backends if b.available][-1] == "reference"
    assert all(b.available == (b.reason == "") for b in backends)
    assert {b.device for b in backends} <= {"cpu", "cuda"}


def test_everything_public_is_documented() -> None:
    for name in mlakit.__all__:
        if not name.startswith("__"):
            thing = getattr(mlakit, name)
            assert thing.__doc__, name
            members = vars(thing).items() if isinstance(thing, type) else ()
            for member, value in members:
                if not member.startswith("_") and callable(value):
                    assert value.__doc__, f"{name}.{member}"
