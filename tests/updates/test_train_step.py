"""What frozen means, each with a test that fails otherwise; accumulation; bad steps."""

import dataclasses
import functools
import hashlib
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounding import UNIT, most_roundings
from tiny_decoder import CONFIG, decoder, make_adapter, make_batch

from jaxpeft.core import paths
from jaxpeft.core.flops import count_flops
from jaxpeft.methods.adapter import Label
from jaxpeft.methods.binding import bind, init_adapter
from jaxpeft.methods.leaves.full import Full
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.models.config import ModelConfig
from jaxpeft.models.transformer import Transformer
from jaxpeft.updates.losses import make_lm_loss
from jaxpeft.updates.optimizers import MaskedTransformation, masked
from jaxpeft.updates.step import adapter_only, check_masked, init_train_state, make_train_step

SMOLLM2_135M = ModelConfig(
    model_type="llama",
    vocab_size=49152,
    d_model=576,
    d_ff=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    tie_embeddings=True,
)
UNIQUE = dataclasses.replace(
    CONFIG, vocab_size=52, d_model=20, d_ff=28, num_heads=4, num_kv_heads=1, head_dim=6
)
MODULE, PARAMS = decoder()
FEW = LoRA(rank=2, targets=("v_proj", "down_proj"))
BATCH = make_batch(6, 9)
LOSS = make_lm_loss(MODULE, head_frozen=True)


def start(tx, adapter=None, trainable=adapter_only, loss=LOSS, **options):
    """A fresh state and a compiled step."""
    tx = masked(tx, trainable)
    state = init_train_state(PARAMS, adapter or make_adapter(FEW), tx, jax.random.key(5))
    return state, make_train_step(loss, tx, **options)


@functools.cache
def adam_step():
    tx = masked(optax.adamw(0.01), adapter_only)
    return tx, make_train_step(LOSS, tx)


def start_adam():
    tx, step = adam_step()
    return init_train_state(PARAMS, make_adapter(), tx, jax.random.key(5)), step


def host(tree):
    """A copy that survives donation; keys as their numbers."""

    def copy(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(copy, tree)


def digest(tree):
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def abstract_step(config, method, remat, batch):
    """A step of `method` and the shapes of its arguments; nothing is computed."""
    module = Transformer(config, jnp.float32, remat)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    adapter = jax.eval_shape(functools.partial(init_adapter, method), params, jax.random.key(0))
    tx = masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), adapter_only)
    state = jax.eval_shape(
        lambda p, a: init_train_state(p, a, tx, jax.random.key(0)), params, adapter
    )
    loss = make_lm_loss(module, head_frozen=isinstance(method, LoRA))
    return make_train_step(loss, tx), (state, params, batch)


def shapes_of_batch(rows, seq):
    return jax.eval_shape(lambda: make_batch(rows, seq))


@pytest.mark.parametrize(("remat", "most"), [("none", 0.72), ("full", 0.78)])
def test_a_lora_step_costs_at_most_this_share_of_a_full_step(remat, most):
    batch = shapes_of_batch(8, 512)
    lora, full = (
        count_flops(step, *arguments)
        for step, arguments in (
            abstract_step(SMOLLM2_135M, method, remat, batch) for method in (LoRA(rank=8), Full())
        )
    )
    assert lora / full <= most


def weight_gradients(method):
    """Kernels for which the compiled step has a product of their shape, either way around."""
    step, arguments = abstract_step(UNIQUE, method, "none", shapes_of_batch(5, 11))
    text = step.lower(*arguments).compile().as_text()
    products = {
        tuple(sorted(int(n) for n in dims.split(",") if int(n) > 1))
        for dims in re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)
    }
    assert products
    kernels = {
        path: tuple(sorted(leaf.shape[-2:]))
        for path, leaf in paths.flatten(arguments[1]).items()
        if path.endswith(("kernel", "embedding"))
    }
    return {path for path, shape in kernels.items() if shape in products}, set(kernels)


def test_the_compiled_step_has_no_full_size_weight_gradient():
    assert weight_gradients(LoRA(rank=2))[0] == set()
    found, kernels = weight_gradients(Full())
    assert found == kernels


def test_the_optimizer_is_called_with_base_and_adapter_and_no_gradient_of_the_base():
    seen = []
    inner = masked(optax.adamw(0.01), adapter_only)

    def update(grads, state, params=None, **extra):
        seen.append((grads, params))
        return inner.update(grads, state, params, **extra)

    tx = MaskedTransformation(inner.init, update)
    tx.labels = inner.labels
    state = init_train_state(PARAMS, make_adapter(), tx, jax.random.key(0))
    make_train_step(LOSS, tx).lower(state, PARAMS, BATCH)
    ((grads, tree),) = seen
    assert set(tree) == set(grads) == {"base", "adapter"}
    assert jax.tree.leaves(grads["base"]) == []
    assert paths.flatten(tree["base"]).keys() == paths.flatten(PARAMS).keys()
    assert jax.tree.structure(grads["adapter"]) == jax.tree.structure(make_adapter().params)


