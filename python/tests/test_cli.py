"""The command line: what it prints, how long it takes, and what it says without its extra."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import mlakit

MLAKIT = str(Path(sys.executable).with_name("mlakit"))


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MLAKIT, *arguments], capture_output=True, text=True, env={**os.environ, "COLUMNS": "150", "NO_COLOR": "1", **env}
    )


def processor_seconds() -> float:
    """Of all finished child processes: unlike wall time, what else the machine does hardly changes it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(*arguments: str) -> float:
    begin = processor_seconds()
    assert run(*arguments).returncode == 0
    return processor_seconds() - begin


def test_info_lists_every_backend_with_its_reason() -> None:
    result = run("info")
    assert result.returncode == 0, result.stderr
    for backend in mlakit.backends():
        assert backend.name in result.stdout
    report = json.loads(run("info", "--json").stdout)
    assert [b["name"] for b in report["backends"]] == [b.name for b in mlakit.backends()]
    assert report["version"] == mlakit.__version__


def test_the_package_runs_as_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "mlakit", "info", "--json"], capture_output=True, text=True)
    assert json.loads(result.stdout) == json.loads(run("info", "--json").stdout)


def test_info_takes_half_a_second_at_most() -> None:
    assert min(seconds("info") for _ in range(5)) <= 0.5


def test_demo_checks_every_row_in_five_seconds() -> None:
    begin = processor_seconds()
    result = run("demo")
    elapsed = processor_seconds() - begin
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("right") == 5
    assert "(empty)" in result.stdout
    assert "wrong" not in result.stdout
    assert elapsed <= 5


def test_demo_notices_wrong_rows() -> None:
    # Under a backend name that does not exist nothing may look right.
    result = run("demo", MLAKIT_BACKEND="no-such-backend")
    assert result.returncode != 0
    assert "no-such-backend" in result.stderr
    from mlakit.cli import _demo

    check = _demo.Check()
    keys = [[1.0] * 576]
    columns = list(zip(*keys, strict=True))[:512]
    check.add([0.0] * 576, keys, columns, [1.0] * 511 + [1.01], 0.0)
    check.add([0.0] * 576, [], [], [0.0] * 511 + [1e-30], float("-inf"))
    assert check.failed == check.rows == 2


def test_bench_checks_first_and_reports_the_roof() -> None:
    problem = "dense:bf16:b2:q1:h16:l256"
    result = run("bench", problem, "--json", "--rounds", "3", "--threads", "1")
    assert result.returncode == 0, result.stderr
    (row,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert row["problem"].startswith("dense:bf16:b2:q1:h16")
    assert row["checked_rows"] == 32
    assert row["min_us"] <= row["median_us"] <= row["max_us"]
    assert 0 < row["roof_share"] < 1.2
    assert row["roof"] in ("compute", "memory")
    table = run("bench", problem, "--rounds", "3")
    assert table.returncode == 0, table.stderr
    assert "GFLOP/s" in table.stdout


def test_bench_runs_peers_on_a_gpu_only() -> None:
    result = run("bench", "dense:bf16:b1:q1:h2:l64", "--peer")
    assert result.returncode != 0
    assert "--device cuda" in result.stderr


def test_bench_refuses_what_is_no_problem() -> None:
    result = run("bench", "dense:nonsense")
    assert result.returncode != 0
    assert "nonsense" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_without_the_extra_the_command_says_how_to_get_it() -> None:
    code = (
        "import importlib.util as u, sys; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'typer' else find(name, *a);"
        "from mlakit.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "typer: pip install 'mlakit[cli]'" in result.stderr
