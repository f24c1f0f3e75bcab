"""Padding, stacking, combining and converting adapters, against float64 NumPy."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, apply, decoder, draw, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.adapter import Label
from jaxpeft.methods.algebra.stacking import pad_rank
from jaxpeft.methods.binding import bind
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.merging import merge
from jaxpeft.methods.registry import METHODS

MODES = ("cat", "linear", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def lora(seed=0, **fields):
    """A LoRA with both factors drawn, zero where a layer is not adapted."""
    method = LoRA(**{"rank": 2, "alpha": 4.0, **fields})
    adapter = jp.init_adapter(method, decoder()[1], jax.random.key(0))
    drawn = paths.flatten(draw(adapter.params, seed, 0.3))
    for path in drawn:
        on = paths.get(adapter.buffers, path.rpartition("/")[0] + "/rank") > 0
        drawn[path] = drawn[path] * on[..., None, None]
    return adapter.replace(params=paths.unflatten(drawn))


def deltas(adapter):
    """The change of every kernel in float64, spelled out."""
    found = {}
    for path in adapter.spec.paths:
        a, b = (np.asarray(paths.get(adapter.params, f"{path}/{k}"), np.float64) for k in "ab")
        scale = np.asarray(paths.get(adapter.buffers, f"{path}/scale"), np.float64)
        found[path] = scale[:, None, None] * (a @ b)
    return found


def several():
    return [
        lora(1),
        lora(2, rank=3, alpha=1.0, rslora=True, targets=("q_proj", "up_proj")),
        lora(3, rank=1, targets=(r"model.layers.1.self_attn.q_proj",)),
    ]


def options(how):
    given = {"density": 1.0} if how.endswith(("prune", "ties")) or how.startswith("dare") else {}
    return given | ({"key": jax.random.key(0)} if how.startswith("dare") else {})


def assert_same(actual, expected, atol=1e-6):
    assert set(actual) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, atol=atol, err_msg=path)


def weighted_sum(adapters, weights):
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in deltas(adapter).items():
            total[path] = total.get(path, 0.0) + weight * delta
    return total


@pytest.mark.parametrize("how", MODES)
def test_one_adapter_of_weight_one_stays_what_it_is(how):
    for one in (lora(1), lora(2, rank=3, rslora=True, targets=("q_proj",))):
        made = jp.combine([one], [1.0], how, **options(how))
        assert_same(deltas(made), deltas(one))
        if how in ("cat", "linear"):
            jax.tree.map(np.testing.assert_array_equal, made.params, one.params)
            for path, value in paths.flatten(one.buffers).items():
                if not path.endswith("/rslora"):  # it is a plain one with the same scale
                    np.testing.assert_array_equal(paths.get(made.buffers, path), value)


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_cat_and_linear_are_exactly_the_weighted_sum_of_the_changes(how):
    weights = (0.7, -1.5, 2.0)
    made = jp.combine(several(), weights, how)
    assert_same(deltas(made), weighted_sum(several(), weights))
    assert made.spec.rank == 6


def test_svd_keeps_the_best_matrices_of_its_rank_or_energy():
    adapters, weights = several(), (0.7, -1.5, 2.0)
    total = weighted_sum(adapters, weights)
    made = deltas(jp.combine(adapters, weights, "svd", rank=2))
    for path, value in total.items():
        for layer, exact in enumerate(value):
            u, s, vt = np.linalg.svd(exact)
            best = (u[:, :2] * s[:2]) @ vt[:2]
            np.testing.assert_allclose(made[path][layer], best, atol=1e-5)
    close = deltas(jp.combine(adapters, weights, "svd", energy=0.9))
    for path, value in total.items():
        for exact, kept in zip(value, close[path], strict=True):
            assert np.sum(kept**2) >= 0.9 * np.sum(exact**2) * (1 - 1e-6)
    assert_same(deltas(jp.combine(adapters, weights, "svd", energy=1.0)), total, atol=1e-5)


@pytest.mark.parametrize("how", ["magnitude_prune", "ties"])
def test_pruning_follows_its_formula_in_plain_loops(how):
    adapters, weights = [lora(1), lora(2), lora(4)], (1.0, 0.5, 2.0)
    made = deltas(jp.combine(adapters, weights, how, density=0.25, rank=16))
    each = [deltas(one) for one in adapters]
    for path in made:
        for layer in range(CONFIG.num_layers):
            pruned = []
            for delta in each:
                flat = delta[path][layer].copy()
                limit = np.sort(np.abs(flat).ravel())[-int(0.25 * flat.size)]
                flat[np.abs(flat) < limit] = 0.0
                pruned.append(flat)
            expected = np.zeros_like(pruned[0])
            for at in np.ndindex(*expected.shape):
                values = [(w, p[at]) for w, p in zip(weights, pruned, strict=True) if p[at]]
                if how == "ties":
                    sign = 1.0 if sum(v for _, v in values) >= 0 else -1.0
                    values = [(w, v) for w, v in values if np.sign(v) == sign]
                divisor = max(1, len(values)) if how == "ties" else 1
                expected[at] = sum(w * v for w, v in values) / divisor
            np.testing.assert_allclose(made[path][layer], expected, atol=1e-5)


def test_dare_keeps_or_doubles_every_entry_at_half_density():
    one = lora(1)
    made = deltas(
        jp.combine([one], [1.0], "dare_linear", density=0.5, rank=16, key=jax.random.key(3))
    )
    kept = []
    for path, delta in deltas(one).items():
        ratio = made[path] / delta
        assert np.all(np.isclose(ratio, 0, atol=1e-2) | np.isclose(ratio, 2, atol=1e-2))
        kept.append((ratio > 1).mean())
    assert 0.4 < np.mean(kept) < 0.6


@pytest.mark.parametrize(("how", "weights"), [("dare_linear", (0.5, -2.0)), ("dare_ties", (1.5,))])
def test_dare_is_on_average_what_it_is_without_dropping(how, weights):
    """E[mask / density] = 1; with ties where one adapter alone elects the sign."""
    path, runs, targets = "layers/self_attn/q_proj/kernel", 100, ("q_proj",)
    adapters = [lora(seed, targets=targets) for seed in range(len(weights))]
    total = 0.0
    for seed in range(runs):
        key = jax.random.key(seed)
        made = jp.combine(adapters, weights, how, density=0.5, rank=16, key=key)
        total = total + deltas(made)[path] / runs
    # An entry kept or dropped at half density has the variance of its square.
    parts = [w * deltas(one)[path] for one, w in zip(adapters, weights, strict=True)]
    deviation = np.sqrt(sum(part**2 for part in parts) / runs)
    z = (total - weighted_sum(adapters, weights)[path]) / np.maximum(deviation, 1e-6)
    assert np.abs(z).max() < 5
    assert 0.8 < np.sqrt(np.mean(z**2)) < 1.2


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_of_density_one_drops_nothing(how):
    adapters, weights = [lora(1), lora(2), lora(4)], (1.0, 0.5, 2.0)
    same = {"dare_linear": "svd", "dare_ties": "ties"}[how]
    given = {"density": 1.0} if same == "ties" else {}
    made = jp.combine(adapters, weights, how, density=1.0, rank=16, key=jax.random.key(0))
    assert_same(deltas(made), deltas(jp.combine(adapters, weights, same, rank=16, **given)), 1e-5)


def test_dora_is_refused_with_the_way_out():
    base = decoder()[1]
    dora = jp.init_adapter(LoRA(rank=2, dora=True), base, jax.random.key(0))
    with pytest.raises(
        jp.UserError, match=r"adapters\[1\]: .*a LoRA with m.*convert it by to_lora"
    ):
        jp.combine([lora(1), dora], [1.0, 1.0])


def test_what_is_no_sum_of_products_is_refused_by_name():
    base = decoder()[1]
    full = jp.init_adapter(jp.Full(), base, jax.random.key(0))
    with pytest.raises(jp.UserError, match="kind 'full' is no LoRA"):
        jp.combine([lora(), full], [1.0, 1.0])
    for given, message in (
        ({"how": "mean"}, "'mean' is not one of cat, linear"),
        ({"how": "cat", "rank": 2}, "takes no rank"),
        ({"how": "ties"}, "needs density"),
        ({"how": "svd", "density": 0.5}, "takes no density"),
        ({"how": "dare_linear", "density": 0.5}, "needs key"),
        ({"how": "svd", "rank": 2, "energy": 0.5}, "give one of them"),
    ):
        with pytest.raises(jp.UserError, match=message):
            jp.combine([lora()], [1.0], **given)


def test_a_combined_adapter_is_saved_and_loaded_as_peft_does(tmp_path):
    from toy_model import toy_adapter, toy_model

    base = toy_model(jax.random.key(0))
    made = jp.combine([toy_adapter(jax.random.key(i), base, rank=i) for i in (1, 2)], [1.0, 0.5])
    jp.save_adapter(str(tmp_path / "out"), made, base)
    loaded = jp.load_adapter(str(tmp_path / "out"), base)
    assert_same(deltas(loaded), deltas(made))


def test_to_lora_of_full_fine_tuning_of_kernels_reports_its_error():
    base = decoder()[1]
    full = jp.init_adapter(jp.Full(), base, jax.random.key(0))
    with pytest.raises(jp.UserError, match="no kernel"):
        jp.to_lora(full.replace(params=jax.tree.map(lambda x: x + 0.1, full.params)), base, rank=2)
    with pytest.raises(jp.UserError, match="needs rank= or energy="):
        jp.to_lora(full, base)
    kernels = {p: x for p, x in paths.flatten(full.params).items() if p.endswith("kernel/value")}
    moved = draw(kernels, 7, 0.1)
    changed = paths.put(full.params, {p: kernels[p] + moved[p] for p in kernels})
    one, errors = jp.to_lora(full.replace(params=changed), base, rank=4)
    made = deltas(one)
    for path, value in made.items():
        exact = np.asarray(moved[f"{path}/value"], np.float64)
        s = np.linalg.svd(exact, compute_uv=False)
        expected = np.sqrt(np.sum(s[:, 4:] ** 2) / np.sum(s**2))
        assert errors[path] == pytest.approx(expected, rel=1e-4)
        assert np.linalg.norm(exact - value) / np.linalg.norm(exact) == pytest.approx(
            expected, rel=1e-4
        )


def test_to_lora_of_a_lora_gives_its_merged_weights():
    base, one = decoder()[1], lora(1)
    for given in ({}, {"rank": 2}, {"energy": 1.0}):
        made, errors = jp.to_lora(one, base, **given)
        assert max(errors.values()) < 1e-5
        assert made.spec.rank == 2
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5),
            merge(base, made),
            merge(base, one),
        )
    assert jp.to_lora(pad_rank(one, 5), base, rank=4)[0].spec.rank == 2


def test_padding_the_rank_changes_nothing():
    one, (module, base), tokens = lora(1), decoder(), make_batch(2, 4)["tokens"]
    wide = pad_rank(one, 5)
    assert wide.spec.rank == 5
    actual, expected = (apply(module, bind(base, a), tokens) for a in (wide, one))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(jp.UserError, match="has rank 5, above 2"):
        pad_rank(wide, 2)


def test_stacking_pads_ranks_and_places_with_zeros():
    first, second = lora(1), lora(2, rank=3, targets=("q_proj",))
    stacked = jp.stack_adapters([first, second])
    path = "layers/mlp/up_proj/kernel"
    assert stacked.spec.paths == first.spec.paths
    assert stacked.spec.rank == 3
    assert paths.get(stacked.params, f"{path}/a").shape == (2, 2, 16, 3)
    assert not jnp.any(paths.get(stacked.params, f"{path}/a")[1])
    assert paths.get(stacked.buffers, f"{path}/rank").tolist() == [[2, 2], [0, 0]]
    full = jp.init_adapter(jp.Full(), decoder()[1], jax.random.key(0))
    with pytest.raises(jp.UserError, match="only adapters of one kind"):
        jp.stack_adapters([first, full])
    with pytest.raises(jp.UserError, match="none to stack"):
        jp.stack_adapters([])


def test_each_of_a_stack_of_rslora_and_plain_adapters_is_saved_with_its_own_alpha(tmp_path):
    from toy_model import toy_model

    base = toy_model(jax.random.key(0))
    methods = [
        LoRA(rank=4, alpha=6.0, targets=("q_proj", "up_proj")),
        LoRA(rank=4, alpha=3.0, rslora=True, targets=("q_proj",)),  # the same scale, 3 / 2
        LoRA(rank=3, alpha=0.7, rslora=True, targets=("up_proj",)),
    ]
    stacked = jp.stack_adapters([jp.init_adapter(m, base, jax.random.key(0)) for m in methods])
    for i, method in enumerate(methods):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        jp.save_adapter(tmp_path / str(i), one, base)
        config = json.loads((tmp_path / str(i) / "adapter_config.json").read_text())
        assert (config["use_rslora"], config["r"]) == (method.rslora, method.rank)
        assert (config["lora_alpha"], config["alpha_pattern"]) == (method.alpha, {})
        assert jp.LoRA.from_peft(tmp_path / str(i)) == method


def test_places_trained_in_other_ways_are_not_stacked():
    tied = lora(1, targets=("q_proj", "embed_tokens"))
    tokens = lora(2, targets=("q_proj",), token_ids=(3, 5))
    with pytest.raises(jp.UserError, match=r"embed_tokens/embedding holds .*'a', 'b'.*'rows'"):
        jp.stack_adapters([tied, tokens])


def test_what_is_made_of_adapters_knows_their_base_and_its_revision():
    one = dataclasses.replace(lora(1), base_name=Label("org/base"), base_revision=Label("v1"))
    made = [
        pad_rank(one, 4),
        jp.stack_adapters([one, one]),
        jp.combine([one], [2.0]),
        jp.to_lora(one, decoder()[1], rank=1)[0],
    ]
    assert {(str(m.base_name), str(m.base_revision)) for m in made} == {("org/base", "v1")}


def test_adapters_that_do_not_belong_together_are_told_in_one_line():
    one, base = lora(1), decoder()[1]
    wide = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1) if x.ndim > 1 else x, one.params)
    deep = jax.tree.map(lambda x: jnp.concatenate([x, x]), (one.params, one.buffers))
    deep = one.replace(params=deep[0], buffers=deep[1])
    dora = jp.init_adapter(LoRA(rank=2, dora=True), base, jax.random.key(0))
    for call, message in (
        (lambda: jp.combine([one, one.replace(params=wide)], [1, 1]), "have different bases"),
        (lambda: jp.combine([deep, one], [1, 1], "svd"), "have different bases"),
        (lambda: jp.combine([jp.stack_adapters([one, one])], [1.0]), r"take one: jax\.tree\.map"),
        (lambda: bind(base, one, index=jnp.array([0])), "are not stacked"),
        (lambda: merge(base, jp.stack_adapters([one, one])), r"take one: jax\.tree\.map"),
        (lambda: jp.to_lora(dora, base), "with more than factors needs rank= or energy="),
    ):
        with pytest.raises(jp.UserError, match=message):
            call()
    stacked = jp.stack_adapters([one, lora(2)])
    assert_same(deltas(jax.tree.map(lambda leaf: leaf[1], stacked)), deltas(lora(2)))


WRONG_CALLS = """
import dataclasses
import jax.numpy as jnp, jaxpeft as jp
params = {"lm_head": {"kernel": jnp.ones((4, 6))}}
one = jp.init_adapter(jp.LoRA(rank=2, targets=["lm_head"]), params, __import__("jax").random.key(0))
model = jp.Model(params, None, None)
for call in (
    lambda: jp.combine([one, one], 0.5),
    lambda: jp.combine([one], None),
    lambda: jp.bind(params, one, weights=0.5),
    lambda: jp.bind(model, one),
    lambda: jp.merge(model, one),
    lambda: jp.quantize(model),
    lambda: model(jnp.ones((1, 1), int), adapter=[one, one], index=[0]),
    lambda: jp.LoRA(alpha="16"),
    lambda: jp.LoRA(targets=None),
    lambda: jp.LoRA(init_weights="loftq", loftq_steps=1.5),
    lambda: jp.IA3(feedforward="(q"),
    lambda: jp.LoRA(layers=(0,), layers_pattern="("),
    lambda: jp.LoRA(targets="a{9999999999}"),
    lambda: jp.LoRA(r=8, lora_alpha=16),
    lambda: jp.LoRA(16, ranks=8),
    lambda: dataclasses.replace(jp.LoRA(), lora_dropout=0.1),
    lambda: jp.VeRA(use_dora=True),
    lambda: jp.IA3(peft_type="IA3"),
    lambda: jp.PrefixTuning(feedforward=()),
    lambda: jp.IA3(learning_rate=1e-3),
    lambda: jp.BitFit(gradient_accumulation_steps=4, fan_in_fan_out=False),
    lambda: jp.OptimConfig(lr=1e-3),
):
    try:
        call()
    except ValueError as error:
        print(error)
