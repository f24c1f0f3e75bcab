"""Every method on models that are not ours: Linen, NNX and plain functions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_models import (
    BY_MODEL,
    METHODS,
    MODELS,
    PROMPTS,
    ROLES,
    Stacked,
    bound,
    drawn,
    every_model,
    moved,
    start,
)

import jaxpeft as jp
from jaxpeft.lifting.trees import named_leaves, with_leaves

every_change = pytest.mark.parametrize(
    ("model", "name"),
    [(model, name) for model, names in BY_MODEL.items() for name in names if name not in PROMPTS],
)


def run(model, adapter):
    function, params, _, inputs = MODELS[model]
    apply = jp.lift(function)
    return jax.jit(lambda a, p, *i: apply(bound(model, p, a), *i))(adapter, params, *inputs)


def plain(model, params):
    function, _, variables, inputs = MODELS[model]
    return jax.jit(function)(variables(params), *inputs)


def assert_close(actual, expected, what=""):
    """Within 1e-5 of the largest value."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale, err_msg=what)


@functools.cache
def base_of(model):
    """What the model gives without an adapter."""
    return plain(model, MODELS[model][1])


def slopes(model, adapter, how):
    """What the lifted or the merged model gives, and the gradient of a loss of it."""
    function, params, variables, inputs = MODELS[model]

    def loss(tree):
        one = adapter.replace(params=tree)
        if how == "merged":
            y = function(variables(jp.merge(params, one)), *inputs)
        else:
            y = jp.lift(function)(bound(model, params, one), *inputs)
        return jnp.square(y).sum(), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(adapter.params)
    return y, named_leaves(gradient)


@every_change
def test_a_new_adapter_changes_nothing_and_a_moved_one_is_its_merged_weights(model, name):
    """Outputs and the gradients of every array."""
    new = start(model, name)
    # PiSSA's start is taken out of the kernels and added again; factors of one and sums with zero
    # are exact, but XLA may join them with their neighbours and round once less.
    exact = name in ("lora", "rslora of some", "adalora", "bitfit", "table", "convolutions")
    tol = 0 if exact else 1e-5 if name == "pissa" else 1e-6
    np.testing.assert_allclose(run(model, new), base_of(model), rtol=0, atol=tol)
    adapter = moved(new)
    (lifted, ours), (merged, theirs) = (slopes(model, adapter, how) for how in ("lifted", "merged"))
    assert_close(lifted, merged)
    assert np.abs(lifted - base_of(model)).max() > 1e-2
    for path, gradient in ours.items():
        assert np.abs(gradient).max() > 0 or np.abs(theirs[path]).max() == 0, path
        assert_close(gradient, theirs[path], path)


@pytest.mark.parametrize(
    ("model", "name"), [*((model, "lora") for model in MODELS), ("linen", "full")]
)
def test_merged_weights_are_a_tree_of_the_kind_that_was_given(model, name):
    params = MODELS[model][1]
    merged = jp.merge(params, moved(start(model, name)))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for path, leaf in named_leaves(merged).items():
        assert leaf.shape == named_leaves(params)[path].shape


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((model, "lora") for model in MODELS),
        ("vision", "convolutions"),
        ("pixels", "convolutions"),
    ],
)
def test_the_merged_change_is_the_scaled_product_in_float64(model, name):
    """A and B flatten the kernel's own axes in their order; A keeps a convolution's window."""
    params, adapter = MODELS[model][1], moved(start(model, name))
    before, after = named_leaves(params), named_leaves(jp.merge(params, adapter))
    for path in adapter.spec.paths:
        place, buffers = adapter.params, adapter.buffers
        for key in path.split("/"):
            place, buffers = place[key], buffers[key]
        a, b, scale = (
            np.asarray(x, np.float64) for x in (place["a"], place["b"], buffers["scale"])
        )
        axes = ROLES[model][path].axes
        order = (*axes.stack, *axes.ins, *axes.outs)
        change = scale[..., None, None] * (a @ b)
        change = change.reshape([before[path].shape[axis] for axis in order])
        change = change.transpose(np.argsort(order))
        actual = np.asarray(after[path], np.float64) - np.asarray(before[path], np.float64)
        np.testing.assert_allclose(actual, change, rtol=1e-5, atol=1e-6)
    wanted = "kernel" if name == "lora" else "convolution"
    paths = [path for path, row in sorted(ROLES[model].items()) if row.role == wanted]
    assert adapter.spec.paths == tuple(paths)


