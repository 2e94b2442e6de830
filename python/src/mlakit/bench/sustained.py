"""Sustained speed on a GPU: decode, peers and cuBLAS in turns, each for long enough that clock and power settle under its load.

A burst of some milliseconds runs at a clock that the power limit does not allow for long, so that its times rank kernels by what
they do at that clock. Here candidates take turns of `seconds` each, without idle time. What they reach is compared within a
round, and the order is reversed every second round, so that a drift of the temperature favours none.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence

from .gpu import CUBLAS_FLOP, Graph, Subject, Times, Workload, cublas_graph, cuda, interleave

SAMPLE_MS = 50
SETTLE_SECONDS = 0.1  # at the begin of a turn, of which clock and power do not count
BURST_ROUNDS = 7
# Student's t, the quantile 0.975, for 1 .. 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclasses.dataclass
class Candidate:
    """One kernel over all rounds."""

    median_us: float
    """Of a call."""
    tflops: float
    cublas_share: float
    """TFLOP/s over cuBLAS's in the same round, the mean over rounds."""
    clock_mhz: float | None
    """Of the multiprocessors, the mean over its turns. None: nvidia-smi gave no samples."""
    watts: float | None


@dataclasses.dataclass
class Ratio:
    """Our time over a peer's: below 1 where decode is faster."""

    mean: float
    """Over rounds, of the ratio within a round."""
    upper: float | None
    """Upper end of the two-sided 95 % interval of that mean. None: a single round tells none."""
    burst: float
    """Of the medians of short graphs, interleaved, before the long turns."""


@dataclasses.dataclass
class Result(Subject):
    seconds: float
    """Of a turn."""
    rounds: int
    candidates: dict[str, Candidate]
    """ours, the peers, cublas."""
    burst: dict[str, Times]
    """ours and the peers."""
    ratios: dict[str, Ratio]
    """By peer."""


@dataclasses.dataclass
class Turn:
    """One candidate's turn in a round; begin and end by time.monotonic()."""

    call_us: float
    begin: float
    end: float


class Samples:
    """Clock and power of the GPU, by nvidia-smi in the background while the context is open."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []  # time.monotonic(), MHz, watts

    def __enter__(self) -> Samples:
        query = ["--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits"]
        self._smi = subprocess.Popen(["nvidia-smi", "-i", "0", *query, "-lms", str(SAMPLE_MS)], stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self.read, args=(self._smi.stdout,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._smi.terminate()
        self._smi.wait()
        self._reader.join()

    def read(self, lines: Iterable[str]) -> None:
        """Takes lines such as "1980, 512.34" as they come; others ("[N/A], 512.34") are left out."""
        for line in lines:
            try:
                mhz, watts = map(float, line.split(","))
            except ValueError:
                continue
            self.samples.append((time.monotonic(), mhz, watts))

    def mean(self, turns: Sequence[Turn]) -> tuple[float | None, float | None]:
        """MHz and watts over the turns, without the first SETTLE_SECONDS of each."""
        inside = [
            (mhz, watts)
            for moment, mhz, watts in list(self.samples)
            if any(turn.begin + SETTLE_SECONDS <= moment <= turn.end for turn in turns)
        ]
        if not inside:
            return None, None
        return statistics.fmean(mhz for mhz, _ in inside), statistics.fmean(watts for _, watts in inside)


def take_turn(graph: Graph, seconds: float) -> Turn:
    """Replays a graph back to back for about that long."""
    cuda.synchronize()
    begin = time.monotonic()
    first = last = cuda.Event(enable_timing=True)
    first.record()
    replays = 0
    while time.monotonic() - begin < seconds:
        graph.replay()
        replays += 1
        before, last = last, cuda.Event(enable_timing=True)
        last.record()
        before.synchronize()  # one replay ahead: the device never waits for the host, and the host stays in step
    last.synchronize()
    return Turn(1e3 * float(first.elapsed_time(last)) / (replays * graph.calls), begin, time.monotonic())


def alternate(graphs: dict[str, Graph], seconds: float, rounds: int) -> dict[str, list[Turn]]:
    """Every candidate's turns, one a round; every second round goes backwards."""
    turns: dict[str, list[Turn]] = {name: [] for name in graphs}
    for i in range(rounds):
        for name in list(graphs)[:: -1 if i % 2 else 1]:
            turns[name].append(take_turn(graphs[name], seconds))
    return turns


def mean_and_upper(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the upper end of its two-sided 95 % interval by Student's t; None for a single value."""
    mean, freedom = statistics.fmean(values), len(values) - 1
    if freedom == 0:
        return mean, None
    t = T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1]  # past the table the last one, which is a little too large
    return mean, mean + t * statistics.stdev(values) / math.sqrt(len(values))


def mean_ratio(over: Sequence[Turn], under: Sequence[Turn]) -> tuple[float, float | None]:
    """Of the times within a round: mean_and_upper of over / under."""
    return mean_and_upper([a.call_us / b.call_us for a, b in zip(over, under, strict=True)])


def run(
    text: str, seconds: float, rounds: int, samples: Samples, with_peers: bool = False, peer_library: str | None = None
) -> Result:
    """One problem, as for gpu.run; all candidates are cold. samples: an open one."""
    work = Workload(text)
    subject = work.check()
    graphs = {"ours": Graph(work.decode)}
    for name, calls in (work.peers(peer_library) if with_peers else {}).items():
        graphs[name] = Graph(calls)
    burst = interleave(graphs, BURST_ROUNDS)
    turns = alternate({**graphs, "cublas": cublas_graph()}, seconds, rounds)

    def candidate(name: str) -> Candidate:
        flop_of_call = CUBLAS_FLOP if name == "cublas" else work.flop
        median_us = statistics.median(turn.call_us for turn in turns[name])
        share, _ = mean_ratio(turns["cublas"], turns[name])
        clock_mhz, watts = samples.mean(turns[name])
        return Candidate(median_us, flop_of_call / median_us / 1e6, share * flop_of_call / CUBLAS_FLOP, clock_mhz, watts)

    return Result(
        **subject,
        seconds=seconds,
        rounds=rounds,
        candidates={name: candidate(name) for name in turns},
        burst=burst,
        ratios={
            name: Ratio(*mean_ratio(turns["ours"], turns[name]), burst["ours"].median_us / burst[name].median_us)
            for name in graphs
            if name != "ours"
        },
    )


def lines(r: Result) -> str:
    """A line for each candidate under the problem's own."""
    text = [f"{r.problem}, mean length {r.mean_len:.0f}: {r.rounds} rounds of {r.seconds:g} s each"]
    for name, c in r.candidates.items():
        clock = "no samples" if c.clock_mhz is None else f"{c.clock_mhz:.0f} MHz {c.watts:.0f} W"
        text.append(f"  {name:<18} {c.median_us:>9.1f} us {c.tflops:>7.1f} TFLOP/s {c.cublas_share:>5.2f} of cuBLAS  {clock}")
    for name, ratio in r.ratios.items():
        upper = "" if ratio.upper is None else f" (at most {ratio.upper:.3f})"
        text.append(f"  ours / {name}: sustained {ratio.mean:.3f}{upper}, burst {ratio.burst:.3f}")
    return "\n".join(text)
