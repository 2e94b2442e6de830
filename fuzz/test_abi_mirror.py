"""abi.py has the sizes and offsets of mla.h, as a C compiler sees them, and nothing is left out."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import abi

INCLUDE = Path(__file__).resolve().parents[1] / "core" / "include"
HEADER = INCLUDE / "mlakit" / "mla.h"


def test_sizes_and_offsets(tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    lines = []
    for name, mirror in abi.STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        lines += [f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));' for field, *_ in mirror._fields_]
    source = tmp_path / "layout.c"
    source.write_text("#include <stdio.h>\n#include <mlakit/mla.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n")
    program = tmp_path / "layout"
    subprocess.run([compiler, "-std=c99", f"-I{INCLUDE}", source, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split("\n")
    in_c = dict(line.rsplit(" ", 1) for line in printed if line)
    for name, mirror in abi.STRUCTS.items():
        assert ctypes.sizeof(mirror) == int(in_c[name]), name
        for field, *_ in mirror._fields_:
            assert getattr(mirror, field).offset == int(in_c[f"{name}.{field}"]), f"{name}.{field}"


def test_every_field_is_mirrored() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    assert set(re.findall(r"typedef struct (\w+) \{", text)) == set(abi.STRUCTS)
    for name, mirror in abi.STRUCTS.items():
        body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", text, re.S).group(1)
        in_header = re.findall(r"(\w+)(?:\[\d+\])?\s*[;,]", body)
        assert in_header == [field for field, *_ in mirror._fields_], name


def test_every_function_is_exported() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    names = re.findall(r"MLA_API [\w\s*]*?\**\s*(mla_\w+)\(", text)
    assert len(names) > 10
    for name in names:
        assert hasattr(abi.library(), name), name
