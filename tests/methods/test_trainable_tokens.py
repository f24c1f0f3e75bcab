"""Trained rows of a table and columns of a head against NumPy, their size, and what is refused."""

import dataclasses

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, apply, decoder, draw, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.algebra.stacking import stack_adapters
from jaxpeft.methods.binding import bind
from jaxpeft.methods.leaves.token_rows import TokenHead, TokenTable
from jaxpeft.methods.leaves.trainable_tokens import PEFT, TrainableTokens, read, write
from jaxpeft.methods.merging import head_is_frozen, merge
from jaxpeft.methods.peft.values import Tensors, Values
from jaxpeft.ops.linear import attend, embed, linear, materialize

IDS = (5, 2, 9)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
BOTH = ("embed_tokens", "lm_head")


def make(config=CONFIG, ids=IDS, seed=0, **values):
    """An adapter whose rows moved away from those of the base."""
    adapter = TrainableTokens(token_ids=ids, **values).init(decoder(config)[1], jax.random.key(0))
    moved = jax.tree.map(jnp.add, adapter.params, draw(adapter.params, seed, 0.3))
    return adapter.replace(params=moved)


def table_node(dtype=jnp.float32, rank=1):
    table, rows = draw((np.zeros((12, 4)), np.zeros((3, 4))), seed=1, scale=1.0)
    return TokenTable(table.astype(dtype), rows, jnp.array(IDS), jnp.int32(rank))


def replaced(node):
    table = np.array(node.base, np.float64)
    table[list(IDS)] = np.asarray(node.rows, np.float64)
    return table


def test_a_table_looks_up_and_scores_with_its_rows_replaced():
    node, x = table_node(), draw(np.zeros((2, 5, 4)), seed=2, scale=1.0)
    ids = jnp.array([[0, 5, 2], [9, 11, 5]])
    table = replaced(node)
    np.testing.assert_array_equal(jax.jit(embed)(ids, node), table[np.asarray(ids)])
    np.testing.assert_allclose(jax.jit(attend)(x, node), x @ table.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(materialize(node), table)


def test_a_head_scores_with_its_columns_replaced():
    node, x = table_node(), draw(np.zeros((2, 5, 4)), seed=2, scale=1.0)
    head = TokenHead(node.base.T, node.rows, node.ids, node.rank)
    np.testing.assert_allclose(jax.jit(linear)(x, head), x @ replaced(node).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(materialize(head), replaced(node).T)


def test_rows_are_rounded_to_the_dtype_of_the_table_where_they_are_used():
    node = table_node(jnp.bfloat16)
    rows = np.asarray(node.rows.astype(jnp.bfloat16), np.float32)
    looked = embed(jnp.array(IDS), node)
    assert looked.dtype == jnp.bfloat16
    np.testing.assert_array_equal(looked.astype(jnp.float32), rows)
    x = draw(np.zeros((1, 4)), seed=2, scale=1.0)
    np.testing.assert_allclose(attend(x, node)[0, list(IDS)], rows @ x[0], rtol=1e-5)


def test_a_rank_of_zero_leaves_the_base_also_where_its_ids_repeat():
    node = table_node(rank=0).replace(ids=jnp.zeros(3, jnp.int32))
    ids, x = jnp.arange(12), draw(np.zeros((2, 4)), seed=2, scale=1.0)
    np.testing.assert_array_equal(embed(ids, node), node.base)
    np.testing.assert_array_equal(attend(x, node), attend(x, node.base))
    np.testing.assert_array_equal(materialize(node), node.base)


def test_a_new_adapter_has_the_rows_of_the_base_in_the_order_that_was_asked_for():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder(UNTIED)[1])
    adapter = TrainableTokens(token_ids=IDS, targets=BOTH).init(half, jax.random.key(0))
    for path, rows in (
        (paths.EMBEDDING, paths.get(half, paths.EMBEDDING)[jnp.array(IDS)]),
        (paths.HEAD, paths.get(half, paths.HEAD)[:, jnp.array(IDS)].T),
    ):
        trained = paths.get(adapter.params, f"{path}/rows")
        assert trained.dtype == jnp.float32
        np.testing.assert_array_equal(trained, rows.astype(jnp.float32))


@pytest.mark.parametrize(
    "targets", [("embed_tokens",), ("lm_head",), "(model.embed_tokens|lm_head)"]
)
def test_a_model_with_its_own_head_computes_the_same_bound_and_merged(targets):
    module, params = decoder(UNTIED)
    adapter, tokens = make(UNTIED, tuple(range(40)), targets=targets), make_batch(2, 6)["tokens"]
    bound = apply(module, bind(params, adapter), tokens)
    merged = merge(params, adapter)
    np.testing.assert_allclose(apply(module, bind(merged), tokens), bound, rtol=1e-4, atol=1e-5)
    assert np.abs(bound - apply(module, bind(params), tokens)).max() > 0.1
    embedding = paths.get(merged, paths.EMBEDDING) is not paths.get(params, paths.EMBEDDING)
    assert embedding == (targets != ("lm_head",))


def test_the_step_holds_no_gradient_and_no_copy_of_the_table():
    """Its size is searched for among all values of the step and of the functions it calls."""
    module, params = decoder()
    adapter, batch = make(), make_batch(2, 6)
    loss_fn = jp.make_lm_loss(module, head_frozen=False)

    def loss(rows, batch):
        return loss_fn(params, adapter.replace(params=rows), batch)[0]

    found = set()

    def visit(jaxpr):
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            found.update(variable.aval.shape for variable in equation.outvars)
            for inner in jex_core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(jax.grad(loss))(adapter.params, batch))
    assert (len(IDS), CONFIG.d_model) in found
    side = {CONFIG.vocab_size, CONFIG.d_model}
    assert [shape for shape in found if set(shape[-2:]) == side] == []


