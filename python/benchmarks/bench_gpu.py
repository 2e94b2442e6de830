"""The kernels' table on one Hopper GPU, by mlakit.bench.gpu, or their sustained speed, by mlakit.bench.sustained.

    python bench_gpu.py [PROBLEM ...] [--rounds N] [--peer] [--peer-so LIBRARY] [--out FILE.json] [--commit ID]
    python bench_gpu.py --sustained SECONDS [PROBLEM ...] [--rounds N] ...

A PROBLEM is the library's one-line form, with " varlen" after it (one argument: quote it) where lengths are to be drawn evenly up
to its l: "dense:bf16:b128:q1:h128:l8192 varlen". Without problems: the shapes that the kernels are judged by.
--peer adds FlashMLA, FlashAttention-3 and FlashInfer where they are installed, --peer-so a build of FlashMLA behind C functions.
The time of combine apart from decode comes last, by the profiler, which would slow what is timed after it.
--sustained: instead of the table, decode, peers and cuBLAS in turns of SECONDS each, with clock and power.
A release's run is kept under results/, with the commit it was built from.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator

import torch

from mlakit.bench import gpu, sustained
from mlakit.bench.provenance import commit


def problem(batch: int, q_len: int, heads: int, length: int, suffix: str = "") -> str:
    return f"dense:bf16:b{batch}:q{q_len}:h{heads}:l{length}{':causal' if q_len > 1 else ''}:cuda0{suffix}"


SHAPES = [  # batch, q_len, heads, length; the longest one where lengths vary
    *(
        (1, 1, 16, 1024),
        (1, 1, 16, 8192),
        (1, 1, 16, 65536),
        (1, 1, 128, 8192),
        (1, 1, 128, 65536),
        (4, 1, 16, 8192),
        (4, 1, 128, 8192),
    ),
    *((16, 1, 16, 8192), (16, 1, 128, 8192), (128, 1, 16, 1024), (128, 1, 16, 4096), (128, 1, 64, 16384), (128, 1, 128, 4096)),
    *((128, 1, 128, 16384), (128, 2, 128, 4096), (128, 2, 128, 16384), (128, 4, 128, 8192)),
    *((64, 1, 16, 16384, gpu.VARLEN), (128, 1, 128, 8192, gpu.VARLEN)),
]
SUSTAINED_SHAPES = [
    *((128, 2, 128, 16384), (128, 2, 128, 4096), (128, 1, 128, 16384), (128, 1, 128, 4096), (128, 4, 128, 8192)),
    (128, 1, 128, 8192, gpu.VARLEN),
]


def sustained_table(
    problems: list[str], seconds: float, rounds: int, peers: bool, library: str | None
) -> Iterator[sustained.Result]:
    with sustained.Samples() as samples:
        for text in problems:
            result = sustained.run(text, seconds, rounds, samples, peers, library)
            print(sustained.lines(result), flush=True)
            yield result
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM")
    parser.add_argument("--sustained", type=float, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-so")
    parser.add_argument("--out")
    parser.add_argument("--commit", help="of the library, where git cannot tell")
    args = parser.parse_args()
    if args.sustained is not None and args.sustained <= sustained.SETTLE_SECONDS:
        parser.error(f"--sustained: expected more than {sustained.SETTLE_SECONDS} seconds")
    problems = args.problems or [problem(*shape) for shape in (SHAPES if args.sustained is None else SUSTAINED_SHAPES)]
    for text in problems:
        gpu.parse(text)  # refuses nonsense before anything is measured
    peers = args.peer or args.peer_so is not None
    roofs = gpu.measure_roofs(args.rounds)
    results: list[gpu.Result] = []
    turns: list[sustained.Result] = []

    def save() -> None:
        if args.out is None:
            return
        report = {
            "machine": gpu.machine(),
            "commit": args.commit or commit(__file__),
            "roofs": dataclasses.asdict(roofs),
            "results": [dataclasses.asdict(r) for r in results],
            "sustained": [dataclasses.asdict(r) for r in turns],
        }
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)

    if args.sustained is not None:
        print(f"{gpu.machine()['gpu']}; roofs: {roofs}", flush=True)
        for result in sustained_table(problems, args.sustained, args.rounds, peers, args.peer_so):
            turns.append(result)
            save()  # minutes pass until the next one
        return
    show = functools.partial(print, flush=True)
    results = gpu.table(problems, roofs, args.rounds, peers, args.peer_so, show)
    save()  # what is timed stays, whatever the profiler does
    gpu.add_combine(problems, results, show)
    save()


if __name__ == "__main__":
    main()
