"""Cases that failed once, and the named cases of mlakit.testing, on every backend: numbers, threads, nothing left unwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

import harness
from mlakit import testing

CORPUS = Path(__file__).parent / "corpus"
CASES = {path.stem: testing.Case.from_json(path.read_text()) for path in sorted(CORPUS.glob("*.json"))} | testing.NAMED_CASES


@pytest.mark.parametrize("name", CASES)
def test_replay(name: str) -> None:
    case = CASES[name]
    assert harness.backends(case)
    for backend in harness.backends(case):
        one = harness.decode_and_check(case, backend)
        harness.assert_same_bits(one, harness.decode(case, backend, threads=3), f"{backend} with 1 and 3 threads")


def test_json_keeps_every_field() -> None:
    for case in CASES.values():
        assert testing.Case.from_json(case.to_json()).to_json() == case.to_json()
