"""LoRA+ and LoRA-FA against their formulas in float64 NumPy, and through the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_decoder import CONFIG, decoder, draw, make_adapter, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.registry import KINDS, METHODS
from jaxpeft.updates.lora_rules import check_factors, lora_plus_groups, projected, without_a
from jaxpeft.updates.losses import make_lm_loss
from jaxpeft.updates.optimizers import OptimConfig, make_optimizer, masked

PARAMS = decoder(CONFIG)[1]
KERNEL = "layers/self_attn/q_proj/kernel"


def config(**values):
    fixed = {"name": "sgd", "b1": 0.0, "learning_rate": 0.1, "schedule": "constant"}
    return OptimConfig(**{**fixed, "clip_norm": None, **values})


def tree():
    """One leaf of every group, in stacks of two layers where they are stacked."""
    adapter = {
        f"{KERNEL}/a": jnp.ones((2, 4, 2)),
        f"{KERNEL}/b": jnp.ones((2, 2, 4)),
        f"{KERNEL}/m": jnp.ones((2, 4)),
        f"{KERNEL}/e": jnp.ones((2, 2)),
        "lm_head/kernel/e": jnp.ones(2),
        "layers/self_attn/q_proj/bias/value": jnp.ones((2, 4)),
        "embed_tokens/embedding/a": jnp.ones((6, 2)),
        "embed_tokens/embedding/b": jnp.ones((2, 4)),
        "embed_tokens/embedding/m": jnp.ones(4),
        "lm_head/kernel/rows": jnp.ones((3, 4)),
    }
    base = {"norm/scale": jnp.ones(4), "lm_head/kernel": jnp.ones((4, 6))}
    return {"base": paths.unflatten(base), "adapter": paths.unflatten(adapter)}


def of_lora(tree):
    """The same tree without AdaLoRA's singular values."""
    leaves = paths.flatten(tree)
    return paths.unflatten({path: x for path, x in leaves.items() if not path.endswith("/e")})


def test_the_groups_are_those_of_peft():
    groups = paths.flatten(lora_plus_groups(tree(), KINDS["adalora"].arrays | KINDS["lora"].arrays))
    assert groups == {
        f"adapter/{KERNEL}/a": "a",
        f"adapter/{KERNEL}/b": "b",
        f"adapter/{KERNEL}/m": "b",
        f"adapter/{KERNEL}/e": "a",
        "adapter/lm_head/kernel/e": "a",
        "adapter/layers/self_attn/q_proj/bias/value": "b_no_decay",
        "adapter/embed_tokens/embedding/a": "embedding",
        "adapter/embed_tokens/embedding/b": "embedding",
        "adapter/embed_tokens/embedding/m": "b",
        "adapter/lm_head/kernel/rows": "a",
        "base/norm/scale": "b",
        "base/lm_head/kernel": "a",
    }


def test_every_group_moves_at_its_own_rate_and_biases_do_not_decay():
    """One step of gradient descent from 1 with gradient 2: rate * (2 + decay)."""
    whole = of_lora(tree())
    on = jax.tree.map(lambda _: True, whole)
    tx = masked(make_optimizer(config(lora_plus_ratio=16.0, weight_decay=0.5), 10, LoRA()), on)
    grads = jax.tree.map(lambda x: 2.0 * x, whole)
    updates, _ = jax.jit(tx.update)(grads, tx.init(whole), whole)
    steps = {path: -float(x.ravel()[0]) for path, x in paths.flatten(updates).items()}
    assert steps == pytest.approx(
        {
            f"adapter/{KERNEL}/a": 0.1 * 2.5,
            f"adapter/{KERNEL}/b": 1.6 * 2.5,
            f"adapter/{KERNEL}/m": 1.6 * 2.5,
            "adapter/layers/self_attn/q_proj/bias/value": 1.6 * 2.0,
            "adapter/embed_tokens/embedding/a": 1e-6 * 2.5,
            "adapter/embed_tokens/embedding/b": 1e-6 * 2.5,
            "adapter/embed_tokens/embedding/m": 1.6 * 2.5,
            "adapter/lm_head/kernel/rows": 0.1 * 2.5,
            "base/norm/scale": 1.6 * 2.5,
            "base/lm_head/kernel": 0.1 * 2.5,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_gradient_of_b_is_projected_as_in_the_paper(scale):
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(2, 6, 3)), rng.normal(size=(2, 3, 4))
    inverse = np.linalg.inv(np.swapaxes(a, -1, -2) @ a + 1e-8 * np.eye(3))
    expected = inverse @ g / scale**2
    args = [jnp.asarray(x, jnp.float32) for x in (g, a)]
    actual = jax.jit(projected)(*args, jnp.full(2, scale))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_projected_step_is_the_nearest_to_full_fine_tuning():
    """With g_B = scale A^T G, scale A times the step is G projected onto the columns of A."""
    rng = np.random.default_rng(1)
    a, g, scale = rng.normal(size=(6, 3)), rng.normal(size=(6, 4)), 0.7
    step = projected(*(jnp.asarray(x, jnp.float32) for x in (scale * a.T @ g, a)), jnp.float32(0.7))
    nearest = a @ np.linalg.lstsq(a, g)[0]
    np.testing.assert_allclose(scale * a @ np.asarray(step), nearest, rtol=1e-4, atol=1e-5)


def test_padding_and_layers_that_are_not_adapted_stay_zero():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(2, 6, 3)).astype(np.float32) * np.float32([[[1, 1, 0]], [[0, 0, 0]]])
    g = rng.normal(size=(2, 3, 4)).astype(np.float32) * np.float32([[[1], [1], [0]], [[0]] * 3])
    step = np.asarray(projected(jnp.asarray(g), jnp.asarray(a), jnp.array([0.5, 0.0])))
    assert np.isfinite(step).all()
    assert not step[0, 2].any()
    assert not step[1].any()
    small = np.linalg.inv(a[0, :, :2].T @ a[0, :, :2]) @ g[0, :2] / 0.25
    np.testing.assert_allclose(step[0, :2], small, rtol=1e-4, atol=1e-5)


