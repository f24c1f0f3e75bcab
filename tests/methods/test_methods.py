"""What every method promises, on one small decoder: a new one is tested once it is registered.

Reference values come from the method's own merged arrays, from plain loops, or from the base.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_decoder import CONFIG, decoder, draw, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.mesh import layouts, placement
from jaxpeft.methods.binding import bind
from jaxpeft.methods.merging import merge
from jaxpeft.methods.method import Context
from jaxpeft.methods.registry import KINDS, METHODS
from jaxpeft.models.config import ModelConfig
from jaxpeft.ops.linear import SHARED, Node

SMALL = {"rank": 2, "alpha": 4.0, "num_tokens": 3, "block_size": 4, "hidden_size": 8, "steps": 4}
TOKENS = {"token_ids": (3, 7, 40)}
BIASED = ModelConfig(**{**dataclasses.asdict(CONFIG), "model_type": "qwen2", "qkv_bias": True})


def small(cls, **values):
    """A config of the class, with small sizes where it has such fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in (SMALL | values).items() if key in names})


VARIANTS = {
    "lora-dora": small(jp.LoRA, dora=True, targets=("q_proj", "down_proj")),
    "lora-patterns": small(jp.LoRA, rank_pattern={"down_proj": 3}, alpha_pattern={"v_proj": 7.0}),
    "lora-saved": small(
        jp.LoRA,
        lora_bias=True,
        bias="all",
        save_modules=("embed_tokens", "norm"),
        targets=("q_proj", "v_proj"),
    ),
    "lora-tables": small(jp.LoRA, targets=("embed_tokens", "lm_head", "v_proj")),
    "lora-tokens": small(jp.LoRA, **TOKENS),
}
"""What a family computes in another way than by default."""
NEEDS = {"trainable_tokens": TOKENS}
CASES = {name: small(cls, **NEEDS.get(name, {})) for name, cls in METHODS.items()} | VARIANTS

every_method = pytest.mark.parametrize("method", CASES.values(), ids=CASES)


@functools.cache
def fresh(method):
    module, params = decoder(BIASED)
    context = Context(config=BIASED, module=module)
    return jax.jit(lambda params, key: method.init(params, key, context))(params, jax.random.key(0))


def trained(method, seed=1):
    """An adapter moved away from where it starts, as by training."""
    adapter = fresh(method)
    shift = draw(adapter.params, seed, 0.15)
    moved = jax.tree.map(lambda x, y: jax.device_put(np.add(x, y)), adapter.params, shift)
    return adapter.replace(params=moved)


def forward(adapter, params, remat="none"):
    module, ids = decoder(BIASED, remat)[0], make_batch(2, 8)["tokens"]
    count = 0 if adapter is None else KINDS[adapter.spec.kind].virtual_tokens(adapter)
    if count:
        ids = jp.with_prompt(adapter, ids)
    return module.apply(bind(params, adapter), ids)[:, count:]


def loss_of(adapter, params, remat="none"):
    out = jax.nn.log_softmax(forward(adapter, params, remat))
    return -jnp.take_along_axis(out, make_batch(2, 8)["targets"][..., None], -1).mean()


# Compiled once a method, whatever the test.
run_forward = jax.jit(forward)


@functools.partial(jax.jit, static_argnames="remat")
def run_gradients(adapter, params, remat="none"):
    """The loss and its gradient with respect to the adapter's parameters."""
    return jax.value_and_grad(lambda p: loss_of(adapter.replace(params=p), params, remat))(
        adapter.params
    )


def logits(adapter, params=None):
    return run_forward(adapter, decoder(BIASED)[1] if params is None else params)


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected
    )


@every_method
def test_a_new_adapter_fits_its_base_and_its_trees_agree_with_its_spec(method):
    adapter = fresh(method)
    for path in adapter.spec.paths:
        assert paths.get(adapter.params, path)
    places = set(paths.flatten(adapter.params))
    known = (*adapter.spec.paths, SHARED)
    assert all(any(place.startswith(path + "/") for path in known) for place in places)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.params)} == {jnp.dtype("float32")}
    assert hash(adapter.spec) == hash(fresh(method).spec)


@every_method
def test_a_new_adapter_changes_nothing_or_is_a_prompt(method):
    adapter = fresh(method)
    kind = KINDS[adapter.spec.kind]
    if kind.no_merge:
        assert np.isfinite(logits(adapter)).all()
    else:
        assert_close(logits(adapter), logits(None), rtol=1e-5, atol=1e-5)


