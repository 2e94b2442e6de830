"""mlakit.bench.sustained: what it computes from times and samples, and the order of turns. The turns themselves need a GPU."""

from __future__ import annotations

import math

import pytest

from mlakit.bench import sustained


def test_the_bound_of_a_mean_is_students() -> None:
    mean, upper = sustained.mean_and_upper([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert upper == pytest.approx(2.0 + 4.303 / math.sqrt(3))
    assert sustained.mean_and_upper([0.5]) == (0.5, None)
    assert sustained.mean_and_upper([0.5] * 100) == (0.5, 0.5)
    assert list(sustained.T_QUANTILES) == sorted(sustained.T_QUANTILES, reverse=True)
    assert len(sustained.T_QUANTILES) == 30


def test_ratios_are_taken_within_a_round() -> None:
    ours, peer = ([sustained.Turn(us, 0.0, 1.0) for us in times] for times in ((10.0, 30.0), (20.0, 40.0)))
    mean, upper = sustained.mean_ratio(ours, peer)
    assert mean == pytest.approx((0.5 + 0.75) / 2)
    assert upper is not None
    assert upper > mean


def test_samples_count_inside_turns_that_have_settled() -> None:
    samples = sustained.Samples()
    samples.read(["1980, 512.34\n", "[N/A], 500.00\n", "\n", "1500, 700.00\n"])
    assert [sample[1:] for sample in samples.samples] == [(1980.0, 512.34), (1500.0, 700.0)]
    samples.samples = [
        (0.05, 1980.0, 100.0),
        (0.5, 1500.0, 600.0),
        (0.9, 1600.0, 700.0),
        (1.5, 1980.0, 100.0),
        (2.5, 1700.0, 650.0),
    ]
    turns = [sustained.Turn(1.0, 0.0, 1.0), sustained.Turn(1.0, 2.0, 3.0)]
    assert samples.mean(turns) == (pytest.approx(1600.0), pytest.approx(650.0))
    assert samples.mean(turns[:1]) == (pytest.approx(1550.0), pytest.approx(650.0))
    assert samples.mean([sustained.Turn(1.0, 5.0, 6.0)]) == (None, None)


def test_every_second_round_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def take_turn(graph: str, seconds: float) -> sustained.Turn:
        order.append(graph)
        return sustained.Turn(seconds, 0.0, 1.0)

    monkeypatch.setattr(sustained, "take_turn", take_turn)
    turns = sustained.alternate({"ours": "a", "peer": "b", "cublas": "c"}, 0.5, 3)
    assert order == [*"abc", *"cba", *"abc"]
    assert [len(each) for each in turns.values()] == [3, 3, 3]
