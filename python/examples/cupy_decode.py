"""Decode with CuPy arrays on a Hopper GPU, on CuPy's current stream, and replayed as a CUDA graph. Needs cupy and mlakit."""

import cupy as cp

import mlakit


def main() -> float:
    rng = cp.random.default_rng(0)
    lengths = cp.asarray([100, 1, 300], cp.int32)
    table = cp.asarray([[0, 1, -1, -1, -1], [2, -1, -1, -1, -1], [3, 4, 5, 6, 7]], cp.int32)
    cache = (rng.standard_normal((8, 64, 1, 576)) / 8).astype(cp.float16)
    q = (rng.standard_normal((3, 1, 16, 576)) / 8).astype(cp.float16)
    out, lse = cp.empty((3, 1, 16, 512), cp.float16), cp.empty((3, 1, 16), cp.float32)

    # Everything a captured step needs is made before it, so that the graph holds nothing that CuPy's pool may hand out again.
    problem = mlakit.Problem(device="cuda", q_dtype="fp16", max_batch=3, q_heads=16, max_len=320, softmax_scale=192**-0.5)
    plan = mlakit.Plan(problem)
    schedule_memory = cp.empty(plan.info.schedule_bytes, cp.uint8)
    scratch = cp.empty(plan.info.scratch_bytes, cp.uint8)

    def step() -> None:
        schedule = plan.schedule(lengths, buffer=schedule_memory)
        plan.decode(q, cache, table, schedule, out=out, lse=lse, scratch=scratch)

    cp.cuda.get_current_stream().synchronize()  # what was made above is there before another stream reads it
    with cp.cuda.Stream(non_blocking=True) as stream:
        step()
        stream.synchronize()
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        lengths -= cp.asarray([50, 1, 0], cp.int32)  # a replay reads the lengths as they are then
        out.fill(cp.nan)
        graph.launch(stream)
        stream.synchronize()

    worst = 0.0
    for b, length in enumerate(lengths.tolist()):
        rows = cache[table[b, : -(-length // 64)]].reshape(-1, 576)[:length].astype(cp.float64)
        weights = cp.exp(192**-0.5 * q[b, 0].astype(cp.float64) @ rows.T)
        expected = weights @ rows[:, :512] / cp.maximum(weights.sum(-1, keepdims=True), 1e-300)
        worst = max(worst, float(cp.abs(out[b, 0] - expected).max()))
    print(f"cupy: largest error {worst:.2e}")
    return worst


if __name__ == "__main__":
    main()
