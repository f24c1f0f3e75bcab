"""Prints what `jaxpeft.lift` costs before a program runs: the time of tracing and of compiling.

The model is a Linen transformer of stock layers. The base is compared with the same function,
lifted and bound to an adapter, in turns: a machine that slows down slows down both. What the
program costs when it runs is tested in ``tests/lifting/test_costs.py``.

Command: ``python -m scripts.lift_costs [--layers 12] [--turns 15]``
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxpeft as jp


class Block(nn.Module):
    """A layer of a transformer.

    Attributes:
        d_model: Features of the input and the result.
    """

    d_model: int

    @nn.compact
    def __call__(self, x: Any, _: None = None) -> tuple[Any, None]:
        """The layer's result, in the form that ``nn.scan`` wants."""
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h)
        h = nn.gelu(nn.Dense(4 * self.d_model)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.d_model)(h), None


class Transformer(nn.Module):
    """A stack of layers.

    Attributes:
        layers: How many.
        scanned: Whether they run in a loop, with remat, or one after the other.
        d_model: Features between layers.
    """

    layers: int
    scanned: bool
    d_model: int = 128

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        """What the last layer gives for token ids."""
        x = nn.Embed(256, self.d_model)(ids)
        if self.scanned:
            stack = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            return stack(self.d_model)(x, None)[0]
        for _ in range(self.layers):
            x, _ = Block(self.d_model)(x)
        return x


def functions(module: nn.Module) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
    """The forward pass and gradients of the base and of the lifted model, and their arguments.

    The base's gradient is by its parameters, the lifted one by the adapter.
    """
    ids = jnp.zeros((4, 32), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids)
    roles = jp.describe(module.apply, params, ids)
    method = jp.LoRA(rank=8, targets="all-linear")
    adapter = jax.jit(lambda key: jp.init_adapter(method, params, key, roles=roles))(
        jax.random.key(1)
    )
    apply: Callable[..., Any] = module.apply
    lifted_apply = jp.lift(apply)

    def base(params: Any, adapter: Any) -> Any:
        return jnp.square(apply(params, ids)).mean()

    def lifted(params: Any, adapter: Any) -> Any:
        return jnp.square(lifted_apply(jp.bind(params, adapter), ids)).mean()

    def by_factors(params: Any, adapter: Any) -> Any:
        loss = lambda factors: lifted(params, adapter.replace(params=factors))  # noqa: E731
        return jax.grad(loss)(adapter.params)

    forms = {
        "forward, base": base,
        "forward, lifted": lifted,
        "gradient, base": jax.grad(base),
        "gradient, lifted": by_factors,
    }
    return forms, (params, adapter)


def tracing(
    one: Callable[..., Any], other: Callable[..., Any], arguments: tuple[Any, ...], turns: int
) -> tuple[float, float]:
    """Median seconds of tracing two functions, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for function, found in zip((one, other), times, strict=True):
            begin = time.perf_counter()
            jax.make_jaxpr(lambda *args, function=function: function(*args))(*arguments)
            if turn:  # the first one fills caches
                found.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def compiling(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Seconds of compiling a function, without its tracing."""
    lowered = jax.jit(function).lower(*arguments)
    begin = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - begin


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What lift costs in tracing and compiling.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args()
    print(f"jax {jax.__version__}, {given.layers} layers, medians of {given.turns} turns\n")
    print("what                               base  lifted  ratio")
    for form, scanned in (("unrolled", False), ("scan + remat", True)):
        forms, arguments = functions(Transformer(given.layers, scanned))
        for part in ("forward", "gradient"):
            pair = forms[f"{part}, base"], forms[f"{part}, lifted"]
            before, after = tracing(*pair, arguments, given.turns)
            row(f"trace {part}, {form}, ms", 1e3 * before, 1e3 * after)
        gradients = [compiling(forms[f"gradient, {of}"], arguments) for of in ("base", "lifted")]
        row(f"compile gradient, {form}, s", *gradients)


def row(text: str, before: float, after: float) -> None:
    """Prints a row of the table."""
    print(f"{text:<32} {before:>6.1f}  {after:>6.1f}  {after / before:>5.2f}", flush=True)


if __name__ == "__main__":
    main()
