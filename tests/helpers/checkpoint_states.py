"""A small training state, and what is compared of states and folders."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def small_state(value: float = 1.0) -> dict:
    return {
        "adapter": {
            "q_proj": {"a": jnp.full((2, 3, 4), value, "float32"), "b": jnp.zeros((2, 4, 3))}
        },
        "optimizer": {"0": {"count": jnp.int32(7), "mu": jnp.full((5,), -value, "float32")}},
        "step": jnp.int32(7),
        "key": jax.random.key(3),
    }


def bits(tree) -> list:
    """Every leaf as dtype, shape and bytes."""
    found = []
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found.append(str(leaf.dtype))
            leaf = jax.random.key_data(leaf)
        leaf = np.asarray(leaf)
        found.append((str(leaf.dtype), leaf.shape, leaf.tobytes()))
    return found


def save_and_wait(opened, step) -> None:
    opened.save(step, small_state(step), meta={})
    opened.wait()


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
