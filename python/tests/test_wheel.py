"""The wheel: what it holds, that it is small, and that it works in an empty environment without torch and numpy."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mlakit

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# Decodes on memoryviews, with nothing but the standard library; uniform scores make the result the mean of the values.
STDLIB_DECODE = """
import sys
from array import array
import mlakit

def tensor(code, values, shape):
    return memoryview(array(code, values)).cast("B").cast(code, shape)

lengths = [3, 0]
q = tensor("f", [0.0] * (2 * 2 * 576), [2, 1, 2, 576])
cache = tensor("f", [float(token) for token in range(2 * 64) for _ in range(576)], [2, 64, 1, 576])
out, lse = mlakit.mla_decode(q, cache, tensor("i", [1, 0], [2, 1]), tensor("i", lengths, [2]))
values = out.tolist()
assert all(abs(v - 65.0) < 1e-4 for head in values[0][0] for v in head), values[0][0][0][:4]
assert all(v == 0 for head in values[1][0] for v in head)
assert abs(lse.tolist()[0][0][0] - 1.0986123) < 1e-5
assert lse.tolist()[1][0] == [float("-inf")] * 2
assert not {"numpy", "torch"} & set(sys.modules)
print(mlakit.Plan("dense:fp32:b2:h2:l64").info.backend)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    if cuda := os.environ.get("MLAKIT_TEST_WHEEL_CUDA"):
        command += ["-C", f"cmake.define.MLAKIT_CUDA={cuda}"]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def empty_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-index", str(wheel)], check=True)
    return python


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_it_is_named_for_the_stable_abi_where_there_is_one(wheel: Path) -> None:
    tag = "cp312-abi3" if sys.version_info >= (3, 12) else f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}"
    assert re.fullmatch(rf"mlakit-{re.escape(mlakit.__version__)}-{tag}-linux_\w+\.whl", wheel.name)


def test_it_is_ten_megabytes_at_most(wheel: Path) -> None:
    assert wheel.stat().st_size <= 10e6


def test_it_holds_the_c_side_and_nothing_else(wheel: Path) -> None:
    files = {name for name in names(wheel) if not re.match(r"mlakit/[\w/]+\.py$", name) and ".dist-info/" not in name}
    extension = next(name for name in files if re.fullmatch(r"mlakit/_ext\..*so", name))
    assert files - {extension} >= {
        "mlakit/_ext.pyi",
        "mlakit/py.typed",
        "mlakit/include/mlakit/mla.h",
        "mlakit/include/mlakit/mla.hpp",
        "mlakit/include/mlakit/version.h",
        "mlakit/lib/libmlakit.so",
        "mlakit/lib/cmake/mlakit/mlakitConfig.cmake",
        "mlakit/lib/cmake/mlakit/mlakitConfigVersion.cmake",
    }
    rest = [f for f in files if not f.startswith(("mlakit/include/mlakit/", "mlakit/lib/cmake/mlakit/", "mlakit/lib/pkgconfig/"))]
    own = {extension, "mlakit/_ext.pyi", "mlakit/py.typed", "mlakit/lib/libmlakit.so", "mlakit/bench/libmlakit_probe.so"}
    has_kernels = b"dense_bf16_d576" in zipfile.ZipFile(wheel).read("mlakit/lib/libmlakit.so")  # built where nvcc is
    assert set(rest) == own | ({"mlakit/bench/libmlakit_gpu_probe.so"} if has_kernels else set())


def test_it_needs_no_other_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(path))
    requirements = metadata.get_all("Requires-Dist") or []
    assert all("extra ==" in requirement for requirement in requirements)
    assert metadata["License-Expression"] == "MIT"


def test_its_bill_of_materials_names_what_is_linked_in(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if ".dist-info/sboms/" in name]
        bill = json.loads(archive.read(path))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == mlakit.__version__
    assert {"nanobind"} <= {component["name"] for component in bill["components"]}
    assert all(component["version"] for component in bill["components"])


def test_it_carries_the_notices_of_what_is_linked_in(wheel: Path) -> None:
    licences = [name.split(".dist-info/licenses/")[1] for name in names(wheel) if ".dist-info/licenses/" in name]
    assert set(licences) == {"LICENSE", "nanobind/LICENSE"}


def test_its_libraries_need_neither_a_driver_nor_torch(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for library in tmp_path.rglob("*.so"):
        needed = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
        assert not re.search(r"NEEDED.*(libcuda|cudart|torch|python)", needed), library.name


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the stable ABI wheel is built on Python 3.12 and newer")
def test_abi3audit_finds_nothing(wheel: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "abi3audit", "--strict", str(wheel)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_it_works_in_an_empty_environment(empty_python: Path, tmp_path: Path) -> None:
    result = subprocess.run([str(empty_python), "-c", STDLIB_DECODE], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in {b.name for b in mlakit.backends()}
    command = subprocess.run([str(empty_python.with_name("mlakit")), "info"], capture_output=True, text=True)
    assert command.returncode == 1
    assert "pip install 'mlakit[cli]'" in command.stderr
