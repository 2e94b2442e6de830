"""The programs of python/examples: each runs where its framework is, and says what it should."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(bool(cases.no_gpu()), reason=cases.no_gpu() or "a GPU is there")
SMALL = ["--requests", "3", "--longest", "150", "--new-tokens", "6", "--slots", "2"]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def threads() -> Any:
    """The example sets torch's threads; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_numpy() -> None:
    assert load("numpy_decode").main() < 4e-3


def test_jax() -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    assert load("jax_decode").main() < 4e-3


@gpu
@needs_gpu
def test_cupy() -> None:
    pytest.importorskip("cupy", reason="cupy is not installed")
    assert load("cupy_decode").main() < 2e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, needs_gpu))])
def test_tiny_engine_generates_the_dense_models_tokens(device: str, threads: None, capsys: pytest.CaptureFixture[str]) -> None:
    dtype = "fp32" if device == "cpu" else "bf16"
    reports = load("tiny_engine").main(["--device", device, "--dtype", dtype, *SMALL])
    assert [report.generated for report in reports] == [3 * 5] * 3  # the first new token is the prefill's
    text = capsys.readouterr().out
    assert "every token is the dense model's greedy choice" in text
    assert "MLA" in text
    for report in reports:
        assert report.name in text
    if device == "cuda":
        assert "graph" in reports[1].name


def test_tiny_engine_finds_a_wrong_token(threads: None) -> None:
    """The check that the example prints its success by can fail."""
    engine = load("tiny_engine")
    with torch.inference_mode():
        model = engine.Model(engine.Config(), 0, "cpu", torch.float32)
        requests = engine.make_requests(model.c, 2, 50, 4, seed=1)
        engine.Engine(model, slots=2, pages=4, max_len=64, q_len=1, use_mlakit=True).serve(requests)
        engine.check_against_dense(model, requests, 0.0)
        requests[1].tokens[-2] ^= 1
        with pytest.raises(AssertionError, match=r"^request 1: token 2 is "):
            engine.check_against_dense(model, requests, 0.0)


def test_tiny_engine_gives_all_pages_back_and_uses_them_again(threads: None) -> None:
    """Five requests through a cache with room for two; an answer of NaN would show a row that nobody wrote."""
    engine = load("tiny_engine")
    with torch.inference_mode():
        model = engine.Model(engine.Config(), 0, "cpu", torch.float32)
        requests = engine.make_requests(model.c, 5, 60, 5, seed=2)
        small = engine.Engine(model, slots=3, pages=1 + 4, max_len=128, q_len=2, use_mlakit=True)
        small.serve(requests)
        engine.check_against_dense(model, requests, 0.0)
        assert len(small.cache.free_pages) == 4
        with pytest.raises(MemoryError, match="needs more pages than the cache has"):
            small.serve([engine.Request([1] * 300, 1)])


def test_examples_need_nothing_else_of_mlakit_than_its_public_names() -> None:
    for path in EXAMPLES.glob("*.py"):
        for line in path.read_text().splitlines():
            assert "mlakit._" not in line, path
