"""Mixed batches of every method: logits, gradients and answers are those of one row at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, WINDOWED, decoder, draw, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.inference.decoding import generate_ids
from jaxpeft.methods.binding import bind
from jaxpeft.methods.method import Context
from jaxpeft.methods.mixed import check_index
from jaxpeft.methods.registry import METHODS
from jaxpeft.pretrained.model import Model

ROWS = (1, -1, 0, 1)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0]] * len(ROWS), np.int32)
LORA = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "layers.1.mlp.down_proj")}
SOFT = {"num_tokens": 3}
MIXED = {
    "dora": METHODS["lora"](**LORA, dora=True),
    "pissa": METHODS["lora"](**LORA, init_weights="pissa"),
    "adalora": METHODS["adalora"](**LORA),
    "vera": METHODS["vera"](rank=3, targets=LORA["targets"]),
    "oft": METHODS["oft"](block_size=4, targets=LORA["targets"]),
    "loha": METHODS["loha"](**LORA),
    "lokr": METHODS["lokr"](**LORA),
    "ia3": METHODS["ia3"](targets=("v_proj", "layers.1.mlp.down_proj")),
    "trainable_tokens": METHODS["trainable_tokens"](token_ids=(3, 5, 7)),
    "prompt_tuning": METHODS["prompt_tuning"](**SOFT),
    "p_tuning": METHODS["p_tuning"](**SOFT, hidden_size=8),
    "multitask": METHODS["multitask_prompt_tuning"](**SOFT, num_tasks=2, rank=2),
    "prefix_tuning": METHODS["prefix_tuning"](**SOFT),
    "projected prefix": METHODS["prefix_tuning"](**SOFT, projection=True, hidden_size=6),
}
REFUSED = ("full", "ln_tuning")
LONG = ("lokr", "loha", "dora")
every_method = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in MIXED]
)


def model():
    module, params = decoder()
    return Model(params, CONFIG, module, name="tiny")


@functools.cache
def several(name):
    """Two adapters with all arrays drawn, zero in layers that are not adapted."""
    module, params = decoder()
    context = Context(config=CONFIG, module=module)
    init = jax.jit(lambda params, key: MIXED[name].init(params, key, context))
    return [moved(init(params, jax.random.key(seed)), seed) for seed in (1, 2)]


def moved(adapter, seed):
    leaves = paths.flatten(adapter.params)
    noise = paths.flatten(draw(adapter.params, seed, 0.2))
    for path, leaf in leaves.items():
        rank = paths.get(adapter.buffers, path.rpartition("/")[0] + "/rank")
        on = np.ones(()) if rank is None else np.asarray(rank) > 0
        on = on.reshape(on.shape + (1,) * (leaf.ndim - on.ndim))
        leaves[path] = jnp.asarray(np.asarray(leaf) + np.asarray(noise[path]) * on, jnp.float32)
    return adapter.replace(params=paths.unflatten(leaves))


def batch_of(adapter, rows, index):
    """Packed rows as the module takes them, with virtual tokens where a row has an adapter."""
    tokens = np.asarray(make_batch(len(ROWS), 6)["tokens"])[rows]
    prompted = jp.with_prompt(adapter, tokens, SEGMENTS[rows], index=index)
    return {
        "ids": prompted.input_ids,
        "given": {"segment_ids": prompted.segment_ids, "positions": prompted.positions},
        "places": prompted.places,
        "index": None if index is None else jnp.array(index),
        "slopes": jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, 48), "f"))[rows],
    }


@jax.jit
def run(adapter, batch):
    """Logits of the tokens themselves, and the gradient of a weighted sum of them."""
    module, base = decoder()
    real = (batch["places"][..., None] >= 0) & (jnp.asarray(SEGMENTS[:1]) > 0)[..., None]

    def weigh(params):
        one = None if adapter is None else adapter.replace(params=params)
        variables = bind(base, one, index=batch["index"])
        logits = module.apply(variables, batch["ids"], **batch["given"])
        logits = jnp.take_along_axis(logits, batch["places"][..., None], axis=1)
        logits = jnp.where(real, logits, 0.0)
        return (logits * batch["slopes"]).sum(), logits

    params = {} if adapter is None else adapter.params
    (_, logits), grads = jax.value_and_grad(weigh, has_aux=True)(params)
    return logits, grads


def assert_close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-4, atol=5e-5), actual, expected
    )


@every_method
def test_logits_and_gradients_are_those_of_every_row_with_its_own_adapter(name):
    stacked = jp.stack_adapters(several(name))
    mixed, grads = run(stacked, batch_of(stacked, slice(None), ROWS))
    sums = [jax.tree.map(np.zeros_like, one.params) for one in several(name)]
    for row, which in enumerate(ROWS):
        one = None if which < 0 else several(name)[which]
        alone, new = run(one, batch_of(one, slice(row, row + 1), None))
        assert_close(mixed[row], alone[0])
        if one is not None:
            sums[which] = jax.tree.map(np.add, sums[which], new)
    bare, _ = run(None, batch_of(None, slice(0, 1), None))
    assert np.abs(mixed[0] - bare[0]).max() > 1e-2
    expected = [one.replace(params=g) for one, g in zip(several(name), sums, strict=True)]
    assert_close(grads, jp.stack_adapters(expected).params)


def test_a_model_gives_prefixes_to_rows_and_answers_prompts_with_them():
    base, (first, second) = model(), several("prefix_tuning")
    stacked, index = jp.stack_adapters([first, second]), (1, -1, 0)
    prompts = [[5, 6, 7], [9], [3, 4, 3, 4, 8]]
    together = generate_ids(base, prompts, adapter=stacked, index=index, max_new_tokens=5)
    for ids, one, answer in zip(prompts, (second, None, first), together, strict=True):
        assert answer == generate_ids(base, [ids], adapter=one, max_new_tokens=5)[0]
        if one is not None:
            assert answer != generate_ids(base, [ids], max_new_tokens=5)[0]
    variables = bind(base.params, stacked, index=jnp.array(index))
    with pytest.raises(jp.UserError, match="index: 3 adapters for a batch of 2 rows"):
        base.module.apply(variables, jnp.ones((2, 4), jnp.int32))


@pytest.mark.slow
def test_a_row_without_an_adapter_keeps_the_positions_and_windows_of_the_base():
    """A window counts from the tokens: a hidden prefix must not move them."""
    module, params = decoder(WINDOWED)
    tokens = make_batch(2, 9)["tokens"]
    stacked = jp.stack_adapters(several("prefix_tuning"))
    mixed = module.apply(bind(params, stacked, index=jnp.array([-1, 1])), tokens)
    assert_close(mixed[:1], module.apply({"params": params}, tokens[:1]))


@pytest.mark.parametrize("name", ["dora", "vera", "p_tuning", "projected prefix"])
def test_the_work_does_not_grow_with_the_adapters_stored(name):
    module, params = decoder()
    one = several(name)[0]
    ids = jp.with_prompt(one, make_batch(2, 6)["tokens"])

    def flops(count):
        stacked = jp.stack_adapters([one] * count)
        run = lambda s, i: module.apply(bind(params, s, index=i), ids)  # noqa: E731
        return jp.count_flops(run, stacked, jnp.array([0, 1]))

    assert flops(2) == flops(16)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_differ_from_row_to_row_is_refused_in_one_line(name):
    base = model()
    one = jp.init_adapter(METHODS[name](), base.params, jax.random.key(0))
    with pytest.raises(jp.UserError, match=r"cannot differ from row to row; run one batch") as e:
        bind(base.params, jp.stack_adapters([one, one]), index=jnp.array([0, 1]))
    assert "\n" not in str(e.value)


@every_method
def test_stacked_adapters_need_an_index_and_a_single_one_takes_none(name):
    with pytest.raises(jp.UserError, match="2 stacked adapters; pass index="):
        bind(model().params, jp.stack_adapters(several(name)))
    with pytest.raises(jp.UserError, match="not stacked; use"):
        check_index(several(name)[0], [0, 0], 2)
    assert check_index(jp.stack_adapters(several(name)), [1, -1], 2).tolist() == [1, -1]
