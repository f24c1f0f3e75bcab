"""LoRA on the embedding table, on tied heads, and with trained tokens: the nodes, the laws, errors.

What PEFT computes is in ``tests/methods/test_golden_methods.py``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, apply, decoder, draw, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.algebra.stacking import pad_rank, stack_adapters
from jaxpeft.methods.binding import bind
from jaxpeft.methods.leaves.trainable_tokens import TrainableTokens
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.lora.table import DoRATable, LoRATable
from jaxpeft.methods.merging import head_is_frozen, merge
from jaxpeft.methods.prompts.prompt import PromptTuning
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import attend, embed, materialize

UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
EMBED, HEAD = "embed_tokens", "lm_head"
models = pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])


@functools.cache
def make(config=CONFIG, seed=0, **values):
    """A LoRA with all arrays moved."""
    method = LoRA(**{"rank": 2, "alpha": 3.0, "targets": (EMBED, HEAD, "q_proj")} | values)
    adapter = method.init(decoder(config)[1], jax.random.key(seed))
    return moved(adapter, seed)


def moved(adapter, seed):
    shift = draw(adapter.params, seed + 5, 0.15)
    params = jax.tree.map(lambda x, y: jax.device_put(np.add(x, y)), adapter.params, shift)
    return adapter.replace(params=params)


def logits(adapter, config=CONFIG, params=None, tokens=None, **options):
    module, base = decoder(config)
    params = base if params is None else params
    tokens = make_batch(3, 6)["tokens"] if tokens is None else tokens
    return apply(module, bind(params, adapter, **options), tokens)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


def arrays(dtype=jnp.float32):
    table, a, b, m = draw(
        (np.zeros((12, 4)), np.zeros((12, 2)), np.zeros((2, 4)), np.zeros(4)), 1, 1.0
    )
    return table.astype(dtype), a, b, jnp.abs(m) + 1


def wide(*values):
    return (np.asarray(v.astype(jnp.float32), np.float64) for v in values)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_table_looks_up_the_sum_rounded_once_and_attends_its_base(dtype):
    table, a, b, _ = arrays(dtype)
    node, ids = LoRATable(table, a, b, jnp.float32(0.7)), jnp.array([[3, 0], [11, 3]])
    base, a, b = wide(table, a, b)
    dense = base + np.float32(0.7) * a @ b
    looked = jax.jit(embed)(ids, node)
    assert looked.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(
        np.asarray(looked, np.float64), dense[np.asarray(ids)], rtol=tolerance, atol=1e-5
    )
    np.testing.assert_allclose(
        np.asarray(materialize(node), np.float64), dense, rtol=tolerance, atol=1e-5
    )
    x = draw(np.zeros((2, 4)), 2, 1.0)
    np.testing.assert_array_equal(attend(x, node), attend(x, table))


def test_dora_gives_every_column_of_the_table_its_magnitude():
    table, a, b, m = arrays()
    norm = jnp.linalg.norm(table, axis=0)
    node = DoRATable(table, a, b, jnp.float32(0.7), m=m, norm=norm, rank=jnp.int32(2))
    base, a, b, m = wide(table, a, b, m)
    dense = base + np.float32(0.7) * a @ b
    dense *= m / np.linalg.norm(dense, axis=0)
    ids = jnp.arange(12)
    np.testing.assert_allclose(jax.jit(embed)(ids, node), dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(materialize(node), dense, rtol=1e-4, atol=1e-5)


def test_virtual_tokens_behind_the_table_get_nothing_of_its_factors():
    params = decoder()[1]
    prompt = PromptTuning(num_tokens=2).init(params, jax.random.key(0))
    for dora in (False, True):
        table = make(targets=(EMBED,), dora=dora)
        ids = jnp.array([[CONFIG.vocab_size, CONFIG.vocab_size + 1, 3]])
        one, other = (
            embed(ids, paths.get(bind(params, both)["params"], paths.EMBEDDING))
            for both in ([prompt, table], [table, prompt])
        )
        np.testing.assert_array_equal(one, other)
        rows = paths.get(prompt.params, f"{paths.EMBEDDING}/prompt")
        np.testing.assert_array_equal(one[0, :2], rows)
    whole = LoRA(targets=("q_proj",), save_modules=(EMBED,)).init(params, jax.random.key(0))
    bind(params, [whole, prompt])
    with pytest.raises(jp.UserError, match=r"replaces this weight.*put this one first"):
        bind(params, [prompt, whole])


@models
@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing_and_its_table_starts_as_in_peft(config, dora):
    method = LoRA(rank=4, targets=(EMBED, HEAD), dora=dora)
    adapter = method.init(decoder(config)[1], jax.random.key(0))
    assert adapter.spec.paths == (paths.EMBEDDING, paths.HEAD)
    close(logits(adapter, config), logits(None, config))
    table = paths.get(adapter.params, paths.EMBEDDING)
    assert not table["a"].any()
    assert table["a"].shape == (CONFIG.vocab_size, 4)
    assert 0.7 < float(table["b"].std()) < 1.3
    assert paths.get(adapter.params, f"{paths.HEAD}/a").shape == (CONFIG.d_model, 4)


@models
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"targets": (EMBED,)},
        {"targets": (HEAD,)},
        {"dora": True},
        {"targets": "(model.embed_tokens|lm_head)", "rslora": True},
        {"targets": ("q_proj",), "token_ids": tuple(range(30))},
        {"targets": (HEAD, "v_proj"), "token_ids": tuple(range(30))},
        {"targets": ("q_proj",), "head_token_ids": (1, 5)},
        {"targets": (HEAD,), "init_weights": "pissa"},
    ],
    ids=str,
)
def test_merged_equals_bound(config, values):
    adapter = make(config, **values)
    bound = logits(adapter, config)
    assert np.abs(bound - logits(None, config)).max() > 1e-2
    merged = merge(decoder(config)[1], adapter)
    close(logits(None, config, merged), bound, atol=1e-4)


def test_in_a_tied_model_the_head_is_the_base_unless_it_is_adapted_itself():
    params = decoder()[1]
    hidden = draw(np.zeros((1, 2, CONFIG.d_model)), 3, 1.0)
    table, head = make(targets=(EMBED,)), make(targets=(HEAD,))
    base = paths.get(params, paths.EMBEDDING)
    only_table = bind(params, table)["params"]
    assert paths.get(only_table, paths.HEAD) is None
    np.testing.assert_array_equal(
        attend(hidden, paths.get(only_table, paths.EMBEDDING)), attend(hidden, base)
    )
    only_head = bind(params, head)["params"]
    assert paths.get(only_head, paths.EMBEDDING) is base
    merged = merge(params, head)
    assert paths.get(merged, paths.EMBEDDING) is base
    assert paths.get(merged, paths.HEAD).shape == (CONFIG.d_model, CONFIG.vocab_size)


def test_the_fused_loss_knows_which_heads_are_trained():
    tied, untied = decoder()[1], decoder(UNTIED)[1]
    assert head_is_frozen(tied, make(targets=(EMBED,)))
    assert head_is_frozen(tied, make(targets=(EMBED,), dora=True))
    assert not head_is_frozen(tied, make(targets=(HEAD,)))
    assert not head_is_frozen(tied, make())
    assert not head_is_frozen(tied, make(targets=("q_proj",), token_ids=(3,)))
    assert head_is_frozen(untied, make(UNTIED, targets=(EMBED,)))
    assert head_is_frozen(untied, make(UNTIED, targets=("q_proj",), token_ids=(3,)))
    assert not head_is_frozen(untied, make(UNTIED, targets=("q_proj",), head_token_ids=(3,)))


def test_the_loss_of_a_frozen_head_has_the_gradients_of_the_plain_one():
    module, params = decoder()
    adapter, batch = make(targets=(EMBED, "q_proj")), make_batch(3, 6)

    def grads(frozen):
        loss_fn = jp.make_lm_loss(module, head_frozen=frozen)
        loss = lambda p: loss_fn(params, adapter.replace(params=p), batch)[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(adapter.params)

    jax.tree.map(close, grads(True), grads(False))


@pytest.mark.slow
@models
def test_rows_of_a_mixed_batch_have_their_own_table_and_head(config):
    several = [make(config), make(config, 1, rank=3, targets=(EMBED,)), make(config, 2)]
    tokens, index = make_batch(5, 5)["tokens"], (1, -1, 0, 2, 1)
    mixed = logits(stack_adapters(several), config, tokens=tokens, index=jnp.array(index))
    for row, which in enumerate(index):
        one = None if which < 0 else several[which]
        close(mixed[row], logits(one, config, tokens=tokens[row : row + 1])[0])


def test_a_tied_head_over_rows_that_differ_is_refused():
    one = make(targets=(HEAD,), token_ids=(3, 4))
    with pytest.raises(jp.UserError, match="changes lm_head/kernel already"):
        logits(stack_adapters([one, one]), index=jnp.array([0, 1, -1]))


def test_sums_weights_padding_and_conversion_hold_for_tables():
    one, other = make(), make(seed=1, rank=3, targets=(EMBED, "v_proj"))
    both = logits([one, other], weights=[0.5, -2.0])
    close(logits(jp.combine([one, other], [0.5, -2.0])), both)
    close(logits(pad_rank(one, 5)), logits(one))
    params = decoder()[1]
    close(logits(jp.to_lora(one, params, rank=2)[0]), logits(one), atol=1e-4)
    plain = jp.to_lora(make(targets=(HEAD, EMBED), dora=True), params, energy=1.0)[0]
    close(logits(plain), logits(make(targets=(HEAD, EMBED), dora=True)), atol=1e-3)


def test_tokens_are_no_sum():
    adapter, params = make(targets=("q_proj",), token_ids=(3,)), decoder()[1]
    with pytest.raises(
        jp.UserError, match="trained biases or tokens, or saved modules has no factor"
    ):
        bind(params, adapter, weights=[0.5])
    with pytest.raises(jp.UserError, match="a LoRA with ids, rows"):
        jp.combine([adapter], [1.0])
    with pytest.raises(jp.UserError, match="changes what is no kernel"):
        jp.to_lora(adapter, params, rank=2)


@models
def test_the_config_is_rebuilt(config):
    for values in (
        {"rank": 3, "dora": True},
        {"targets": ("v_proj",), "token_ids": (7, 3), **({} if config is CONFIG else HEAD_IDS)},
    ):
        adapter = make(config, **values)
        again = KINDS["lora"].config_of(adapter)
        rebuilt = again.init(decoder(config)[1], jax.random.key(0))
        assert rebuilt.spec == adapter.spec
        jax.tree.map(close, rebuilt.buffers, adapter.buffers)
        for field in ("token_ids", "head_token_ids"):
            assert getattr(again, field) == values.get(field, ())


HEAD_IDS = {"head_token_ids": (5,)}


def test_merging_tokens_of_the_table_behind_its_lookups_is_refused():
    params, table = decoder()[1], make(targets=(EMBED,))
    tokens = moved(TrainableTokens(token_ids=(1, 5)).init(params, jax.random.key(0)), 3)
    close(logits(None, params=merge(params, [tokens, table])), logits([tokens, table]))
    for put in (bind, merge):
        with pytest.raises(jp.UserError, match=r"replaces this weight.*put this one first"):
            put(params, [table, tokens])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token_ids": (3,)}, r"LoRA\.token_ids: model\.embed_tokens is adapted or saved whole"),
        (
            {"targets": (HEAD,), "head_token_ids": (3,)},
            r"LoRA\.head_token_ids: lm_head is adapted or saved whole",
        ),
        (
            {"targets": ("q_proj",), "token_ids": (3,), "head_token_ids": (3,)},
            r"LoRA\.head_token_ids: this model's head is its embedding table",
        ),
        (
            {"targets": ("q_proj",), "token_ids": (3,), "save_modules": (HEAD,)},
            r"LoRA\.token_ids: this model's head is its embedding table and would see",
        ),
        ({"targets": ("q_proj",), "token_ids": (48,)}, r"LoRA\.token_ids: token id 48 is outside"),
        ({"init_weights": "pissa"}, r"LoRA\.init_weights 'pissa' is for linear modules alone"),
        (
            {"rank": 17, "targets": (EMBED,)},
            r"LoRA\.rank 17 exceeds the smaller side of embed_tokens/embedding",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(jp.UserError, match=message):
        make(**values)


def test_a_bias_of_b_is_refused_on_the_table():
    with pytest.raises(jp.UserError, match=r"LoRA\.lora_bias is for linear modules alone"):
        make(lora_bias=True)


@pytest.mark.parametrize("field", ["token_ids", "head_token_ids"])
def test_ids_that_cannot_be_tokens_are_refused(field):
    with pytest.raises(ValueError, match=rf"LoRA\.{field}: 3 is named twice"):
        LoRA(**{field: (3, 3)})