def test_lora_fa_freezes_a_keeps_no_moments_of_it_and_trains_b():
    adapter = make_adapter(LoRA(rank=2, alpha=4.0), CONFIG, trained=True)

    def on(tree):
        off = jax.tree.map(lambda _: False, tree["base"])
        every = jax.tree.map(lambda _: True, tree["adapter"])
        return {"base": off, "adapter": without_a(every, KINDS["lora"])}

    tx = masked(make_optimizer(config(name="adamw", lora_fa=True), 10, LoRA()), on)
    state = jp.init_train_state(PARAMS, adapter, tx, jax.random.key(0))
    leaves = paths.flatten(adapter.params)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    size = sum(x.size for path, x in leaves.items() if path.endswith("/b"))
    assert sum(x.size for x in moments) == 2 * size
    step = jp.make_train_step(make_lm_loss(decoder(CONFIG)[0], head_frozen=True), tx)
    state, metrics = step(state, PARAMS, make_batch(2, 8))
    assert int(metrics["skipped"]) == 0
    for path, leaf in paths.flatten(state.adapter.params).items():
        assert bool((leaf == leaves[path]).all()) == path.endswith("/a")


def test_lora_fa_steps_along_the_projected_gradient():
    adapter = make_adapter(LoRA(rank=2, alpha=3.0, targets=("q_proj",)), CONFIG, trained=True)
    whole = {"base": PARAMS, "adapter": adapter.params}
    on = {
        "base": jax.tree.map(lambda _: False, PARAMS),
        "adapter": without_a(jax.tree.map(lambda _: True, adapter.params), KINDS["lora"]),
    }
    noise = draw(adapter.params, seed=7, scale=1.0)
    grads = jax.tree.map(lambda t, x: x if t else None, on, {"base": PARAMS, "adapter": noise})
    tx = masked(make_optimizer(config(lora_fa=True), 10, LoRA()), on)
    updates, _ = jax.jit(tx.update)(grads, tx.init(whole), whole, buffers=adapter.buffers)
    assert paths.get(updates["adapter"], KERNEL)["a"] is None
    a = np.asarray(paths.get(adapter.params, KERNEL)["a"], np.float64)
    g = np.asarray(paths.get(noise, KERNEL)["b"], np.float64)
    expected = -0.1 * np.linalg.inv(np.swapaxes(a, -1, -2) @ a) @ g / 1.5**2
    np.testing.assert_allclose(paths.get(updates["adapter"], KERNEL)["b"], expected, rtol=1e-3)


def test_an_update_without_what_it_needs_says_so():
    tx = make_optimizer(config(lora_fa=True), 10, LoRA())
    with pytest.raises(ValueError, match="needs whole= and buffers="):
        tx.update(tree(), tx.init(tree()), tree())


@pytest.mark.parametrize("name", ["ln_tuning", "full"])
@pytest.mark.parametrize("option", [{"lora_plus_ratio": 4.0}, {"lora_fa": True}])
def test_methods_without_factors_are_refused(name, option):
    adapter = METHODS[name]().init(PARAMS, jax.random.key(0))
    with pytest.raises(jp.UserError, match=rf"optim\.{next(iter(option))}: th(e|is) "):
        check_factors(config(**option), name, adapter.params)


@pytest.mark.parametrize("option", [{"lora_plus_ratio": 4.0}, {"lora_fa": True}])
def test_without_the_method_nobody_knows_its_factors(option):
    with pytest.raises(jp.UserError, match="pass method="):
        make_optimizer(config(**option), 10)


@pytest.mark.parametrize("option", [{}, {"lora_plus_ratio": 4.0}, {"lora_fa": True}])
def test_lora_is_accepted(option):
    check_factors(config(**option), "lora", make_adapter().params)


@pytest.mark.parametrize("ratio", [0.5, float("inf"), float("nan")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(ValueError, match=r"optim\.lora_plus_ratio must be finite and at least 1"):
        config(lora_plus_ratio=ratio)


def test_both_at_once_are_refused():
    with pytest.raises(ValueError, match=r"optim\.lora_fa must be false beside lora_plus_ratio"):
        config(lora_plus_ratio=2.0, lora_fa=True)


def test_without_either_the_optimizer_is_the_plain_one():
    params = {"w": jnp.ones(3)}
    tx, plain = make_optimizer(config(), 10), optax.sgd(0.1, momentum=0.0)
    grads = {"w": jnp.array([1.0, -2.0, 0.5])}
    actual, _ = tx.update(grads, tx.init(params), params)
    expected, _ = plain.update(grads, plain.init(params), params)
    np.testing.assert_allclose(actual["w"], expected["w"], rtol=1e-6)
