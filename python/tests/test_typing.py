"""The package is typed: a user's file passes mypy --strict, stubs agree with the module, and are what nanobind generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mlakit

USER_FILE = """
import numpy as np

import mlakit

problem = mlakit.Problem(q_heads=16, max_len=4096, split="fixed_chunk")
plan = mlakit.Plan(problem, mlakit.Context(num_threads=1))
cache = mlakit.PagedCache(pages=4, dtype=np.float32)
cache.add("request")
schedule: mlakit.Schedule = plan.schedule(cache.cache_seqlens(["request"]))
out, lse = plan.decode(np.zeros((1, 1, 16, 576)), cache.pages, cache.block_table(["request"]), schedule)
names: list[str] = [b.name for b in mlakit.backends() if b.available]
parts: int = plan.info.parts
path: str = mlakit.get_include()
mlakit.mla_decode(out, out, out, out, lse_base="2", causal=True)
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
def test_a_users_file_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_FILE)
    result = run("mypy", "--strict", "user.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    (tmp_path / "wrong.py").write_text(USER_FILE + "\nmlakit.Problem(q_heads='many', max_len=1)\nplan.info.parts = 'x'\n")
    result = run("mypy", "--strict", "wrong.py", cwd=tmp_path)
    assert "Found 3 errors" in result.stdout  # a wrong argument, a wrong type and a frozen field


@pytest.mark.slow
def test_stubtest_finds_no_difference(tmp_path: Path) -> None:
    allowed = Path(__file__).with_name("stubtest_allowlist.txt")
    options = ("--ignore-missing-stub", "--ignore-unused-allowlist", "--allowlist", str(allowed))
    result = run("mypy.stubtest", "mlakit", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout


def test_the_stub_is_what_nanobind_generates(tmp_path: Path) -> None:
    result = run("nanobind.stubgen", "-q", "-m", "mlakit._ext", "-o", str(tmp_path / "_ext.pyi"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    installed = Path(mlakit.__file__).with_name("_ext.pyi").read_text()
    assert installed == (tmp_path / "_ext.pyi").read_text(), (
        "python -m nanobind.stubgen -m mlakit._ext -o python/src/mlakit/_ext.pyi"
    )
    assert Path(mlakit.__file__).with_name("py.typed").is_file()