print(len(jp.combine(one, [1.0]).spec.paths))
"""


def test_wrong_calls_are_answered_in_one_line():
    """In a process of its own: here types are checked before the function sees them."""
    result = subprocess.run(
        [sys.executable, "-c", WRONG_CALLS], capture_output=True, text=True, check=False
    )
    one_number = "weights: expected a list with one number for each adapter, got"
    of_model = "params: expected a nested dict of arrays, got Model; of a jaxpeft.Model pass"
    regex = "'(' is not a valid regex: missing ), unterminated subpattern at position 0."
    assert result.stdout.splitlines() == [
        f"{one_number} 0.5.",
        f"{one_number} None.",
        f"{one_number} 0.5.",
        *[f"{of_model} base.params."] * 3,
        "index: the adapters are not stacked; use jaxpeft.stack_adapters([...]).",
        "LoRA.alpha must be finite and positive, got '16'.",
        "LoRA.targets must be a text or a list of names, got None.",
        "LoRA.loftq_steps must be at least 1, got 1.5.",
        f"IA3.feedforward: {regex.replace('(', '(q', 1)}",
        f"LoRA.layers_pattern: {regex}",
        "LoRA.targets: 'a{9999999999}' is not a valid regex: the repetition number is too large.",
        'LoRA.r: unknown key, PEFT\'s r is "rank" here; '
        'LoRA.lora_alpha: unknown key, PEFT\'s lora_alpha is "alpha" here',
        'LoRA.ranks: unknown key, did you mean "rank"?',
        'LoRA.lora_dropout: unknown key, PEFT\'s lora_dropout is "dropout" here',
        'VeRA.use_dora: unknown key, PEFT\'s use_dora is "method.dora" here; '
        "VeRA has init_from, rank, targets, exclude, dropout, d_initial",
        "IA3.peft_type: unknown key, the class stands for PEFT's peft_type; drop it",
        "PrefixTuning.feedforward: unknown key, known here: init_from, num_tokens, initial, text, "
        "projection, hidden_size",
        'IA3.learning_rate: unknown key, "learning_rate" is "optim.learning_rate" here; IA3 has '
        "init_from, targets, feedforward, exclude",
        "BitFit.gradient_accumulation_steps: unknown key, Hugging Face's "
        'gradient_accumulation_steps is "train.microbatch_size" here (batch_size counts the '
        "sequences of one update over all devices; microbatch_size those that are computed at "
        "once); BitFit has init_from, targets; "
        "BitFit.fan_in_fan_out: unknown key: kernels always are (in, out) here; drop the key",
        'OptimConfig.lr: unknown key, Hugging Face\'s lr is "learning_rate" here',
        "1",
    ], result.stderr


@pytest.mark.parametrize(
    "method",
    [
        {"name": "full"},
        {"name": "ln_tuning"},
        {"name": "lora", "targets": ["up_proj"], "save_modules": ["q_proj"]},
        {"name": "lora", "targets": ["q_proj"], "dora": True},
    ],
    ids=lambda method: "-".join(map(str, method)),
)
@pytest.mark.parametrize("put", [bind, merge])
def test_what_replaces_a_weight_goes_before_what_changes_it(method, put):
    base, key = decoder()[1], jax.random.key(0)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in method.items() if k != "name"}
    whole = jp.init_adapter(METHODS[method["name"]](**fields), base, key)
    changed = jax.tree.map(lambda x: x + 0.1, whole.params)
    whole = whole.replace(params=changed)
    before = whole if method["name"] == "ln_tuning" else lora(1, targets=("q_proj",))
    with pytest.raises(jp.UserError, match=r"replaces this weight.*put this one first"):
        put(base, [before, whole])
    if method["name"] != "ln_tuning":
        actual, once = put(base, [whole, before]), put(base, whole)
        assert jax.tree.structure(actual) != jax.tree.structure(once) or any(
            jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), actual, once))
        )
