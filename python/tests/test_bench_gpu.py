"""mlakit.bench.gpu: what it computes from lengths and from kernel times. The timing itself needs a GPU."""

from __future__ import annotations

import json
import statistics
import types
from typing import Any

import pytest

from mlakit.bench import gpu

PROBLEM = "dense:bf16:b4:q1:h16:l8192"


@pytest.mark.parametrize("text", [PROBLEM, PROBLEM + ":cuda0"])
def test_a_problem_string_alone_means_full_lengths_on_the_gpu(text: str) -> None:
    problem, lengths = gpu.parse(text)
    assert lengths == [8192] * 4
    assert problem.device.startswith("cuda")


def test_varied_lengths_are_the_same_each_time_and_even() -> None:
    text = "dense:bf16:b4096:q1:h16:l1000 varlen"
    problem, lengths = gpu.parse(text)
    assert gpu.parse(text)[1] == lengths
    assert len(lengths) == problem.max_batch
    assert 1 <= min(lengths) < 10
    assert 990 < max(lengths) <= 1000
    assert statistics.fmean(lengths) == pytest.approx(500, abs=20)


def test_a_causal_query_token_always_sees_a_key() -> None:
    _, lengths = gpu.parse("dense:bf16:b100:q4:h16:l5:causal varlen")
    assert set(lengths) == {4, 5}


@pytest.mark.parametrize("text", [PROBLEM + ":ragged", PROBLEM + "varlen", PROBLEM + " varied"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ragged|varlen|varied"):
        gpu.parse(text)


def test_flop_counts_the_keys_that_each_token_sees() -> None:
    full, _ = gpu.parse("dense:bf16:b2:q3:h16:l100")
    causal, _ = gpu.parse("dense:bf16:b2:q3:h16:l100:causal")
    of_a_key = 2 * 16 * (576 + 512)
    assert gpu.flop(full, [100, 100]) == of_a_key * 2 * 3 * 100
    assert gpu.flop(full, [7, 100]) == of_a_key * 3 * 107
    assert gpu.flop(causal, [7, 100]) == of_a_key * ((7 + 6 + 5) + (100 + 99 + 98))
    assert gpu.flop(causal, [2]) == of_a_key * (2 + 1)  # the first token sees nothing


def test_bytes_are_those_of_the_pages_that_hold_the_lengths() -> None:
    problem, _ = gpu.parse(PROBLEM)
    page = 64 * 576 * 2
    assert gpu.cache_bytes(problem, [8192] * 4) == 4 * 128 * page
    assert gpu.cache_bytes(problem, [1, 64, 65, 0]) == (1 + 1 + 2) * page


def result_of(text: str) -> gpu.Result:
    times = gpu.Times(2.0, 1.0, 3.0)
    return gpu.Result(
        problem=text,
        variant="dense_bf16_d576",
        mean_len=8192.0,
        largest_error=1e-3,
        cold=times,
        warm=times,
        schedule=times,
        gbytes=1.0,
        tflops=1.0,
        roof="memory",
        roof_share=0.5,
        cublas_share=0.1,
        clock_mhz=1980,
        peers={"flash_mla": times},
        peers_warm={"flash_mla": times},
    )


class FakeWorkload:
    """One call of 4 TFLOP over 3 GB, and one peer."""

    def __init__(self, text: str) -> None:
        self.text, self.flop, self.x = text, 4e12, types.SimpleNamespace(bytes=3_000_000_000)
        self.decode = [lambda: None, lambda: None]

    def check(self) -> dict[str, Any]:
        return {"problem": self.text, "variant": "v", "mean_len": 7.0, "largest_error": 1e-3}

    def peers(self, library: str | None) -> dict[str, Any]:
        return {"flash_mla": [lambda: None, lambda: None]}


def test_a_result_holds_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The number of a graph's calls tells cold (all caches) from warm (one); 1000 us for two calls, 500 for one.
    monkeypatch.setattr(gpu, "Workload", FakeWorkload)
    monkeypatch.setattr(gpu, "Graph", len)
    monkeypatch.setattr(gpu, "interleave", lambda graphs, _: {k: gpu.Times(500.0 * n, 1.0, 9.0) for k, n in graphs.items()})
    monkeypatch.setattr(gpu, "clock_mhz", lambda: 1980)
    result = gpu.run(PROBLEM, gpu.Roofs(4000.0, 8000.0, 5000.0), rounds=3, with_peers=True)
    assert (result.problem, result.variant, result.mean_len, result.largest_error) == (PROBLEM, "v", 7.0, 1e-3)
    assert (result.cold.median_us, result.warm.median_us, result.schedule.median_us) == (1000.0, 500.0, 500.0)
    assert result.peers["flash_mla"].median_us == 1000.0
    assert result.peers_warm["flash_mla"].median_us == 500.0
    assert (result.gbytes, result.tflops) == (3000.0, 4000.0)
    assert (result.roof, result.roof_share, result.cublas_share) == ("memory", 0.75, 0.8)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        gpu.main([PROBLEM])


@pytest.mark.parametrize("as_json", [False, True])
def test_combine_comes_after_all_timings_and_into_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gpu, "measure_roofs", lambda rounds: gpu.Roofs(3000.0, 800.0, 700.0))
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu, "run", lambda text, *_: seen.append("run") or result_of(text))
    monkeypatch.setattr(gpu, "combine_us", lambda text: seen.append("combine") or 1.25)
    monkeypatch.setattr(gpu.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu.cuda, "is_available", lambda: True)
    assert gpu.main([PROBLEM, PROBLEM + " varlen"], rounds=3, as_json=as_json)
    assert seen == ["run", "run", "combine", "combine"]
    out = capsys.readouterr().out
    if as_json:
        rows = [json.loads(row) for row in out.splitlines()]
        assert [row["combine_us"] for row in rows] == [1.25, 1.25]
        assert rows[0]["machine"] == {"gpu": "none"}
    else:
        assert out.count("flash_mla 2.0/2.0") == 2
        assert out.count("combine 1.25 us after decode") == 2


def test_combine_is_timed_from_the_end_of_its_own_decode() -> None:
    decode, combine = "void mlakit::sm90::decode_dense_kernel<1>(p)", "void mlakit::sm90::combine_kernel<1, 2>(p)"
    calls = [
        (decode, 0.0, 10.0),
        (combine, 8.0, 12.0),
        (decode, 11.0, 30.0),  # begins while combine of the call before still runs
        (combine, 28.0, 33.0),
        (decode, 32.0, 50.0),
        (combine, 48.0, 57.0),
        ("memset", 49.0, 49.5),
    ]
    assert gpu.combine_after_decode(reversed(calls)) == 3.0
    assert gpu.combine_after_decode([call for call in calls if call[0] != combine]) is None
    assert gpu.combine_after_decode([]) is None
