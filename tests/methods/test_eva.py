"""EVA against NumPy's decompositions in float64, and against the adapters that HF PEFT starts.

The golden folders were made with torch and PEFT by ``scripts/make_golden_eva.py``.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from safetensors.numpy import load_file
from tiny_decoder import CONFIG, decoder, make_batch

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.binding import init_adapter
from jaxpeft.methods.lora import eva
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.lora.principal import Components, update
from jaxpeft.methods.method import Context
from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.adapters import load_adapter
from jaxpeft.pretrained.load import load_params
from jaxpeft.pretrained.model import Model


def principal(x):
    """Mean, components and singular values of rows, and the sum of their squared distances."""
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    _, s, v = np.linalg.svd(x - mean, full_matrices=False)
    return mean, v, s, np.sum((x - mean) ** 2)


def assert_same_rows(actual, expected, atol=1e-4):
    """Unit rows, equal but for their signs."""
    np.testing.assert_allclose(np.abs(np.sum(actual * expected, axis=-1)), 1.0, atol=atol)


def run_updates(batches, masks, k, tau=0.99):
    layers, _, d_in = batches[0].shape
    part = Components.none(layers, k, d_in)
    for x, mask in zip(batches, masks, strict=True):
        on = jnp.ones(layers, bool)
        part = update(part, jnp.asarray(x), jnp.asarray(mask), on, jax.random.key(3), tau)
    return part


def test_batch_by_batch_gives_the_components_of_all_tokens_together():
    """With inputs of rank k nothing is cut off, so the result is exact whatever the batches."""
    rng, k = np.random.default_rng(0), 4
    spread = np.diag([5.0, 3.0, 2.0, 1.0]) @ np.linalg.qr(rng.normal(size=(12, 4)))[0].T
    batches, masks = [], []
    for tokens in (9, 30, 17):
        inside = rng.normal(size=(2, tokens, 4)) + rng.normal(size=(2, 1, 4))
        x = (inside @ spread + 0.7).astype(np.float32)
        mask = rng.random(tokens) < 0.7
        x[:, ~mask] = 100.0
        batches.append(x)
        masks.append(mask)
    part = run_updates(batches, masks, k)
    for layer in range(2):
        seen = np.concatenate([x[layer, m] for x, m in zip(batches, masks, strict=True)])
        mean, v, s, total = principal(seen)
        np.testing.assert_allclose(part.mean[layer], mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(part.s[layer], s[:k], rtol=1e-4)
        np.testing.assert_allclose(part.total[layer], total, rtol=1e-4)
        assert part.count[layer] == len(seen)
        assert_same_rows(part.v[layer], v[:k])
        np.testing.assert_allclose(part.shares()[layer], s[:k] ** 2 / total, rtol=1e-4)


@pytest.mark.parametrize("d_in", [10, 40], ids=["exact", "iterated"])
def test_the_first_components_of_many_are_found(d_in):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 200, d_in)) * 0.8 ** np.arange(d_in) + rng.normal(size=d_in)
    part = run_updates([x.astype(np.float32)], [np.ones(200, bool)], k=5)
    _, v, s, total = principal(x[0])
    np.testing.assert_allclose(part.s[0], s[:5], rtol=1e-3)
    np.testing.assert_allclose(part.total[0], total, rtol=1e-4)
    assert_same_rows(part.v[0], v[:5], atol=1e-3)


def test_a_layer_that_is_not_active_and_a_batch_without_tokens_change_nothing():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 20, 6)), jnp.float32)
    part = run_updates([x], [np.ones(20, bool)], k=3)
    later = functools.partial(update, part, 2 * x, key=jax.random.key(0), tau=0.5)
    half = later(learned=jnp.ones(20, bool), active=jnp.array([True, False]))
    none = later(learned=jnp.zeros(20, bool), active=jnp.ones(2, bool))
    for old, mixed, same in zip(*map(jax.tree.leaves, (part, half, none)), strict=True):
        np.testing.assert_array_equal(mixed[1], old[1])
        np.testing.assert_array_equal(same, old)
    assert half.count[0] == 40


def test_components_are_settled_when_they_stay_where_they_were():
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(1, 400, 4)) * [8.0, 4.0, 2.0, 1.0]).astype(np.float32)
    turned = x[..., [1, 0, 2, 3]] * 5
    every = np.ones(400, bool)
    assert not run_updates([x], [every], k=3).settled.any()
    assert run_updates([x, x], [every] * 2, k=3).settled.all()
    np.testing.assert_array_equal(
        run_updates([x, turned], [every] * 2, k=3).settled[0], [False, False, True]
    )


def test_the_largest_shares_win_and_no_kernel_has_more_than_its_leader():
    shares = {
        "q": np.array([0.5, 0.3, 0.1]),
        "k": np.array([0.5, 0.3, 0.1]),
        "o": np.array([0.6, 0.05, 0.01]),
    }
    shares = {(name, (0,)): value for name, value in shares.items()}
    q, k, o = shares
    leaders = {q: q, k: q, o: o}

    def ranks(budget):
        return tuple(eva.allocate(shares, leaders, budget)[place] for place in (q, k, o))

    assert ranks(1) == (0, 0, 1)
    assert ranks(2) == (1, 0, 1)
    assert ranks(5) == (2, 2, 1)
    assert ranks(6) == (3, 2, 1)
    assert ranks(9) == (3, 3, 3)
    assert eva.allocate(shares, {q: k, k: k, o: o}, 2) == {q: 0, k: 1, o: 1}


# Against PEFT.

METHODS = {
    "all_linear": LoRA(rank=8, alpha=8.0, init_weights="eva"),
    "patterns": LoRA(
        rank=4,
        alpha=6.0,
        rslora=True,
        targets=("k_proj", "v_proj", "down_proj", "lm_head"),
        rank_pattern={"layers.1.self_attn.v_proj": 7},
        alpha_pattern={"down_proj": 5.0},
        init_weights="eva",
        eva_rho=3.0,
        eva_tau=0.98,
    ),
}
"""The settings of ``scripts/make_golden_eva.py``."""


def golden_batches(name):
    """PEFT's batches as the training step takes them: a token is learned if its label is one."""
    arrays = load_file(GOLDEN / "eva" / f"{name}.safetensors")
    names = ("input_ids", "attention_mask", "labels")
    for ids, mask, labels in zip(*map(arrays.get, names), strict=True):
        learned = np.pad(labels[:, 1:] != -100, ((0, 0), (0, 1)))
        yield {
            "tokens": jnp.asarray(ids),
            "targets": jnp.roll(ids, -1, axis=1),
            "weights": jnp.asarray(learned, jnp.float32),
            "segment_ids": jnp.asarray(mask),
            "positions": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
        }


