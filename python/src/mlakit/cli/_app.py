"""The commands and their options; each command's work lives in a module of its own, imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Multi-head Latent Attention decode kernels."
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def info(as_json: AsJson = False) -> None:
    """List the backends, with the reason for each that cannot run here."""
    from ._info import run

    run(as_json)


@app.command()
def demo(seed: Annotated[int, typer.Option(help="Of the random model state.")] = 0) -> None:
    """Decode a batch step by step as an engine would, and check every row in double precision."""
    from ._demo import run

    if not run(seed):
        raise typer.Exit(1)


@app.command()
def bench(
    problems: Annotated[
        list[str],
        typer.Argument(help='Problem strings, such as dense:bf16:b4:q1:h16:l4096; on cuda also "... varlen" for varied lengths'),
    ],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Force a backend by name.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all this process may use.")] = 0,
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds of each problem.")] = 15,
    peer: Annotated[
        bool, typer.Option("--peer", help="cuda: also FlashMLA, FlashAttention-3 and FlashInfer, where they are installed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check, then time decode for each problem: median, spread, rates, and the share of the nearer roof."""
    from ._bench import run

    if not run(problems, device, backend, threads, rounds, peer, as_json):
        raise typer.Exit(1)
