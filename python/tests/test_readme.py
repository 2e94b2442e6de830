"""Every code block of the README runs. A block that no rule knows fails, so that none goes untested.

python blocks run in order in one namespace; cpp and c blocks are compiled and run against the installed package; cmake blocks
build the first C++ block; each sh block has a rule by its first words.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import mlakit

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(mlakit.get_library_path())


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 1) for m in found]


def of(language: str) -> list[Block]:
    return [b for b in blocks() if b.language == language]


def shell(command: str, cwd: Path) -> str:
    """Runs a command as a reader would, with this interpreter's folder first in PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(["sh", "-ec", command], cwd=cwd, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of("python")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in of("python"):
        code = compile("\n" * block.line + block.text, str(ROOT / "README.md"), "exec")
        exec(code, namespace)


@pytest.mark.parametrize("language", ["cpp", "c"])
def test_native_blocks_compile_and_run(language: str, tmp_path: Path) -> None:
    if language == "cpp":
        assert of("cpp")
    compiler = {"cpp": ["g++", "-std=c++20"], "c": ["gcc", "-std=c99"]}[language]
    for block in of(language):
        source = tmp_path / f"block{block.line}.{language}"
        source.write_text(block.text)
        program = source.with_suffix("")
        flags = [f"-I{mlakit.get_include()}", f"-L{LIBRARY.parent}", "-lmlakit", f"-Wl,-rpath,{LIBRARY.parent}"]
        built = subprocess.run(
            [*compiler, "-Wall", "-Wextra", "-Werror", str(source), "-o", str(program), *flags], capture_output=True, text=True
        )
        assert built.returncode == 0, built.stderr
        result = subprocess.run([str(program)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "0.250" in result.stdout or "0.250" not in block.text


def rule_install(command: str, tmp_path: Path) -> None:
    """A fresh clone and a fresh virtual environment."""
    clone = tmp_path / "mlakit"
    shell(f"git clone -q '{ROOT}' '{clone}'", tmp_path)
    shell(command.replace("python3 -m venv", f"'{sys.executable}' -m venv"), clone)


def rule_all_tests(command: str, tmp_path: Path) -> None:
    """This runs inside that command; what can differ is that CI calls something else."""
    assert "nox -s tests" in command
    assert "nox -s tests" in (ROOT / ".ci" / "run").read_text()


def rule_cmake(command: str, tmp_path: Path) -> None:
    """The C++ block, with the CMake block's lines, configured by the sh block's command."""
    (tmp_path / "engine.cc").write_text(of("cpp")[0].text)
    lines = "".join(b.text for b in of("cmake"))
    assert "find_package(mlakit REQUIRED)" in lines
    head = "cmake_minimum_required(VERSION 3.25)\nproject(engine CXX)\nadd_executable(engine engine.cc)\n"
    (tmp_path / "CMakeLists.txt").write_text(head + lines)
    shell(command, tmp_path)
    shell("cmake --build build/engine && build/engine/engine", tmp_path)


def rule_run(command: str, tmp_path: Path) -> None:
    shell(command, tmp_path)


SHELL_RULES: dict[str, Callable[[str, Path], None]] = {
    "python3 -m venv .venv && .venv/bin/pip install '.[cli]'": rule_install,
    "python3 -m venv .venv && .venv/bin/pip install nox": rule_all_tests,
    "cmake -S . -B build/engine": rule_cmake,
    "mlakit ": rule_run,
}
SLOW = (rule_install,)


def rule_of(block: Block) -> Callable[[str, Path], None]:
    matches = [rule for start, rule in SHELL_RULES.items() if block.text.startswith(start)]
    assert len(matches) == 1, f"README.md:{block.line}: no rule, or several, for this block:\n{block.text}"
    return matches[0]


def test_every_block_has_a_rule() -> None:
    for block in blocks():
        assert block.language in ("python", "cpp", "c", "cmake", "sh"), f"README.md:{block.line}: {block.language!r}"
    for block in of("sh"):
        rule_of(block)


@pytest.mark.parametrize("block", [b for b in of("sh") if rule_of(b) not in SLOW], ids=lambda b: f"line{b.line}")
def test_shell_blocks_work(block: Block, tmp_path: Path) -> None:
    if rule_of(block) is rule_cmake and shutil.which("cmake") is None:
        pytest.fail("cmake is needed for the README's CMake block")
    rule_of(block)(block.text, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in of("sh") if rule_of(b) in SLOW], ids=lambda b: f"line{b.line}")
def test_install_commands_work_in_a_fresh_clone(block: Block, tmp_path: Path) -> None:
    rule_of(block)(block.text, tmp_path)