@pytest.mark.parametrize("name", METHODS)
def test_ranks_scales_and_subspaces_are_those_of_peft(name):
    folder = GOLDEN / "eva" / name
    base_name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    params, config, tokenizer, fingerprint = load_params(GOLDEN / "models" / base_name)
    base = Model(params, config, Transformer(config), tokenizer, fingerprint, base_name)
    endless = itertools.cycle(list(golden_batches(name)))  # PEFT goes round until all has settled
    ours = init_adapter(METHODS[name], base, jax.random.key(0), batches=endless)
    theirs = load_adapter(folder, base)
    assert ours.spec.paths == theirs.spec.paths
    assert ours.spec.options == theirs.spec.options
    for path in theirs.spec.paths:
        for number in ("rank", "scale"):
            a, b = (paths.get(one.buffers, f"{path}/{number}") for one in (ours, theirs))
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=path)
        ranks = np.asarray(paths.get(ours.buffers, f"{path}/rank"))
        for at in np.ndindex(ranks.shape):
            a, b = (
                np.asarray(paths.get(one.params, f"{path}/a"))[at][:, : ranks[at]]
                for one in (ours, theirs)
            )
            cosines = np.linalg.svd(a.T @ b, compute_uv=False)
            assert cosines.min() > 0.999, (path, at)
        np.testing.assert_array_equal(paths.get(ours.params, f"{path}/b"), 0)


# The model around it.

BATCHES = [make_batch(4, 16, seed=seed) for seed in range(3)]


def tiny(config=CONFIG):
    module, params = decoder(config)
    return Model(params, config, module, None, "", "tiny")


def test_a_spans_the_inputs_of_learned_tokens():
    """The first layer's attention reads normalised embeddings, which NumPy can compute."""
    batch = BATCHES[0]
    method = LoRA(rank=4, targets=("q_proj",), init_weights="eva", eva_rho=1.0)
    base = tiny()
    adapter = init_adapter(method, base, jax.random.key(0), batches=[batch])
    table, scale = (
        np.asarray(paths.get(base.params, path), np.float64)
        for path in (paths.EMBEDDING, "layers/input_layernorm/scale")
    )
    x = table[np.asarray(batch["tokens"])]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_eps) * scale[0]
    weights = np.asarray(batch["weights"])
    learned = np.concatenate([np.zeros((len(x), 1)), weights[:, :-1]], axis=1) > 0
    _, v, _, _ = principal(x[learned])
    a = np.asarray(paths.get(adapter.params, "layers/self_attn/q_proj/kernel/a"))[0]
    assert_same_rows(a.T, v[:4], atol=1e-3)