@every_method
def test_a_trained_adapter_changes_the_model_the_same_when_merged(method):
    adapter = trained(method)
    bound, plain = logits(adapter), logits(None)
    assert np.abs(bound - plain).max() > 1e-2
    if KINDS[adapter.spec.kind].no_merge:
        with pytest.raises(jp.UserError, match="cannot be merged"):
            merge(decoder(BIASED)[1], adapter)
        return
    merged = merge(decoder(BIASED)[1], adapter)
    assert not any(isinstance(leaf, Node) for leaf in paths.flatten(merged).values())
    assert_close(logits(None, params=merged), bound)


@every_method
def test_remat_changes_neither_value_nor_gradient(method):
    adapter, base = trained(method), decoder(BIASED)[1]
    assert_close(run_gradients(adapter, base, remat="full"), run_gradients(adapter, base))


@every_method
def test_compiled_or_not_the_logits_are_the_same(method):
    adapter, base = trained(method), decoder(BIASED)[1]
    assert_close(forward(adapter, base), logits(adapter))


@every_method
def test_gradients_are_those_of_finite_differences(method):
    adapter, base = trained(method), decoder(BIASED)[1]
    if dict(adapter.spec.options).get("dora"):
        return  # its norm counts as a constant: tests/methods/test_dora.py
    direction = draw(adapter.params, seed=5, scale=1.0)
    slope = optax.tree.vdot(run_gradients(adapter, base)[1], direction)
    step = 1e-2 / float(optax.tree.norm(direction))

    def at(t):
        move = lambda p, d: np.asarray(p) + np.float32(t) * np.asarray(d)  # noqa: E731
        moved = jax.device_put(jax.tree.map(move, adapter.params, direction))
        return float(run_gradients(adapter.replace(params=moved), base)[0])

    # Central differences of fourth order.
    near, far = (at(step) - at(-step)) / (2 * step), (at(2 * step) - at(-2 * step)) / (4 * step)
    assert slope == pytest.approx((4 * near - far) / 3, rel=5e-2, abs=5e-3)


@every_method
def test_several_adapters_under_vmap_share_the_base(method):
    several = [trained(method, seed=seed) for seed in (1, 2)]
    stacked = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *several))
    actual = jax.jit(jax.vmap(forward, in_axes=(0, None)))(stacked, decoder(BIASED)[1])
    for one, expected in zip(actual, map(logits, several), strict=True):
        assert_close(one, expected)


@every_method
def test_a_base_sharded_over_eight_devices_gives_the_same(method):
    mesh = layouts.make_mesh(data=1, fsdp=2, tensor=4)
    adapter, base = trained(method), decoder(BIASED)[1]
    placed = placement.shard_params(base, mesh)
    assert_close(run_gradients(adapter, placed), run_gradients(adapter, base))


@every_method
def test_training_lowers_the_loss_and_moves_every_trained_array(method):
    base = decoder(BIASED)[1]
    adapter = fresh(method)
    tx = jp.masked(optax.adamw(2e-2, weight_decay=0.0), jp.adapter_only)
    state = jp.init_train_state(base, adapter, tx, jax.random.key(0))

    def loss_fn(params, adapter, batch, key):
        del batch, key
        return loss_of(adapter, params)

    step = jp.make_train_step(loss_fn, tx)
    losses = []
    for _ in range(4):
        state, metrics = step(state, base, make_batch(2, 8))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.adapter.params, adapter.params)
    assert all(jax.tree.leaves(moved))


@every_method
def test_a_layer_of_rank_zero_and_zeros_is_left_as_it_is(method):
    adapter, base = fresh(method), decoder(BIASED)[1]
    places = {p for p in adapter.spec.paths if paths.get(adapter.buffers, f"{p}/rank") is not None}
    if not places:  # prompts and whole replacements: what has no rank has no layers to leave out
        assert KINDS[adapter.spec.kind].no_merge or not KINDS[adapter.spec.kind].needs_base
        return
    assert places == set(adapter.spec.paths)
    nothing = jax.tree.map(jnp.zeros_like, adapter)
    assert_close(logits(nothing), logits(None), rtol=1e-6, atol=1e-6)
    assert optax.tree.norm(run_gradients(nothing, base)[1]) == 0


@every_method
def test_the_config_is_rebuilt_from_the_adapter(method):
    adapter = fresh(method)
    again = KINDS[adapter.spec.kind].config_of(adapter)
    rebuilt = fresh(again)
    assert rebuilt.spec == adapter.spec
    assert jax.tree.map(jnp.shape, rebuilt.params) == jax.tree.map(jnp.shape, adapter.params)
    own = {k: v for k, v in adapter.buffers.items() if k != SHARED}
    assert_close({k: v for k, v in rebuilt.buffers.items() if k != SHARED}, own)
