"""What the compiled training step needs: memory linear in tokens, a program flat in depth.

No buffer has a side of all tokens twice, also not in the program that is lowered for CUDA.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from tiny_decoder import CONFIG

import jaxpeft as jp
from jaxpeft.core import backend
from jaxpeft.core.flops import count_flops
from jaxpeft.methods.leaves.full import Full
from jaxpeft.models.transformer import Transformer
from jaxpeft.updates.losses import make_lm_loss
from jaxpeft.updates.step import adapter_only, init_train_state, make_train_step

LORA = jp.LoRA(rank=4, alpha=8.0)
WIDE = dataclasses.replace(CONFIG, d_model=64, d_ff=128, head_dim=16, num_layers=2)


def step_of(tokens, config=WIDE, remat="full", method=LORA):
    """The step of one row, and the shapes it takes."""
    module = Transformer(config, jnp.float32, remat)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    tx = jp.masked(optax.adamw(1e-3), adapter_only)

    def start(params):
        adapter = jp.init_adapter(method, params, jax.random.key(0))
        return init_train_state(params, adapter, tx, jax.random.key(0))

    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {**dict.fromkeys(names, row), "weights": jax.ShapeDtypeStruct(row.shape, jnp.float32)}
    step = make_train_step(make_lm_loss(module, head_frozen=True), tx)
    return step, jax.eval_shape(start, params), params, batch


def lower(tokens, config=WIDE, remat="full", platform="cpu"):
    """The LoRA step of one row, from shapes alone, lowered for a platform."""
    step, *shapes = step_of(tokens, config, remat)
    with backend.traced_for(platform):
        return step.trace(*shapes).lower(lowering_platforms=(platform,))


def temporaries(tokens, **kwargs):
    return lower(tokens, **kwargs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_memory_of_the_step_is_linear_in_tokens(remat):
    """One more token takes the same at 4096 as at 16384: a byte for every 4 pairs would show."""
    assert temporaries(4096, remat=remat) <= 1.1 * 16 * temporaries(256, remat=remat)

    def slopes(more=lambda tokens: 0):
        first, second, third = (temporaries(n, remat=remat) + more(n) for n in (4096, 8192, 16384))
        return (second - first) / 4096, (third - second) / 8192

    def linear(earlier, later):
        return later <= 1.02 * earlier

    assert linear(*slopes()), slopes()
    assert not linear(*slopes(lambda tokens: tokens**2 // 4))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_no_array_of_the_program_is_as_long_as_the_row_twice(platform):
    """The largest has the sides of a tile, for every head; a whole square has at least 8 times."""
    tokens = 4096
    text = lower(tokens, platform=platform).as_text()
    shapes = [
        [int(n) for n in found.split("x")] for found in re.findall(r"tensor<([0-9x]+)x[a-z]", text)
    ]
    assert [tokens] in [shape[1:2] for shape in shapes]
    block = (backend.CPU if platform == "cpu" else backend.ACCELERATOR).tile
    assert max(map(math.prod, shapes)) <= max(WIDE.num_heads * block**2, tokens * WIDE.d_ff)
    assert not [shape for shape in shapes if sum(n >= tokens // 4 for n in shape) > 1]


def test_the_program_is_as_long_for_64_layers_as_for_8():
    """Before and after compilation, and so is the time that compilation takes."""
    lines = {}
    for layers in (8, 64):
        lowered = lower(256, config=dataclasses.replace(WIDE, num_layers=layers))
        texts = lowered.as_text(), lowered.compile().as_text()
        lines[layers] = [len(text.splitlines()) for text in texts]
    assert lines[64][0] == lines[8][0]
    assert lines[64][1] <= 1.05 * lines[8][1]


@pytest.mark.parametrize("method", [LORA, jp.IA3(), jp.VeRA(rank=8), Full()], ids=str)
def test_dots_computes_no_product_again(method):
    none, dots = (
        count_flops(*step_of(256, remat=name, method=method)) for name in ("none", "dots")
    )
    assert dots == none


@pytest.mark.slow
def test_dots_keeps_less_than_half_of_what_none_keeps():
    assert kept_by_layers("dots") < 0.5 * kept_by_layers("none")


def kept_by_layers(remat):
    """Bytes that eight more layers need."""
    few, many = (dataclasses.replace(WIDE, num_layers=n) for n in (2, 10))
    return temporaries(256, config=many, remat=remat) - temporaries(256, config=few, remat=remat)


def test_rematerialised_layers_visit_no_tile_a_third_time():
    """What "full" computes again is the products with kernels, of a layer all but the last."""

    def cost(remat):
        module = Transformer(WIDE, jnp.float32, remat)
        ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
        params = jax.eval_shape(module.init, jax.random.key(0), ids)
        return count_flops(jax.grad(lambda v, ids: module.apply(v, ids).sum()), params, ids)

    c = WIDE
    sides = c.d_model * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    kernels = sides + 2 * c.d_model * c.d_ff
    assert cost("full") - cost("none") == c.num_layers * 2 * 512 * kernels
