"""The example engines in C and C++, built against the installed package, print what Python prints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

import mlakit

EXAMPLES = Path(__file__).resolve().parents[2] / "cpp_tests" / "install"
LIBRARY = Path(mlakit.get_library_path())


def value(begin: int, *shape: int) -> np.ndarray:
    """The examples' formula: multiples of 1/256 in [-0.5, 0.5)."""
    x = (np.arange(np.prod(shape), dtype=np.uint32) + np.uint32(begin)) * np.uint32(2654435761)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(2246822519)
    return ((x >> np.uint32(24)).astype(np.float32) / 256 - 0.5).reshape(shape).astype(np.float32)


def python_lines() -> str:
    batch, heads, pages, page_size, width = 3, 4, 20, 16, 9
    q, cache = value(0, batch, 1, heads, 576), value(1000000, pages, page_size, 1, 576)
    table = (np.arange(batch * width, dtype=np.int32) * 7 % pages).reshape(batch, width)
    lengths = np.array([130, 0, 77], np.int32)
    plan = mlakit.Plan(
        mlakit.Problem(
            q_dtype="fp32",
            max_batch=batch,
            max_len=width * page_size,
            q_heads=heads,
            page_size=page_size,
            softmax_scale=0.0721687824,
        )
    )
    out, lse = plan.decode(q, cache, table, plan.schedule(lengths))
    lines = []
    for request in range(batch):
        for head in range(heads):
            row = out[request, 0, head]
            total = sum(row.tolist())
            lines.append(
                f"request {request} token 0 head {head} lse {lse[request, 0, head]:.5f} out[0] {row[0]:.5f} "
                f"out[511] {row[511]:.5f} sum {total:.4f}\n"
            )
    return "".join(lines)


@pytest.mark.parametrize("name", ["engine_example.c", "engine_example.cc"])
def test_an_engine_prints_what_python_prints(name: str, tmp_path: Path) -> None:
    compiler = ["gcc", "-std=c99"] if name.endswith(".c") else ["g++", "-std=c++20"]
    program = tmp_path / "engine"
    flags = [f"-I{mlakit.get_include()}", f"-L{LIBRARY.parent}", "-lmlakit", f"-Wl,-rpath,{LIBRARY.parent}"]
    built = subprocess.run(
        [*compiler, "-Wall", "-Wextra", "-Werror", str(EXAMPLES / name), "-o", str(program), *flags], check=False
    )
    assert built.returncode == 0
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == python_lines()