@every_model
def test_two_adapters_add_up_and_vmap_runs_several(model):
    params = MODELS[model][1]
    first, second = moved(start(model, "lora")), moved(start(model, "lora"), 0.2)
    function, _, _, inputs = MODELS[model]
    both = jax.jit(lambda p: jp.lift(function)(bound(model, p, [first, second]), *inputs))(params)
    merged = jp.merge(jp.merge(params, first), second)
    assert_close(both, plain(model, merged))
    halves = bound(model, params, [first, first], weights=[0.5, 0.5])
    np.testing.assert_allclose(
        jax.jit(jp.lift(function))(halves, *inputs), run(model, first), rtol=1e-5, atol=1e-5
    )
    stacked = jax.tree.map(lambda *x: jnp.stack(x), first, second)
    several = jax.jit(jax.vmap(lambda a: jp.lift(function)(bound(model, params, a), *inputs)))(
        stacked
    )
    for one, adapter in zip(several, (first, second), strict=True):
        assert_close(one, run(model, adapter))


@every_model
def test_rows_of_a_batch_have_adapters_of_their_own(model):
    function, params, _, inputs = MODELS[model]
    several = [moved(start(model, "lora")), moved(start(model, "lora"), 0.2)]
    rows = len(inputs[-1])
    index = jnp.arange(rows) % 3 - 1
    stacked = jp.stack_adapters(several)
    axes = [None] * (len(inputs) - 1) + [0]
    lifted = jp.lift(function, rows=axes)
    mixed = jax.jit(lambda p: lifted(bound(model, p, stacked, index=index), *inputs))
    alone = [plain(model, params), *(run(model, one) for one in several)]
    for row, out in enumerate(mixed(params)):
        assert_close(out, alone[int(index[row]) + 1][row])


def test_whole_variables_of_linen_are_bound_as_they_are_given():
    function, params, variables, inputs = MODELS["linen"]
    adapter = moved(start("linen", "lora"))
    whole = jp.bind(variables(params), adapter)
    np.testing.assert_array_equal(jp.lift(function)(whole, *inputs), run("linen", adapter))
    merged = jp.merge(variables(params), adapter)
    assert merged.keys() == {"params"}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("model", ["linen", "tables"])
def test_virtual_tokens_are_rows_behind_the_table(model, name):
    """They equal a model whose table is that much longer, and nothing else of it changes."""
    function, params, variables, (ids,) = MODELS[model]
    adapter = moved(start(model, name), 1.0)
    (path,) = adapter.spec.paths
    vocab, width = named_leaves(params)[path].shape
    rows = jp.lift(lambda tree, ids: named_leaves(tree)[path][ids])(
        bound(model, params, adapter), vocab + jnp.arange(2)
    )
    assert rows.shape == (2, width)
    assert np.abs(rows).max() > 1e-2
    longer = jnp.concatenate([named_leaves(params)[path], rows])
    batch = np.concatenate([np.full((2, 2), vocab) + np.arange(2), ids], axis=1)
    lifted = jax.jit(lambda a: jp.lift(function)(bound(model, params, a), batch))(adapter)
    function = Stacked(vocab + 2).apply if model == "linen" else function
    theirs = function(variables(with_leaves(params, {path: longer})), batch)
    assert_close(lifted, theirs[..., :vocab])


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ("linen", jp.LoRA(rank=2, layers=(1,)), "LoRA.layers: is for models of jaxpeft; name lay"),
        ("linen", jp.LoRA(rank=2, head_token_ids=(1,)), "TrainableTokens, whose targets name it"),
        ("linen", jp.LoRA(rank=2, init_weights="eva"), "'eva': is for models of jaxpeft"),
        ("linen", jp.PrefixTuning(num_tokens=2), "take prompt_tuning"),
        ("linen", jp.PromptTuning(initial="text", text="a"), 'choose initial "sampled"'),
        ("linen", jp.LoRA(targets=("lm_head",)), "matches no linear module"),
        ("linen", jp.LoRA(targets="layers/*/missing"), "matches no linear module"),
        ("linen", jp.LoRA(targets=lambda row: False), "the predicate holds for no linear module"),
        ("linen", jp.LoRA(rank=2, targets=("Embed_0",)), "pass tied=True to init_adapter"),
        ("linen", jp.TrainableTokens(token_ids=(1,)), "pass tied=True to init_adapter"),
        ("linen", jp.TrainableTokens(token_ids=(11,)), "token id 11 is outside the model's vocab"),
        ("tables", jp.PromptTuning(num_tokens=2), "several tables, Embed_0/embedding, places/emb"),
        ("tables", jp.TrainableTokens(token_ids=(1,)), "pass the one whose rows stand for tokens"),
        ("nnx", jp.PromptTuning(num_tokens=2), "looks up no rows of a table"),
        ("unrolled", jp.LNTuning(), "this model has no norm"),
        ("tables", jp.BitFit(), "bitfit trains biases, and this model has none"),
        ("tables", jp.LoRA(bias="all"), "this model has no biases"),
    ],
)
def test_what_has_no_meaning_is_one_line(model, method, message):
    with pytest.raises(jp.UserError) as caught:
        jp.init_adapter(method, MODELS[model][1], jax.random.key(0), roles=ROLES[model])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tied": True}, "no table that is also a kernel is adapted"),
        ({"embedding": "Embed"}, "'Embed' is no table of this model; tables: Embed_0/embedding"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    method = jp.LoRA(rank=2, targets="all-linear")
    with pytest.raises(jp.UserError, match=message):
        jp.init_adapter(
            method, MODELS["linen"][1], jax.random.key(0), roles=ROLES["linen"], **options
        )


@pytest.mark.parametrize("model", MODELS)
def test_trees_of_other_models_need_roles(model):
    params = MODELS[model][1]
    with pytest.raises(jp.UserError, match="is not guessed; pass roles="):
        jp.init_adapter(jp.LoRA(rank=2), params, jax.random.key(0))


def test_kernels_of_another_rank_are_not_those_of_our_models():
    kernel = jnp.ones((2, 4, 2, 2))
    params = {"layers": {"self_attn": {"q_proj": {"kernel": kernel}}}}
    with pytest.raises(jp.UserError, match="is not guessed; pass roles="):
        jp.init_adapter(jp.LoRA(rank=2), params, jax.random.key(0))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("query", "Dense_1"), "query/kernel|Dense_1/kernel"),
        (r".*\.(query|value)", "(query|value)/kernel"),
        ("layers/*/kernel", "layers/Dense_./kernel"),
        ("layers/**/kernel", "kernel"),
        (("**/out/kernel", "key"), "(out|key)/kernel"),
        (lambda row: row.shape[-1] == 12, "Dense_0/kernel"),
    ],
)
def test_targets_are_names_patterns_of_paths_or_a_predicate(targets, expected):
    roles = ROLES["linen"]
    method = jp.LoRA(rank=2, targets=targets)
    adapter = jp.init_adapter(method, MODELS["linen"][1], jax.random.key(0), roles=roles)
    kernels = [path for path, row in roles.items() if row.is_linear]
    wanted = [path for path in sorted(kernels) if re.search(f"({expected})$", path)]
    assert wanted
    assert adapter.spec.paths == tuple(wanted)