def test_only_the_adapter_has_optimizer_state():
    state, _ = start_adam()
    size = sum(leaf.size for leaf in jax.tree.leaves(make_adapter().params))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * size


def test_relabelling_one_norm_trains_exactly_it():
    def trainable(tree):
        labels = adapter_only(tree)
        return {**labels, "base": paths.put(labels["base"], {"norm/scale": True})}

    state, step = start(optax.adamw(0.01, weight_decay=0.0), trainable=trainable)
    moments = {
        jax.tree_util.keystr(path, simple=True, separator="/").partition("base/")[2]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if leaf.ndim
    }
    assert moments == {"norm/scale", ""}  # "": those of the adapter
    state, _ = step(state, PARAMS, BATCH)
    after, before = paths.flatten(state.base(PARAMS)), paths.flatten(PARAMS)
    assert {path for path in before if (after[path] != before[path]).any()} == {"norm/scale"}
    # The first step of Adam moves everything by the learning rate.
    moved = np.abs(after["norm/scale"] - before["norm/scale"])
    np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


def test_a_trained_leaf_of_a_bfloat16_base_moves_by_less_than_bfloat16_can_tell():
    def trainable(tree):
        labels = adapter_only(tree)
        return {**labels, "base": paths.put(labels["base"], {"norm/scale": True})}

    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tx = masked(optax.adamw(1e-4, weight_decay=0.0), trainable)
    state = init_train_state(half, make_adapter(), tx, jax.random.key(0))
    state, _ = make_train_step(LOSS, tx)(state, half, BATCH)
    moved = np.abs(
        np.asarray(paths.get(state.base(half), "norm/scale"), np.float64)
        - np.asarray(half["norm"]["scale"], np.float64)
    )
    np.testing.assert_allclose(moved, 1e-4, rtol=1e-2)  # bfloat16 steps by 4e-3 below 1
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)


def test_a_frozen_leaf_of_the_adapter_stays():
    def trainable(tree):
        on = {path: path.endswith("/b") for path in paths.flatten(tree["adapter"])}
        return {**adapter_only(tree), "adapter": paths.unflatten(on)}

    state, step = start(optax.sgd(0.1), trainable=trainable)
    state, _ = step(state, PARAMS, BATCH)
    before = paths.flatten(make_adapter(FEW).params)
    for path, leaf in paths.flatten(state.adapter.params).items():
        assert (leaf == before[path]).all() == path.endswith("/a")


def test_one_step_keeps_the_names_of_each_adapter_that_it_trains():
    _, step = start_adam()
    for names in (("org/one", "v1", '{"stop_ids": [7]}'), ("org/two", "", "")):
        labels = dict(zip(("base_name", "base_revision", "chat"), map(Label, names), strict=True))
        adapter = dataclasses.replace(make_adapter(), **labels)
        state = init_train_state(PARAMS, adapter, adam_step()[0], jax.random.key(5))
        state, _ = step(state, PARAMS, BATCH)
        trained = state.adapter
        assert (str(trained.base_name), str(trained.base_revision), str(trained.chat)) == names
        assert jax.tree.structure(trained) == jax.tree.structure(adapter)


def test_names_are_no_leaves_of_the_state():
    state, _ = start_adam()
    named = state.replace(base_name="org/one", base_revision="v1", chat="{}")
    assert jax.tree.leaves(named) == jax.tree.leaves(state)


def test_the_base_is_bit_identical_after_training():
    before = digest(PARAMS)
    state, step = start_adam()
    start_digest = digest(state.adapter.params)
    for _ in range(3):
        state, _ = step(state, PARAMS, BATCH)
    assert digest(PARAMS) == before
    assert digest(state.adapter.params) != start_digest


def test_the_loss_of_the_first_step_is_exactly_that_of_the_base():
    state, step = start_adam()
    _, metrics = step(state, PARAMS, BATCH)
    total, aux = jax.jit(LOSS)(PARAMS, None, BATCH)
    assert float(metrics["loss"]) == float(total * (1.0 / aux["weight"]))


