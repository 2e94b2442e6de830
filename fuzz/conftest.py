"""Profiles, options, and what happens to a failure: its case is shown, and kept in the corpus if asked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads only stand in the way of such small products

import pytest
from hypothesis import HealthCheck, settings

import abi
import harness

CORPUS = Path(__file__).parent / "corpus"

_COMMON: dict[str, Any] = {
    "deadline": None,  # a shared machine stalls now and then
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("dev", max_examples=100, **_COMMON)
settings.register_profile("ci", max_examples=2000, derandomize=True, database=None, **_COMMON)
settings.register_profile("nightly", max_examples=20000, **_COMMON)
settings.load_profile(os.environ.get("MLAKIT_FUZZ_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep-failures", action="store_true", help="write the shrunken case of each failing property to fuzz/corpus"
    )
    parser.addoption("--backend", help="run on this backend only, by the name that mlakit info lists")


def pytest_report_header() -> list[str]:
    return [f"mlakit library: {abi.library_path()}", f"CPU backends: {', '.join(abi.cpu_backends())}"]


def pytest_configure(config: pytest.Config) -> None:
    harness.only = config.getoption("--backend")
    if harness.only not in (None, *abi.cpu_backends()):
        raise pytest.UsageError(f"--backend: expected one of {', '.join(abi.cpu_backends())}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Hypothesis runs the shrunken example last, so the last case that ran is the one to keep."""
    if call.when == "setup":
        harness.last_case = None
    report = yield
    if report.when == "call" and report.failed and harness.last_case is not None:
        case = harness.last_case.replace(note=item.name)
        report.sections.append(("case", case.to_json()))
        if item.config.getoption("--keep-failures"):
            name = re.sub(r"\W+", "_", item.name).strip("_")
            (CORPUS / f"{name}.json").write_text(case.to_json() + "\n")
    return report
