"""Paths and PEFT's target rules, against tables written out by hand."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError

SHAPE = jax.ShapeDtypeStruct((2, 3, 3), jnp.float32)
PARAMS = {
    "embed_tokens": {"embedding": jax.ShapeDtypeStruct((7, 3), jnp.float32)},
    "layers": {
        "self_attn": {
            "q_proj": {"kernel": SHAPE, "bias": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
            "v_proj": {"kernel": SHAPE},
        },
        "mlp": {"down_proj": {"kernel": SHAPE}},
        "input_layernorm": {"scale": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
    },
    "lm_head": {"kernel": jax.ShapeDtypeStruct((3, 7), jnp.float32)},
}
NAMES = paths.module_names(PARAMS)
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
V0, V1 = "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"
D0, D1 = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"

KEYS = st.text(alphabet="abc_0", min_size=1, max_size=3)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        st.integers(),
        lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3),
        max_leaves=8,
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=50)
@given(TREES)
def test_unflatten_undoes_flatten(tree):
    assert paths.unflatten(paths.flatten(tree)) == tree


@settings(deadline=None, max_examples=50)
@given(TREES)
def test_putting_every_leaf_back_gives_the_same_tree_and_leaves_the_original_alone(tree):
    before = repr(tree)
    leaves = paths.flatten(tree)
    assert paths.put(tree, leaves) == tree
    assert paths.put({}, leaves) == tree
    changed = paths.put(tree, {path: ("new", leaf) for path, leaf in leaves.items()})
    assert paths.flatten(changed) == {path: ("new", leaf) for path, leaf in leaves.items()}
    assert repr(tree) == before


def test_get_finds_leaves_and_subtrees_or_gives_the_default():
    tree = {"a": {"b": 1}}
    assert paths.get(tree, "a/b") == 1
    assert paths.get(tree, "a") == {"b": 1}
    assert paths.get(tree, "a/c") is None
    assert paths.get(tree, "a/b/c", "none") == "none"


def test_put_shares_what_it_does_not_touch():
    tree = {"a": {"x": 1}, "b": {"y": 2}}
    assert paths.put(tree, {"a/x": 3})["b"] is tree["b"]


def test_modules_have_hugging_face_names_one_a_layer():
    assert {name: (site.path, site.layer) for name, site in NAMES.items()} == {
        "model.layers.0.self_attn.q_proj": ("layers/self_attn/q_proj/kernel", 0),
        "model.layers.1.self_attn.q_proj": ("layers/self_attn/q_proj/kernel", 1),
        "model.layers.0.self_attn.v_proj": ("layers/self_attn/v_proj/kernel", 0),
        "model.layers.1.self_attn.v_proj": ("layers/self_attn/v_proj/kernel", 1),
        "model.layers.0.mlp.down_proj": ("layers/mlp/down_proj/kernel", 0),
        "model.layers.1.mlp.down_proj": ("layers/mlp/down_proj/kernel", 1),
        "lm_head": ("lm_head/kernel", None),
    }
    assert paths.module_name("embed_tokens/embedding") == "model.embed_tokens"
    assert paths.module_name("norm/scale") == "model.norm"


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", (), {Q0, Q1, V0, V1, D0, D1}),  # the output head is left out
        ("All-Linear", (), {Q0, Q1, V0, V1, D0, D1}),
        (("q_proj", "v_proj"), (), {Q0, Q1, V0, V1}),
        (("self_attn.q_proj",), (), {Q0, Q1}),
        ((Q0,), (), {Q0}),
        (("lm_head", "q_proj"), (), {"lm_head", Q0, Q1}),
        (r".*\.(q|v)_proj", (), {Q0, Q1, V0, V1}),
        (r"model\.layers\.1\..*", (), {Q1, V1, D1}),
        ("all-linear", ("v_proj", "down_proj"), {Q0, Q1}),
        ("all-linear", r".*\.0\..*", {Q1, V1, D1}),
        (("q_proj",), (Q1,), {Q0}),
    ],
)
def test_targets_follow_the_rules_of_peft(targets, exclude, expected):
    assert set(paths.match(targets, exclude, NAMES)) == expected


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        (("q_prj",), (), "q_proj"),  # the nearest name is given
        (("proj",), (), "'proj' matches no linear module"),  # no dotted boundary, no match
        (r"q_proj", (), r"regex for the full name; write [q_proj]."),  # matched in full
        (r"q_proj,v_proj", (), r"regex for the full name; write [q_proj, v_proj]."),
        (r".*q_prj", (), "regex matched against the full name"),
        (r"all_linear", (), "Write all-linear."),
        (("q_proj", "k_proj"), (), "'k_proj'"),  # PEFT is silent about one of several
        (("input_layernorm",), (), "no linear module"),
        ("all-linear", ("kproj",), "exclude pattern 'kproj'"),
        (("q_proj",), ("self_attn.q_proj",), "leave no module"),
        ("(q_proj", (), "not a valid regex"),
        (("",), (), "matches no"),
    ],
)
def test_a_pattern_without_a_match_is_an_error(targets, exclude, message):
    with pytest.raises(UserError) as raised:
        paths.match(targets, exclude, NAMES)
    assert message in str(raised.value)


def test_a_tied_head_is_explained():
    tied = paths.module_names({key: value for key, value in PARAMS.items() if key != "lm_head"})
    with pytest.raises(UserError, match="tied head shares the embedding"):
        paths.match(("lm_head",), (), tied)
