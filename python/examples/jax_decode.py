"""Decode with JAX arrays, which go in and come out by DLPack without a copy. Needs jax and mlakit.

JAX's arrays cannot be written to, so out and lse are new arrays. mlakit runs when it is called: outside of jax.jit.
"""

import jax
import jax.numpy as jnp

import mlakit


def main() -> float:
    keys = jax.random.split(jax.random.key(0), 2)
    lengths = [100, 1, 300]
    table = jnp.asarray([[0, 1, -1, -1, -1], [2, -1, -1, -1, -1], [3, 4, 5, 6, 7]], jnp.int32)
    cache = (jax.random.normal(keys[0], (8, 64, 1, 576)) / 8).astype(jnp.bfloat16)
    q = (jax.random.normal(keys[1], (3, 1, 16, 576)) / 8).astype(jnp.bfloat16)
    out, lse = mlakit.mla_decode(q, cache, table, jnp.asarray(lengths, jnp.int32), softmax_scale=192**-0.5)
    assert isinstance(out, jax.Array)
    assert lse.shape == (3, 1, 16)

    worst = 0.0
    for b, length in enumerate(lengths):
        rows = cache[table[b, : -(-length // 64)]].reshape(-1, 576)[:length].astype(jnp.float32)
        weights = jax.nn.softmax(192**-0.5 * q[b, 0].astype(jnp.float32) @ rows.T, axis=-1)
        worst = max(worst, float(jnp.abs(out[b, 0].astype(jnp.float32) - weights @ rows[:, :512]).max()))
    print(f"jax on {out.device}: largest error {worst:.2e}")
    return worst


if __name__ == "__main__":
    main()
