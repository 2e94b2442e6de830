"""`mlakit info`: what this build holds and what this machine can run."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console
from rich.table import Table

import mlakit


def run(as_json: bool) -> None:
    backends = mlakit.backends()
    if as_json:
        report = {
            "version": mlakit.__version__,
            "library": mlakit.get_library_path(),
            "include": mlakit.get_include(),
            "cmake": mlakit.get_cmake_dir(),
            "backends": [dataclasses.asdict(b) for b in backends],
        }
        print(json.dumps(report, indent=2))
        return
    table = Table("backend", "device", "available", "reason", title=f"mlakit {mlakit.__version__}", title_justify="left")
    for b in backends:
        table.add_row(b.name, b.device, "[green]yes[/]" if b.available else "[red]no[/]", b.reason)
    console = Console()
    console.print(table)
    console.print(f"library  {mlakit.get_library_path()}\ninclude  {mlakit.get_include()}", soft_wrap=True)