def test_every_leaf_and_layer_has_a_gradient_by_the_second_step():
    state, step = start_adam()
    state, _ = step(state, PARAMS, BATCH)

    def total(factors):
        return LOSS(PARAMS, state.adapter.replace(params=factors), BATCH)[0]

    for path, slope in paths.flatten(jax.jit(jax.grad(total))(state.adapter.params)).items():
        assert (np.abs(slope).max(axis=(1, 2)) > 0).all(), path


def gradients_of_tokens(adapter):
    """The loss of every supervised token and its gradient, in float64, and the token's row."""
    with jax.enable_x64(True):
        wide, adapter = (
            jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, tree)
            for tree in (PARAMS, adapter)
        )
        module = Transformer(CONFIG, jnp.float64)
        rows, slots = np.nonzero(np.asarray(BATCH["weights"]))

        def losses(factors):
            logits = module.apply(
                bind(wide, adapter.replace(params=factors)),
                BATCH["tokens"],
                segment_ids=BATCH["segment_ids"],
                positions=BATCH["positions"],
            )
            likely = jax.nn.log_softmax(logits)[rows, slots]
            return -likely[jnp.arange(len(rows)), BATCH["targets"][rows, slots]]

        found = jax.jit(lambda x: (losses(x), jax.jacrev(losses)(x)))(adapter.params)
        return *jax.device_get(found), rows


def test_accumulation_of_uneven_parts_equals_the_whole_batch():
    """Both are as near to float64 as ``n * u * sum |terms|`` allows; even parts are not."""
    adapter, count = make_adapter(FEW, trained=True), 3
    losses, slopes, rows = gradients_of_tokens(adapter)
    unit = most_roundings(CONFIG, 9, len(rows), FEW.rank) * UNIT
    exact = jax.tree.map(lambda g: g.mean(axis=0), slopes)
    # Of an array as a whole: rounding in the layers mixes its entries.
    bounds = jax.tree.map(lambda g: unit * np.abs(g).mean(axis=0).max(), slopes)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(exact)))
    spread = np.sqrt(
        sum(g.size * e**2 for g, e in zip(*map(jax.tree.leaves, (exact, bounds)), strict=True))
    )
    for parts in (1, count):
        state, step = start(optax.sgd(1.0), adapter, microbatches=parts)
        after, metrics = step(state, PARAMS, BATCH)
        metrics = {name: float(value) for name, value in metrics.items()}
        assert metrics["weight"] == len(rows)
        assert abs(metrics["loss"] - losses.mean()) <= unit * losses.mean()
        assert abs(metrics["grad_norm"] - norm) <= spread + unit * norm

        def compare(new, old, gradient, bound):
            moved = np.asarray(old, np.float64) - np.asarray(new, np.float64)
            rounded = UNIT * np.abs(new)  # of the parameter itself
            assert (np.abs(moved - gradient) <= bound + rounded).all()

        jax.tree.map(compare, after.adapter.params, adapter.params, exact, bounds)

    part_of = rows % count
    even = jax.tree.map(
        lambda g: np.mean([g[part_of == part].mean(axis=0) for part in range(count)], axis=0),
        slopes,
    )
    for wrong, right, bound in zip(*map(jax.tree.leaves, (even, exact, bounds)), strict=True):
        assert np.abs(wrong - right).max() > 20 * bound


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    state, step = start_adam()
    state, _ = step(state, PARAMS, BATCH)
    before = host(state)
    broken = {**BATCH, "weights": BATCH["weights"].at[0, 5].set(jnp.inf)}
    for times in (1, 2):
        state, metrics = step(state, PARAMS, broken)
        assert not np.isfinite(metrics["loss"])
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == times
    after = host(state)
    counters = {"step": 3, "skipped": 2, "skipped_in_a_row": 2}
    assert {name: int(getattr(after, name)) for name in counters} == counters
    same = {name: getattr(before, name) for name in counters}
    jax.tree.map(np.testing.assert_array_equal, after.replace(**same), before)
    state, metrics = step(state, PARAMS, BATCH)
    assert int(state.skipped) == 2
    assert int(state.skipped_in_a_row) == 0
    assert np.isfinite(metrics["loss"])
    assert digest(state.adapter.params) != digest(before.adapter.params)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is():
    def loss(params, adapter, batch, key):
        del params, key
        leaf = jax.tree.leaves(adapter.params)[0]
        return jnp.sqrt(jnp.square(leaf * batch).sum())  # its slope at zero is NaN

    state, step = start(optax.sgd(0.1), loss=loss)
    before = digest(state.adapter.params)
    state, metrics = step(state, PARAMS, jnp.zeros(()))
    assert float(metrics["loss"]) == 0.0
    assert int(metrics["skipped"]) == 1
    assert digest(state.adapter.params) == before


