"""What is chosen by the kind of device that a program is compiled for: the one place.

The results are the same for every choice, to rounding; speed and memory are not.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import jax

_PLATFORM = jax.make_user_context(None)
"""The platform set by `traced_for`: a part of the key of all of JAX's caches of programs."""


class Choices(NamedTuple):
    """What suits a backend.

    Attributes:
        tile: How many queries, and keys, make a tile of attention: small tiles are skipped more
            often, but on an accelerator each costs the launch of its kernels.
        dense: The longest row whose attention is one product.
        loss_tokens: About how many tokens' logits exist at once.
        turn_a: Whether the gradient of LoRA's A is a product with rank rows, turned afterwards:
            of two products of the same size the one that takes a quarter of the time.
        float32: Whether activations are in float32, whatever the weights are, if nothing is asked.
        unstack: Whether decoding reads layers one by one instead of slices of a stack.
        native_bfloat16: Whether XLA multiplies, computes with and stacks bfloat16 as it is; what
            is done where it does not: `jaxpeft.ops.products`.
        splash: Whether longer rows go through JAX's kernel for TPUs where it is exact. On GPU no
            kernel that comes with JAX takes packed segments: there tiles are the choice.
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
    """What suits the backend that programs are traced for."""
    return {"cpu": CPU, "tpu": TPU}.get(platform(), ACCELERATOR)


def platform() -> str:
    """The platform that programs are traced for."""
    return _PLATFORM.value or jax.default_backend()


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Traces programs for another platform ("cpu", "cuda", "rocm", "tpu") than is there.

    A jitted function that was traced for another platform before is traced again. Other threads
    are not affected.
    """
    with _PLATFORM(platform):
        yield


def give_back_memory() -> None:
    """Gives memory that is free, but that malloc holds, back to the system; glibc can.

    Compilation leaves hundreds of megabytes of it.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another libc
        return