@pytest.mark.slow
def test_a_tied_head_reads_the_last_hidden_states_and_the_table_starts_as_ever():
    base, batch = tiny(), BATCHES[0]
    hidden = base.module.apply({"params": base.params}, batch["tokens"], return_hidden=True)
    learned = np.pad(np.asarray(batch["weights"]), ((0, 0), (1, 0)))[:, :-1] > 0
    _, v, _, _ = principal(np.asarray(hidden)[learned])
    method = LoRA(rank=8, targets=("lm_head",), init_weights="eva", eva_rho=1.0)
    adapter = init_adapter(method, base, jax.random.key(0), batches=[batch])
    assert_same_rows(np.asarray(paths.get(adapter.params, f"{paths.HEAD}/a")).T, v[:8], atol=1e-3)

    method = LoRA(rank=3, targets=("embed_tokens", "o_proj"), init_weights="eva")
    started = init_adapter(method, base, jax.random.key(0), batches=BATCHES)
    plain = dataclasses.replace(method, init_weights="default")
    usual = init_adapter(plain, base, jax.random.key(0))
    for name in ("rank", "scale"):
        ours, theirs = (
            paths.get(one.buffers, f"{paths.EMBEDDING}/{name}") for one in (started, usual)
        )
        np.testing.assert_array_equal(ours, theirs)
    tokens = batch["tokens"]
    np.testing.assert_array_equal(base(tokens, adapter=started), base(tokens))


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_leaves_the_function_as_it_is(dora):
    base = tiny()
    method = LoRA(rank=3, init_weights="eva", dora=dora)
    adapter = init_adapter(method, base, jax.random.key(0), batches=BATCHES)
    tokens = BATCHES[0]["tokens"]
    np.testing.assert_array_equal(base(tokens, adapter=adapter), base(tokens))
    ranks = [np.asarray(paths.get(adapter.buffers, f"{p}/rank")) for p in adapter.spec.paths]
    assert sum(map(np.sum, ranks)) == 3 * 2 * 7
    assert max(map(np.max, ranks)) <= adapter.spec.rank == 6


def test_shapes_are_known_without_batches():
    base, method = tiny(), LoRA(rank=3, init_weights="eva", targets=("o_proj", "up_proj"))
    context = Context(config=CONFIG, module=base.module, shapes_only=True)
    described = jax.eval_shape(lambda p: method.init(p, jax.random.key(0), context), base.params)
    started = init_adapter(method, base, jax.random.key(0), batches=BATCHES)
    assert described.spec == started.spec
    assert jax.tree.map(jnp.shape, described) == jax.tree.map(jnp.shape, started)


def test_with_rho_one_ranks_stay_as_they_are():
    method = LoRA(rank=2, init_weights="eva", eva_rho=1.0, targets=("o_proj", "up_proj"))
    adapter = init_adapter(method, tiny(), jax.random.key(0), batches=BATCHES[:1])
    for path in adapter.spec.paths:
        np.testing.assert_array_equal(paths.get(adapter.buffers, f"{path}/rank"), [2, 2])


@pytest.mark.parametrize("fields", [{"eva_rho": 0.5}, {"eva_rho": float("inf")}, {"eva_tau": 1.1}])
def test_settings_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match=f"LoRA.{next(iter(fields))} must be"):
        LoRA(init_weights="eva", **fields)
    assert LoRA(**fields).init_weights == "default"  # looked at only where they are used


def test_what_is_missing_is_said_in_one_line():
    method, base, key = LoRA(rank=2, init_weights="eva"), tiny(), jax.random.key(0)
    silent = [{**batch, "weights": 0 * batch["weights"]} for batch in BATCHES]
    table = LoRA(rank=2, targets=("embed_tokens",), init_weights="eva")
    for call, message in (
        (lambda: init_adapter(table, base, key, batches=BATCHES), "LoRA.targets names none"),
        (lambda: init_adapter(method, base, key), "pass batches, as in init_adapter"),
        (lambda: init_adapter(method, base, key, batches=[]), "batches: none of their tokens"),
        (lambda: init_adapter(method, base, key, batches=silent), "batches: none of their tokens"),
        (lambda: init_adapter(method, base.params, key, batches=BATCHES), "pass the model itself"),
        (
            lambda: init_adapter(method, base, key, batches=[{"tokens": BATCHES[0]["tokens"]}]),
            "batches: expected dicts with tokens, segment_ids, positions, weights",
        ),
        (
            lambda: jax.jit(
                lambda params: init_adapter(
                    method, dataclasses.replace(base, params=params), key, batches=BATCHES
                )
            )(base.params),
            r"outside of jax\.jit",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