def test_a_loss_of_ones_own_trains_as_optax_alone_would():
    def loss(params, adapter, batch, key):
        del key
        return jnp.square(MODULE.apply(bind(params, adapter), batch)).mean()

    ids, adapter, tx = BATCH["tokens"], make_adapter(FEW, trained=True), optax.adam(0.01)
    state, step = start(tx, adapter, loss=loss)
    params, moments = adapter.params, tx.init(adapter.params)
    value = jax.jit(
        jax.value_and_grad(lambda p: loss(PARAMS, adapter.replace(params=p), ids, None))
    )
    for _ in range(2):
        expected, slopes = value(params)
        updates, moments = tx.update(slopes, moments, params)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, PARAMS, ids)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
        state.adapter.params,
        params,
    )


def test_sums_beside_the_loss_are_reported_and_the_weight_is_optional():
    def loss(params, adapter, batch, key):
        del params, key
        return jnp.square(jax.tree.leaves(adapter.params)[0]).sum(), {"rows": batch.sum()}

    state, step = start(optax.sgd(0.1), loss=loss, microbatches=3)
    square = np.square(jax.tree.leaves(make_adapter(FEW).params)[0]).sum()
    _, metrics = step(state, PARAMS, jnp.ones((6,)))
    assert float(metrics["rows"]) == 6
    assert float(metrics["weight"]) == 3
    np.testing.assert_allclose(metrics["loss"], square, rtol=1e-6)


def test_the_state_is_donated_and_nothing_else():
    adapter = make_adapter()
    old, step = start_adam()
    new, _ = step(old, PARAMS, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.trained, old.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((PARAMS, adapter, new, BATCH)))


def test_neither_steps_nor_other_numbers_of_a_method_compile_again():
    loss = make_lm_loss(MODULE, head_frozen=True, dropout=True)
    chex.clear_trace_counter()
    tx = masked(optax.adamw(0.01), adapter_only)
    step = make_train_step(chex.assert_max_traces(loss, n=1), tx)
    losses = set()
    for alpha, dropout in ((4.0, 0.0), (8.0, 0.0), (8.0, 0.3)):
        method = dataclasses.replace(FEW, alpha=alpha, dropout=dropout)
        adapter = make_adapter(method, trained=True)
        state = init_train_state(PARAMS, adapter, tx, jax.random.key(0))
        for _ in range(2):
            state, metrics = step(state, PARAMS, BATCH)
        losses.add(float(metrics["loss"]))
    assert len(losses) == 3


def test_dropout_is_a_function_of_the_seed_and_the_step():
    loss = make_lm_loss(MODULE, head_frozen=True, dropout=True)
    adapter = make_adapter(dataclasses.replace(FEW, dropout=0.5), trained=True)
    tx = masked(optax.sgd(0.0), adapter_only)
    step = make_train_step(loss, tx)

    def losses(seed):
        state = init_train_state(PARAMS, adapter, tx, jax.random.key(seed))
        found = []
        for _ in range(2):
            state, metrics = step(state, PARAMS, BATCH)
            found.append(float(metrics["loss"]))
        return found

    first = losses(0)
    assert first == losses(0)
    assert len({*first, *losses(1)}) == 4


def test_full_fine_tuning_is_the_same_step():
    tx = masked(optax.sgd(0.1), adapter_only)
    adapter = init_adapter(Full(), PARAMS, jax.random.key(0))
    loss = make_lm_loss(MODULE, head_frozen=False)
    # The base may lack what the method replaces.
    state = init_train_state({}, adapter, tx, jax.random.key(0))
    state, metrics = make_train_step(loss, tx)(state, {}, BATCH)

    def plain(params):
        logits = MODULE.apply({"params": params}, BATCH["tokens"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["targets"][..., None], -1)
        return -(chosen[..., 0] * BATCH["weights"]).sum() / BATCH["weights"].sum()

    value, slopes = jax.jit(jax.value_and_grad(plain))(PARAMS)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for path, leaf in paths.flatten(PARAMS).items():
        expected = leaf - 0.1 * paths.get(slopes, path)
        actual = paths.get(state.adapter.params, path)["value"]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_an_optimizer_that_does_not_know_what_is_trained_is_refused():
    """With the way out; under the tests' type checker the two callers refuse it first."""
    plain: Any = optax.adamw(1e-3)
    with pytest.raises(TypeError, match=r"wrap it, as in jaxpeft\.masked"):
        check_masked(plain)
    with pytest.raises(TypeError, match=r"[Mm]asked"):
        make_train_step(LOSS, plain)
    with pytest.raises(TypeError, match=r"[Mm]asked"):
        init_train_state(PARAMS, make_adapter(FEW), plain, jax.random.key(0))
