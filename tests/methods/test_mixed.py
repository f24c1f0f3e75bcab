"""Mixed batches: each row has its own adapter; expected values come from one row at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, apply, decoder, draw, make_adapter, make_batch
from toy_model import toy_adapter, toy_model

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.inference import decoding
from jaxpeft.methods import binding
from jaxpeft.methods.adapter import Adapter, Label
from jaxpeft.methods.algebra.stacking import stack_adapters
from jaxpeft.methods.binding import bind
from jaxpeft.methods.lora.config import LoRA

ROWS = (1, -1, 0, 2, 1)


def adapters(**changes):
    """Three LoRAs of different rank, scale and targets, with all factors drawn; one is rsLoRA."""
    methods = [
        LoRA(rank=2, alpha=4.0, **changes),
        LoRA(rank=3, alpha=1.0, rslora=True, targets=("q_proj", "down_proj"), **changes),
        LoRA(rank=1, alpha=2.0, targets=(r"model.layers.1.mlp.up_proj", "v_proj"), **changes),
    ]
    made = [make_adapter(method, trained=True) for method in methods]
    moved = [masked_draw(one, seed) for seed, one in enumerate(made)]
    return [one.replace(params=params) for one, params in zip(made, moved, strict=True)]


def masked_draw(adapter, seed):
    """Random factors, zero in layers that are not adapted."""
    drawn = paths.flatten(draw(adapter.params, seed + 10, 0.25))
    for path in drawn:
        rank = paths.get(adapter.buffers, path.rpartition("/")[0] + "/rank")
        drawn[path] = drawn[path] * (rank > 0)[..., None, None]
    return paths.unflatten(drawn)


def run(adapter, index=None, tokens=None, dropout_key=None, remat="none"):
    module, params = decoder(CONFIG, remat)
    tokens = make_batch(len(ROWS), 6)["tokens"] if tokens is None else tokens
    variables = bind(params, adapter, index=index, dropout_key=dropout_key)
    return apply(module, variables, tokens)


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected
    )


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_every_row_of_a_mixed_batch_is_that_of_its_own_adapter(remat):
    several, tokens = adapters(), make_batch(len(ROWS), 6)["tokens"]
    mixed = functools.partial(run, stack_adapters(several), remat=remat)
    mixed = jax.jit(mixed)(jnp.array(ROWS))
    for row, which in enumerate(ROWS):
        one = None if which < 0 else several[which]
        assert_close(mixed[row], run(one, tokens=tokens[row : row + 1])[0])


@pytest.mark.slow
def test_the_gradient_of_a_mixed_batch_is_the_sum_of_its_rows():
    several, batch = adapters(), make_batch(len(ROWS), 6)
    module, base = decoder(remat="full")
    loss_fn = jp.make_lm_loss(module, head_frozen=True)

    def loss(params, adapter, batch):
        return loss_fn(base, adapter.replace(params=params), batch)[0]

    stacked = stack_adapters(several)
    grads = jax.jit(jax.grad(lambda p, b: loss(p, stacked, b)))(
        stacked.params, batch | {"index": jnp.array(ROWS)}
    )
    sums = [jax.tree.map(jnp.zeros_like, one.params) for one in several]
    for row, which in enumerate(ROWS):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        if which >= 0:
            new = jax.grad(loss)(several[which].params, several[which], part)
            sums[which] = jax.tree.map(jnp.add, sums[which], new)
    expected = [one.replace(params=grad) for one, grad in zip(several, sums, strict=True)]
    assert_close(grads, stack_adapters(expected).params, rtol=1e-4)


def test_work_does_not_grow_with_the_number_of_adapters():
    one = adapters()[0]

    def flops(count):
        return jp.count_flops(run, stack_adapters([one] * count), jnp.array(ROWS))

    assert flops(2) == flops(64)
    module, params = decoder()
    tokens = make_batch(len(ROWS), 6)["tokens"]
    assert flops(2) == jp.count_flops(lambda: module.apply(bind(params, one), tokens))


@pytest.mark.slow
def test_rows_of_one_adapter_drop_different_inputs_and_the_rate_is_each_adapters_own():
    rates = (0.0, 0.5)
    one = adapters()[0]
    rated = [one.replace(buffers=with_rate(one, rate)) for rate in rates]
    tokens = jnp.broadcast_to(make_batch(1, 6)["tokens"], (3, 6))
    index = jnp.array([0, 1, 1])
    first, second, third = run(stack_adapters(rated), index, tokens, jax.random.key(0))
    assert_close(first, run(one, tokens=tokens[:1])[0])
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(second - third).max() > 1e-3


def with_rate(adapter, rate):
    leaves = paths.flatten(adapter.buffers)
    changed = {p: jnp.full_like(x, rate) for p, x in leaves.items() if p.endswith("/dropout")}
    return paths.unflatten(leaves | changed)


def test_an_index_outside_the_stack_is_an_error_or_nan_where_it_is_traced():
    stacked = stack_adapters(adapters())
    out = jax.jit(run)(stacked, jnp.array([0, 3, -1, 1, -2]))
    assert [bool(np.isnan(row).any()) for row in out] == [False, True, False, False, True]
    base = toy_model(jax.random.key(0))
    two = stack_adapters([toy_adapter(jax.random.key(i), base) for i in range(2)])
    ids = np.ones((2, 3), np.int32)
    for index in ([0, 2], [0, -2]):
        with pytest.raises(jp.UserError, match=f"index: {index[1]} addresses none of 2 adapters"):
            base(ids, adapter=two, index=index)
    with pytest.raises(jp.UserError, match="one whole number for each of 2 rows"):
        base(ids, adapter=two, index=[0])
    with pytest.raises(jp.UserError, match="there is no adapter"):
        base(ids, index=[0, 0])
    with pytest.raises(jp.UserError, match="2 stacked adapters; pass index="):
        base(ids, adapter=two)
    with pytest.raises(jp.UserError, match="not stacked"):
        base(ids, adapter=toy_adapter(jax.random.key(0), base), index=[0, 0])


@pytest.mark.slow
def test_generation_gives_every_prompt_its_adapter_in_any_order_and_batch():
    base = toy_model(jax.random.key(3))
    several = [toy_adapter(jax.random.key(i), base, rank=i) for i in (1, 2, 3)]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 20, n).tolist() for n in (5, 2, 9, 3, 4)]
    options = {"max_new_tokens": 8}
    stacked = stack_adapters(several)
    alone = [
        decoding.generate_ids(base, [ids], adapter=None if i < 0 else several[i], **options)[0]
        for ids, i in zip(prompts, ROWS, strict=True)
    ]
    for size in (2, 8):
        together = decoding.generate_ids(
            base, prompts, adapter=stacked, index=ROWS, batch_size=size, **options
        )
        assert together == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_a_kind_that_changes_more_than_one_weight_at_a_place_is_refused_by_name():
    module, params = decoder()
    full = jp.init_adapter(jp.Full(), params, jax.random.key(0))
    tokens = make_batch(2, 4)["tokens"]
    with pytest.raises(jp.UserError, match=r"kind 'full' changes .* cannot differ from row to row"):
        module.apply(bind(params, stack_adapters([full, full]), index=jnp.array([0, 1])), tokens)


@pytest.mark.parametrize("several", [False, True])
def test_every_place_is_looked_up_once_and_that_is_checked_and_bound(monkeypatch, several):
    _, params = decoder()
    one = make_adapter(LoRA(rank=2))
    adapter, index = (stack_adapters([one, one]), jnp.array([0, 1])) if several else (one, None)
    made, make_leaf = [], binding.make_leaf

    def counted(tree, adapter, path, key=None):
        made.append(path)
        return make_leaf(tree, adapter, path, key)

    monkeypatch.setattr(binding, "make_leaf", counted)
    bind(params, adapter, index=index)
    assert tuple(made) == one.spec.paths


def test_an_adapter_of_another_model_is_refused_on_top_of_one_that_fits():
    _, params = decoder()
    one = make_adapter(LoRA(rank=2, targets=("q_proj",)))
    (path,) = one.spec.paths
    wide = one.replace(params=jax.tree.map(lambda x: jnp.concatenate([x, x], 1), one.params))
    with pytest.raises(jp.UserError, match=rf"^{path}: the adapter was made for shape .* another"):
        bind(params, [one, wide])


@pytest.mark.slow
def test_soft_prompts_of_a_mixed_batch_stand_in_front_of_their_own_rows():
    from jaxpeft.methods.prompts.prompt import PromptTuning

    base = toy_model(jax.random.key(1))
    made = [jp.init_adapter(PromptTuning(num_tokens=3), base, jax.random.key(i)) for i in range(2)]
    stacked = stack_adapters(made)
    index = (1, -1, 0)
    ids = np.random.default_rng(0).integers(1, 20, (3, 6)).astype(np.int32)
    expected = [
        base(ids[r : r + 1], adapter=made[i] if i >= 0 else None)[0] for r, i in enumerate(index)
    ]
    assert_close(base(ids, adapter=stacked, index=index), jnp.stack(expected), rtol=1e-4)
    segments = np.array([[1, 1, 1, 2, 2, 0]] * 3)
    packed = base(ids, adapter=stacked, index=index, segment_ids=segments)
    for r, i in enumerate(index):
        one = made[i] if i >= 0 else None
        alone = base(ids[r : r + 1], adapter=one, segment_ids=segments[r : r + 1])[0]
        assert_close(packed[r, :5], alone[:5], rtol=1e-4)
    prompts = [row[: 3 + r].tolist() for r, row in enumerate(ids)]
    alone = [
        decoding.generate_ids(base, [p], adapter=made[i] if i >= 0 else None, max_new_tokens=6)[0]
        for p, i in zip(prompts, index, strict=True)
    ]
    assert alone == decoding.generate_ids(
        base, prompts, adapter=stacked, index=index, max_new_tokens=6
    )


def test_switching_adapters_of_other_alpha_dropout_rank_rslora_and_base_never_recompiles():
    import chex

    from jaxpeft.methods.algebra.stacking import pad_rank

    @jax.jit
    @chex.assert_max_traces(n=1)
    def logits(adapter):
        return run(adapter)

    chex.clear_trace_counter()
    methods = [LoRA(rank=2, alpha=4.0), LoRA(rank=3, alpha=9.0, dropout=0.5), LoRA(rank=1)]
    methods.append(LoRA(rank=2, alpha=4.0, rslora=True))
    for name, method in zip("abcd", methods, strict=True):
        one = pad_rank(make_adapter(method, trained=True), 3)
        one = Adapter(one.params, one.buffers, one.spec, Label(name))
        assert_close(logits(one), run(make_adapter(method, trained=True)))
