"""Explains a lack of memory: what uses it, and which values of the config use less."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.config.run_config import RunConfig
from jaxpeft.core.errors import ResourceError, UserError
from jaxpeft.training.run import Run

_SIGNS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


@contextlib.contextmanager
def memory_explained(config: RunConfig, devices: int, begun: Sequence[Run]) -> Iterator[None]:
    """Turns a lack of memory in its block into a `ResourceError` that helps.

    Args:
        config: The run.
        devices: The number of devices.
        begun: A list that gets the run as soon as its base and state are on their devices.

    Raises:
        ResourceError: The memory is not enough. The text says what uses memory, and what would use
            less.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(sign in text for sign in _SIGNS):
            raise
        raise ResourceError(
            f"out of memory: {_describe(config, begun)}. Any of these takes less: "
            f"{', '.join(_changes(config, devices))}. ({text[:200] or 'the host has no more'})"
        ) from error


def _describe(config: RunConfig, begun: Sequence[Run]) -> str:
    train = config.train
    rows = train.microbatch_size or train.batch_size
    if not begun:
        return f"the base {config.model.path} in {config.model.dtype} does not fit"
    run = begun[0]
    return (
        f"on each device the base takes {_size(run.base.params)}, the adapter with its optimizer "
        f"{_size(run.state)}; the rest is for activations and gradients of {rows} rows of "
        f"{run.rows.plan.seq_len} tokens at a time"
    )


def _size(tree: Any) -> str:
    """The bytes of a tree on one device."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    count = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return f"{count / 2**20:,.1f} MiB"


def _changes(config: RunConfig, devices: int) -> list[str]:
    """Values of keys that use less memory than this config, the harmless ones first."""
    from jaxpeft.planning.machines import Machine
    from jaxpeft.planning.memory import levers

    here = Machine("this machine", None, devices, "device", 0, None)
    found = []
    for steps in levers(config, here):
        mild = [step for step in steps if 2 * step.get("train.microbatch_size", 0) <= _rows(config)]
        found += [f"{key}: {value}" for key, value in (mild or steps)[0].items()]
    found.append(f"data.max_length: {config.data.max_length // 2} (rows must be shorter then)")
    if config.data.eval is not None and config.evaluation.batch_size > 1:
        found.append(f"evaluation.batch_size: {config.evaluation.batch_size // 2}")
    return found


def _rows(config: RunConfig) -> int:
    return config.train.microbatch_size or config.train.batch_size