def test_the_fused_loss_knows_which_heads_are_trained():
    tied, untied = decoder()[1], decoder(UNTIED)[1]
    assert not head_is_frozen(tied, make())
    assert head_is_frozen(untied, make(UNTIED))
    assert not head_is_frozen(untied, make(UNTIED, targets="lm_head"))


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_rows_of_a_mixed_batch_have_their_own_tokens(config):
    module, params = decoder(config)
    targets = ("embed_tokens",) if config.tie_embeddings else BOTH
    several = [
        make(config, ids, seed, targets=targets) for seed, ids in enumerate([IDS, (7, 1, 4)])
    ]
    tokens, index = make_batch(3, 6, vocab=10)["tokens"], (1, -1, 0)
    stacked = bind(params, stack_adapters(several), index=jnp.array(index))
    mixed = apply(module, stacked, tokens)
    for row, which in enumerate(index):
        one = None if which < 0 else several[which]
        alone = apply(module, bind(params, one), tokens[row : row + 1])[0]
        np.testing.assert_allclose(mixed[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "whole numbers of at least 0, one or more, got"),
        ((3, -1), "whole numbers of at least 0, one or more, got"),
        ((3, True), "whole numbers of at least 0, one or more, got"),
        ((3, 4, 3), "3 is named twice"),
    ],
)
def test_ids_that_cannot_be_tokens_are_refused(ids, message):
    with pytest.raises(ValueError, match=rf"^TrainableTokens\.token_ids.*{message}"):
        TrainableTokens(token_ids=ids)


def test_what_does_not_fit_the_model_is_refused():
    params = decoder()[1]
    with pytest.raises(jp.UserError, match="token id 48 is outside the model's vocabulary of 48"):
        make(ids=(3, 48))
    with pytest.raises(jp.UserError, match=r"'lm_head' matches no embedding table or head .* tied"):
        make(targets="lm_head")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    with pytest.raises(jp.UserError, match="pass parameters, not their shapes"):
        TrainableTokens(token_ids=IDS).init(shapes, jax.random.key(0))
    narrow = decoder(dataclasses.replace(CONFIG, d_model=8))[1]
    with pytest.raises(jp.UserError, match="has rows of 16 numbers, this base has rows of 8"):
        bind(narrow, make())
    with pytest.raises(jp.UserError, match="2 stacked adapters; pass index="):
        bind(params, stack_adapters([make(), make()]))
    with pytest.raises(jp.UserError, match="has no factor"):
        bind(params, make(), weights=[0.5])


# HF PEFT's files beside the golden ones.


def base_of(config):
    return jp.Model(decoder(config)[1], config, decoder(config)[0], None, "", "base")


def saved(config=CONFIG, changes=None, **values):
    """Settings and tensors as they are written, with changes."""
    settings, tensors = write(make(config, **values), base_of(config))
    tensors |= changes or {}
    shapes = {key: value.shape for key, value in tensors.items()}
    return settings, Tensors("t", shapes, dict.fromkeys(shapes, "F32"), tensors.__getitem__)


def read_back(settings, tensors, config=CONFIG):
    return read(Values(settings, "c", PEFT.defaults), tensors, base_of(config))


def test_the_head_of_a_tied_model_must_have_the_rows_of_its_table():
    head = "base_model.model.lm_head.trainable_tokens_delta"
    settings, tensors = saved(changes={head: np.zeros((3, 16), np.float32)})
    with pytest.raises(jp.UserError, match="lm_head has other rows than the embedding table"):
        read_back(settings, tensors)
    settings, tensors = saved()
    both = read_back(settings | {"target_modules": [*BOTH]}, tensors)
    assert both.spec.paths == (paths.EMBEDDING,)
    with pytest.raises(jp.UserError, match="tokens of a tied head alone are not supported"):
        read_back(settings | {"target_modules": ["lm_head"]}, tensors)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 1, 2], "token_indices: 1 is named twice"),
        ([-1, 2, 3], "token_indices must be whole numbers of at least 0"),
        ([1, 2, 99], "token_indices: token id 99 is outside"),
        (None, "token_indices must be whole numbers of at least 0"),
        ([1, "2"], "token_indices: expected a whole number or a list of them"),
        ([1, 2], r"delta is \[3, 16\], expected \[2, 16\]"),
    ],
)
def test_a_folder_with_ids_that_cannot_be_is_refused(ids, message):
    settings, tensors = saved()
    with pytest.raises(jp.UserError, match=message):
        read_back(settings | {"token_indices": ids}, tensors)


def test_a_head_of_its_own_is_read_only_if_it_is_a_target():
    settings, tensors = saved(UNTIED, targets=BOTH)
    assert read_back(settings, tensors, UNTIED).spec.paths == (paths.EMBEDDING, paths.HEAD)
    with pytest.raises(jp.UserError, match=r"1 unexpected tensors: .*lm_head"):
        read_back(settings | {"target_modules": None}, tensors, UNTIED)
