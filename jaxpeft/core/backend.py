"""Choices that depend on the kind of device a program is compiled for; they are made here alone.

Results are the same for every choice, up to rounding. Speed and memory differ.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import jax

_PLATFORM = jax.make_user_context(None)
"""The platform set by `traced_for`: a part of the key of all of JAX's caches of programs."""


class Choices(NamedTuple):
    """The choices for one backend.

    Attributes:
        tile: Queries (and keys) in a tile of attention. Smaller tiles are skipped more often, but
            on an accelerator every tile costs the launch of its kernels.
        dense: The longest row, in tokens, whose attention is computed as one product.
        loss_tokens: About how many tokens have their logits in memory at the same time.
        turn_a: Compute the gradient of LoRA's A transposed, ``(rank, d_in)``, then transpose it: on
            CPU this takes a quarter of the time.
        float32: Whether activations are float32 by default, whatever dtype the weights have.
        unstack: Whether decoding reads each layer from an array of its own instead of slicing a
            stack.
        native_bfloat16: Whether XLA multiplies, computes and stacks in bfloat16 natively;
            `jaxpeft.ops.products` describes what is done otherwise.
        splash: Whether rows longer than `dense` use JAX's attention kernel for TPUs where it is
            exact. No GPU kernel that comes with JAX takes packed segments, so GPUs use tiles.
    """

    tile: int
    dense: int
    loss_tokens: int
    turn_a: bool
    float32: bool
    unstack: bool
    native_bfloat16: bool = True
    splash: bool = False


CPU = Choices(
    tile=256,
    dense=128,
    loss_tokens=256,
    turn_a=True,
    float32=True,
    unstack=True,
    native_bfloat16=False,
)
ACCELERATOR = Choices(
    tile=512, dense=128, loss_tokens=512, turn_a=False, float32=False, unstack=False
)
TPU = ACCELERATOR._replace(splash=True)


def choices() -> Choices:
    """The choices for the platform that programs are traced for."""
    return {"cpu": CPU, "tpu": TPU}.get(platform(), ACCELERATOR)


def platform() -> str:
    """The platform that programs are traced for."""
    return _PLATFORM.value or jax.default_backend()


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Traces programs for a platform ("cpu", "cuda", "rocm", "tpu") that need not be present.

    A jitted function that was traced for another platform is traced again. Other threads are not
    affected.
    """
    with _PLATFORM(platform):
        yield


def give_back_memory() -> None:
    """Returns memory to the system that is free but still held by malloc; this works with glibc.

    Compilation leaves hundreds of megabytes of such memory.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another libc
        return
