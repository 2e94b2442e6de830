"""`mlakit bench`: prints what mlakit.bench measures, as a table or as JSON lines."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import mlakit


def run(
    problems: list[str], device: str, backend: str | None, threads: int, rounds: int, with_peers: bool, as_json: bool
) -> bool:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda":
        gpu: Any = importlib.import_module("mlakit.bench.gpu")  # needs torch, so it is typed loosely
        return bool(gpu.main(problems, rounds=rounds, as_json=as_json, with_peers=with_peers))
    problems = [str(mlakit.Problem.parse(text)) for text in problems]  # refuses nonsense before anything is measured
    if with_peers:
        raise ValueError("--peer: peers run on cuda only: add --device cuda")
    from mlakit.bench import cpu, roofs

    context = mlakit.Context(backend, threads)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True), transient=True
    )
    results = []
    with progress:
        task = progress.add_task("roofs", total=1 + len(problems) * (rounds + 1))
        measured = roofs.measure(threads)
        progress.advance(task)
        for text in problems:
            progress.update(task, description=text)
            results.append(cpu.run(text, context, threads, rounds, measured, lambda: progress.advance(task)))
    if as_json:
        for result in results:
            print(json.dumps(dataclasses.asdict(result)))
    else:
        print_table(results)
    return True


def print_table(results: list[Any]) -> None:
    title = f"mlakit {mlakit.__version__}, {results[0].threads} threads; median of the rounds"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("problem and backend", overflow="fold", min_width=20)
    for name in ("right\nrows", "µs", "spread", "GFLOP/s", "GB/s", "nearer roof", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        roof = f"{r.roof_gflops:.0f} GFLOP/s" if r.roof == "compute" else f"{r.roof_gbytes:.1f} GB/s"
        table.add_row(
            *(f"{r.problem} {r.backend}", str(r.checked_rows), f"{r.median_us:.1f}", f"±{50 * r.spread:.0f} %"),
            *(f"{r.gflops:.0f}", f"{r.gbytes:.2f}", roof, f"{r.roof_share:.2f}"),
        )
    Console().print(table)