def test_roles_of_another_tree_are_refused():
    method = jp.LoRA(rank=2, targets="all-linear")
    with pytest.raises(jp.UserError, match="not in both the parameters and the roles"):
        jp.init_adapter(method, MODELS["linen"][1], jax.random.key(0), roles=ROLES["scanned"])


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3 of one", "dropped"])
def test_rows_may_lie_on_any_axis_and_need_not_be_told_from_the_others_by_size(name):
    """Time comes first here, and is as long as the batch."""

    def function(params, x, scale):
        step = lambda h, x: (jnp.tanh(x @ params["w"] + h @ params["u"]), None)  # noqa: E731
        return (scale * jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)[0])[None]

    params, x = {"w": drawn(8)(4, 4), "u": drawn(9)(4, 4)}, drawn(10)(3, 3, 4)
    roles = jp.describe(function, params, x, 1.0)
    others = {
        "ia3 of one": jp.IA3(targets="all-linear", feedforward=("u",)),
        "dropped": jp.LoRA(rank=2, dropout=0.5),
    }
    method = others.get(name) or METHODS[name]
    several = [
        moved(jp.init_adapter(method, params, jax.random.key(3), roles=roles), scale)
        for scale in (0.1, 0.2)
    ]
    stacked, index = jp.stack_adapters(several), np.array([1, -1, 0])
    key = jax.random.key(5) if name == "dropped" else None
    apply = jp.lift(function, rows=(1, None))
    mixed = apply(jp.bind(params, stacked, index=index, dropout_key=key)["params"], x, 1.0)
    assert mixed.shape == (1, 3, 4)
    for row, one in enumerate(index):
        tree = jp.bind(params, None if one < 0 else several[one])["params"]
        alone = jp.lift(function)(tree, x[:, row : row + 1], 1.0)
        same = np.allclose(mixed[:, row], alone[:, 0], rtol=1e-5, atol=1e-5)
        assert same == (name != "dropped" or one < 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"lift: .*: every row of the batch has an adapter of its own; say which axis"),
        (1, r"an input of shape \(3, 8\) has no 3 rows on axis 1"),
        ((None,), "no input has rows"),
        ((0, 0), "2 axes for 1 inputs"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message):
    function, params, _, inputs = MODELS["unrolled"]
    stacked = jp.stack_adapters([start("unrolled", "lora")] * 2)
    tree = bound("unrolled", params, stacked, index=np.zeros(3, np.int32))
    with pytest.raises(jp.UserError, match=message):
        jp.lift(function, rows=rows)(tree, *inputs)
