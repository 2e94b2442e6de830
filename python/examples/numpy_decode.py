"""Decode with numpy arrays: bf16 comes from ml_dtypes, nothing is copied. Needs numpy, ml_dtypes and mlakit."""

import ml_dtypes
import numpy as np

import mlakit


def main() -> float:
    rng = np.random.default_rng(0)
    cache = mlakit.PagedCache(pages=40, page_size=64, dtype=ml_dtypes.bfloat16)
    lengths = {"chat": 700, "new": 0, "code": 1500}
    for name, length in lengths.items():
        cache.add(name)
        cache.append(name, rng.standard_normal((length, 576)) / 8)

    q = (rng.standard_normal((3, 1, 16, 576)) / 8).astype(ml_dtypes.bfloat16)
    out = np.empty((3, 1, 16, 512), ml_dtypes.bfloat16)
    mlakit.mla_decode(q, cache.pages, cache.block_table(lengths), cache.cache_seqlens(lengths), softmax_scale=192**-0.5, out=out)

    # The same in float64, row by row.
    worst = 0.0
    for b, length in enumerate(lengths.values()):
        pages = cache.block_table(lengths)[b, : -(-length // 64)]
        keys = cache.pages[pages].reshape(-1, 576)[:length].astype(np.float64)
        scores = np.exp(192**-0.5 * q[b, 0].astype(np.float64) @ keys.T)
        expected = scores @ keys[:, :512] / np.maximum(scores.sum(-1, keepdims=True), 1e-300)
        worst = max(worst, float(np.abs(out[b, 0].astype(np.float64) - expected).max()))
    print(f"numpy: largest error {worst:.2e} (out is about {np.abs(out.astype(np.float64)).max():.2f})")
    return worst


if __name__ == "__main__":
    main()
