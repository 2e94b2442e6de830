"""The kernels' table on one Hopper GPU, by mlakit.bench.gpu.

    python bench_gpu.py [PROBLEM ...] [--rounds N] [--peer] [--peer-so LIBRARY] [--out FILE.json] [--commit ID]

Without problems: the shapes that the kernels are judged by. --peer adds FlashMLA, FlashAttention-3 and FlashInfer where they are
installed, --peer-so a build of FlashMLA behind C functions.
A release's run is kept under results/, with the commit it was built from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch

from mlakit.bench import gpu
from mlakit.bench.provenance import commit

SHAPES = [  # batch, q_len, heads, length
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
    *((128, 1, 128, 16384), (128, 2, 128, 4096), (128, 2, 128, 16384)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-so")
    parser.add_argument("--out")
    parser.add_argument("--commit", help="of the library, where git cannot tell")
    args = parser.parse_args()
    problems = args.problems or [f"dense:bf16:b{b}:q{q}:h{h}:l{n}{':causal' if q > 1 else ''}:cuda0" for b, q, h, n in SHAPES]
    roofs = gpu.measure_roofs(args.rounds)
    print(f"{gpu.machine()['gpu']}; roofs: {roofs}")
    print(gpu.HEADER, flush=True)
    results = []
    for text in problems:
        results.append(gpu.run(text, roofs, args.rounds, args.peer or args.peer_so is not None, args.peer_so))
        print(gpu.line(results[-1]), flush=True)
        torch.cuda.empty_cache()
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {
                    "machine": gpu.machine(),
                    "commit": args.commit or commit(__file__),
                    "roofs": dataclasses.asdict(roofs),
                    "results": [dataclasses.asdict(r) for r in results],
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
