"""Rules of the tree that no tool checks: include directions, one version, words that mark unfinished work."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core" / "src"

# Folder of core/src -> what its files may include from core/src. "." is core/src itself.
FORBIDDEN = {
    "layout": {"cpu", "cuda", "reference", "."},
    "math": {"cpu", "cuda", "reference", "."},
    "schedule": {"cpu", "cuda", "reference"},
    "reference": {"cpu", "cuda"},
    "cpu": {"cuda", "reference"},
    "cuda": {"cpu", "reference"},
}
ALWAYS_ALLOWED = {"host_device.h"}


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the rules are about tracked files")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def folder_of(include: str) -> str:
    return include.split("/")[0] if "/" in include else "."


def test_includes_point_one_way() -> None:
    wrong = []
    for path in tracked("core/src"):
        if path.suffix not in {".h", ".cc", ".cu", ".cuh"}:
            continue
        owner = folder_of(path.relative_to(CORE).as_posix())
        for include in re.findall(r'^#include "([^"]+)"', path.read_text(), re.M):
            if include in ALWAYS_ALLOWED or include.startswith("mlakit/"):
                continue
            if folder_of(include) in FORBIDDEN.get(owner, set()):
                wrong.append(f"{path.relative_to(ROOT)} includes {include}")
    assert not wrong


def test_cuda_headers_stay_in_the_cuda_folder() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in tracked("core", "python/src")
        if path.suffix in {".h", ".hpp", ".cc", ".c"}
        and "cuda" not in path.relative_to(ROOT).parts
        and re.search(r'#include [<"]cu(da|blas|rand)\w*\.h', path.read_text())
    ]
    assert not wrong


def test_the_version_is_written_once() -> None:
    header = (ROOT / "core/include/mlakit/version.h").read_text()
    numbers = [re.search(rf"MLAKIT_VERSION_{part} (\d+)", header).group(1) for part in ("MAJOR", "MINOR", "PATCH")]
    version = ".".join(numbers)
    assert f'MLAKIT_VERSION_STRING "{version}"' in header
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    for path in tracked("pyproject.toml", "CMakeLists.txt", "python/src/*.py"):
        assert version not in path.read_text(), f"{path.name} repeats the version"


def test_nothing_is_marked_unfinished() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked("core", "python", "cpp_tests", "fuzz", "cmake", "CMakeLists.txt", "noxfile.py")
        if path.suffix not in {".json", ".png"} and path.name != Path(__file__).name
        for line in path.read_text(errors="replace").splitlines()
        if marks.search(line)
    ]
    assert not wrong
