"""AdaLoRA: its form, its penalty, and its schedule step by step against PEFT's formulas."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from places import GOLDEN
from safetensors import safe_open
from tiny_decoder import CONFIG, decoder, draw, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.adalora.config import AdaLoRA
from jaxpeft.methods.adalora.schedule import AllocationState, Schedule, allocate_ranks, places_of
from jaxpeft.methods.method import Context
from jaxpeft.updates.losses import make_lm_loss
from jaxpeft.updates.optimizers import OptimConfig, make_optimizer

PARAMS = decoder(CONFIG)[1]
TARGETS = ("q_proj", "layers.1.mlp.up_proj")
Q, UP = "layers/self_attn/q_proj/kernel", "layers/mlp/up_proj/kernel"
METHOD = AdaLoRA(
    rank=2,
    initial_rank=4,
    targets=TARGETS,
    initial_steps=2,
    final_steps=3,
    every=2,
    beta1=0.8,
    beta2=0.7,
)


def start(method=METHOD):
    return method.init(PARAMS, jax.random.key(0))


class RankAllocator:
    """HF PEFT 0.21's class of that name (adalora/layer.py) in float64 NumPy, by module."""

    def __init__(self, method, modules, steps):
        self.m, self.T = method, steps
        self.names = list(modules)
        self.init_bgt = sum(p["e"].size for p in modules.values())
        self.target_bgt = method.rank * len(modules)
        zeros = {n: {k: np.zeros_like(v) for k, v in p.items()} for n, p in modules.items()}
        self.avg, self.unc = zeros, {n: dict(p) for n, p in zeros.items()}
        self.pattern = None

    def budget(self, t):
        if t <= self.m.initial_steps:
            return self.init_bgt, False
        if t > self.T - self.m.final_steps:
            return self.target_bgt, True
        left = 1 - (t - self.m.initial_steps) / (self.T - self.m.final_steps - self.m.initial_steps)
        budget = int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt)
        return budget, t % self.m.every == 0

    def mask(self, modules, budget):
        score = {}
        for n in self.names:
            s = {k: self.avg[n][k] * self.unc[n][k] for k in "abe"}
            score[n] = s["e"] + s["a"].mean(0) + s["b"].mean(1)
        kth = np.sort(np.concatenate([score[n] for n in self.names]))[self.init_bgt - budget - 1]
        for n in self.names:
            modules[n]["e"][score[n] <= kth] = 0.0
        return {n: score[n] > kth for n in self.names}

    def update_and_allocate(self, modules, grads, t):
        """What AdaLoraModel.update_and_allocate does after an optimizer's step."""
        last = self.T - self.m.final_steps
        if t > last:
            for n in self.names:
                modules[n]["e"][~self.pattern[n]] = 0.0
            return
        if t < last:
            for n in self.names:
                for k in "abe":
                    ipt = np.abs(modules[n][k] * grads[n][k])
                    b1, b2 = self.m.beta1, self.m.beta2
                    self.avg[n][k] = b1 * self.avg[n][k] + (1 - b1) * ipt
                    gap = np.abs(ipt - self.avg[n][k])
                    self.unc[n][k] = b2 * self.unc[n][k] + (1 - b2) * gap
        budget, due = self.budget(t)
        if due or t == last:
            self.pattern = self.mask(modules, budget)


def modules_of(tree):
    """Single modules in float64, from stacked places."""
    places = {p.removeprefix("adapter/"): place for p, place in places_of(tree).items()}
    where = {"q0": (Q, 0), "q1": (Q, 1), "up1": (UP, 1)}
    return {
        n: {k: np.array(places[p][k][layer], np.float64) for k in "abe"}
        for n, (p, layer) in where.items()
    }


def averages(opt_state, field):
    """One of the averages in an optimizer's state, by module."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AllocationState))
    [state] = [node for node in nodes if isinstance(node, AllocationState)]
    return modules_of(getattr(state, field))


@pytest.mark.parametrize("clip", [None, 30.0])
def test_the_schedule_is_that_of_peft_step_by_step(clip):
    steps, rate = 14, 0.05
    adapter = start()
    optim = OptimConfig(name="sgd", b1=0.0, learning_rate=rate, schedule="constant", clip_norm=clip)
    tx = jp.masked(make_optimizer(optim, steps, METHOD), jp.adapter_only)
    tree = {"base": PARAMS, "adapter": adapter.params}
    state, update = tx.init(tree), jax.jit(tx.update)
    modules = modules_of(tree)
    allocator = RankAllocator(METHOD, modules, steps)
    zeros, norms = [], []
    for t in range(1, steps + 1):
        noise = draw(adapter.params, seed=t, scale=1.0 if t % 3 else 3.0)
        alone = paths.get(noise, UP)
        alone |= {k: v.at[0].set(0.0) for k, v in alone.items()}  # a layer that is not adapted
        grads = {"base": jax.tree.map(lambda _: None, PARAMS), "adapter": noise}
        updates, state = update(grads, state, tree, buffers=adapter.buffers)
        moved = jax.tree.map(jnp.add, tree["adapter"], updates["adapter"])
        tree = {"base": PARAMS, "adapter": moved}

        slopes = modules_of({"adapter": noise})
        norms.append(np.sqrt(sum((g**2).sum() for m in slopes.values() for g in m.values())))
        for n, place in modules.items():
            for k in "abe":
                slopes[n][k] *= min(1.0, clip / norms[-1]) if clip else 1.0
                place[k] -= rate * slopes[n][k]
        allocator.update_and_allocate(modules, slopes, t)
        ours = modules_of(tree)
        for n, place in modules.items():
            np.testing.assert_array_equal(ours[n]["e"] == 0, place["e"] == 0)
            for k in "abe":
                np.testing.assert_allclose(ours[n][k], place[k], rtol=1e-4, atol=1e-5)
        for field, theirs in (("importance", allocator.avg), ("uncertainty", allocator.unc)):
            for n, place in averages(state, field).items():
                for k in "abe":
                    np.testing.assert_allclose(place[k], theirs[n][k], rtol=1e-3, atol=1e-5)
        zeros.append(sum(int((place["e"] == 0).sum()) for place in ours.values()))
    assert clip is None or min(norms) < clip < max(norms)
    assert zeros[:2] == [0, 0]
    assert zeros[3:11:2] == sorted(zeros[3:11:2])
    assert zeros[10:] == [6, 6, 6, 6]  # of 3 * 4 triplets, 3 * 2 are left
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(tree))


def test_budgets_and_ranks_are_those_that_peft_computed():
    """Against ``scripts/make_golden_adalora.py``; nothing is clipped, so gradients are the same."""
    with safe_open(GOLDEN / "adalora_schedule.safetensors", "numpy") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        given = json.loads(file.metadata()["settings"])
    layers, steps, first = golden["e"].shape[1], given["steps"], given["init_r"]
    schedule = {
        "rank": given["target_r"],
        "initial_steps": given["tinit"],
        "final_steps": given["tfinal"],
        "every": given["deltaT"],
        "beta1": given["beta1"],
        "beta2": given["beta2"],
    }
    cuts = Schedule(steps=steps, **schedule).cuts(first, layers)
    due = np.flatnonzero(cuts)
    np.testing.assert_array_equal(first * layers - cuts[due], golden["budgets"][due - 1])
    assert len(due) > 3

    def numbers(step, part, shape):
        seeds = [[step, module, "ABE".index(part)] for module in range(layers)]
        drawn = [np.random.default_rng(s).standard_normal(shape).astype("f") for s in seeds]
        return np.stack(drawn)

    def place(step, scale=1.0):
        a = numbers(step, "A", (first, golden["last_a"].shape[2])).swapaxes(1, 2)
        b = numbers(step, "B", (golden["last_b"].shape[1], first)).swapaxes(1, 2)
        leaf = {"a": a, "b": b, "e": numbers(step, "E", (first, 1))[..., 0]}
        return jax.tree.map(lambda x: jnp.float32(scale) * x, paths.unflatten({Q: leaf}))

    tx = allocate_ranks(
        optax.sgd(given["rate"]), Schedule(steps=steps, **schedule), lambda shapes: layers
    )
    tree = place(0, 0.3)
    state, update = tx.init(tree), jax.jit(tx.update)
    for step in range(1, steps + 1):
        updates, state = update(place(step), state, tree, buffers={})
        tree = jax.tree.map(jnp.add, tree, updates)
        ours, theirs = paths.get(tree, Q)["e"], golden["e"][step - 1, ..., 0]
        np.testing.assert_array_equal(ours == 0, theirs == 0, err_msg=f"step {step}")
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert int((golden["e"][-1] != 0).sum()) == given["target_r"] * layers
    for name in "ab":
        theirs = golden[f"last_{name}"].swapaxes(1, 2)
        np.testing.assert_allclose(paths.get(tree, Q)[name], theirs, rtol=1e-5, atol=1e-5)


def test_only_adapted_arrays_have_state_and_it_passes_through_the_training_step():
    adapter = start()
    tx = jp.masked(METHOD.wrap_optimizer(optax.adamw(1e-2), 14), jp.adapter_only)
    state = jp.init_train_state(PARAMS, adapter, tx, jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(adapter.params))
    floats = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.float32]
    assert sum(x.size for x in floats) == 4 * size  # two moments, two averages
    loss_fn = make_lm_loss(decoder(CONFIG)[0], head_frozen=True, penalty=METHOD.penalty)
    step = jp.make_train_step(loss_fn, tx)
    for _ in range(11):
        state, metrics = step(state, PARAMS, make_batch(2, 8))
    assert int(metrics["skipped"]) == 0
    left = {p: int((place["e"] != 0).sum()) for p, place in places_of(state.trained).items()}
    assert sum(left.values()) == 6
    alone = paths.get(state.trained["adapter"], UP)
    assert not any(np.asarray(alone[k][0]).any() for k in "abe")  # a layer that is not adapted


def test_the_penalty_is_the_mean_distance_from_orthogonal_factors():
    adapter = start().replace(params=draw(start().params, seed=3, scale=0.5))
    place = paths.get(adapter.params, UP)
    adapter.params["layers"]["mlp"]["up_proj"]["kernel"] = {
        k: v * jnp.array([0.0, 1.0]).reshape(2, *[1] * (v.ndim - 1)) for k, v in place.items()
    }
    expected = []
    for module in modules_of({"adapter": adapter.params}).values():
        a, b, eye = module["a"], module["b"], np.eye(4)
        expected += [np.linalg.norm(a.T @ a - eye), np.linalg.norm(b @ b.T - eye)]
    actual = jax.jit(METHOD.penalty)(adapter)
    np.testing.assert_allclose(actual, 0.5 * np.mean(expected), rtol=1e-5)


def test_orthogonal_factors_cost_nothing_and_have_finite_gradients():
    eye = jnp.eye(16)[:, :4]
    params = jax.tree.map(jnp.zeros_like, start().params)
    for path in (Q, UP):
        place = paths.get(params, path)
        place["a"] = jnp.broadcast_to(eye, place["a"].shape)
        place["b"] = jnp.broadcast_to(jnp.eye(4, place["b"].shape[-1]), place["b"].shape)
    adapter = start().replace(params=params)
    value, slope = jax.value_and_grad(lambda p: METHOD.penalty(adapter.replace(params=p)))(params)
    assert value == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_the_scale_is_alpha_over_the_initial_rank_and_a_little():
    buffers = paths.get(start(AdaLoRA(rank=2, alpha=7.0, targets=("q_proj",))).buffers, Q)
    np.testing.assert_allclose(buffers["scale"], 7.0 / (3 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(buffers["rank"], [3, 3])  # half as many again


def test_what_was_taken_away_is_left_out_of_the_folder_and_comes_back_as_zeros(tmp_path):
    base = jp.Model(PARAMS, CONFIG, decoder(CONFIG)[0], None, "", "tiny")
    adapter = start()
    params = draw(adapter.params, seed=1, scale=0.3)
    on = {Q: jnp.ones((2, 1)), UP: jnp.array([[0.0], [1.0]])}
    kept = {Q: jnp.array([[1, 0, 1, 0], [0, 0, 0, 0]]), UP: jnp.array([[0] * 4, [1, 1, 1, 0]])}
    for path, mask in kept.items():
        place = paths.get(params, path)
        place["a"], place["b"] = place["a"] * on[path][..., None], place["b"] * on[path][..., None]
        place["e"] = place["e"] * mask
    adapter = adapter.replace(params=params)
    jp.save_adapter(tmp_path / "out", adapter, base)
    again = jp.load_adapter(tmp_path / "out", base)
    assert again.spec == adapter.spec
    assert jax.tree.map(jnp.shape, again.params) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(paths.get(again.params, Q)["e"], paths.get(params, Q)["e"])
    ids = make_batch(2, 8)["tokens"]
    np.testing.assert_allclose(
        base(ids, adapter=again), base(ids, adapter=adapter), rtol=1e-5, atol=1e-5
    )


def test_going_on_draws_lost_triplets_anew_and_leaves_the_function_and_the_others_alone():
    base = jp.load_model(GOLDEN / "models" / "llama3")
    saved = jp.load_adapter(GOLDEN / "methods" / "adalora_pruned", base)
    method = AdaLoRA(rank=4, initial_rank=5, every=3, orthogonality=0.125)
    adapter = method.go_on(saved, jax.random.key(1), Context(steps=20))
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(base(ids, adapter=adapter), base(ids, adapter=saved))
    slopes = jax.grad(lambda p: base(ids, adapter=adapter.replace(params=p)).std())(adapter.params)
    lost = 0
    for path in saved.spec.paths:
        before, now = paths.get(saved.params, path), paths.get(adapter.params, path)
        gone = np.asarray(before["e"]) == 0
        lost += gone.sum()
        for letter, axis in {"a": -1, "b": -2}.items():
            old, new = (np.moveaxis(np.asarray(x[letter]), axis, 1) for x in (before, now))
            assert not old[gone].any()
            np.testing.assert_array_equal(new[~gone], old[~gone])
            np.testing.assert_allclose(new[gone].std(), 0.02, rtol=0.25)
        np.testing.assert_array_equal(now["e"], before["e"])
        assert (np.asarray(paths.get(slopes, path)["e"]) != 0).all()
    assert lost == 12
    shared = {name: float(value) for name, value in adapter.buffers["shared"].items()}
    assert shared | {"rank": 4, "every": 3, "orthogonality": 0.125, "steps": 20} == shared


def test_going_on_leaves_layers_that_are_not_adapted_and_fresh_factors_as_they_are():
    adapter = start()
    again = METHOD.go_on(adapter, jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter.params)


def test_ranks_that_peft_lowered_are_zeros_and_saved_as_it_writes_them(tmp_path):
    folder = GOLDEN / "methods" / "adalora_pruned"
    base = jp.load_model(GOLDEN / "models" / "llama3")
    adapter = jp.load_adapter(folder, base)
    jp.save_adapter(tmp_path / "out", adapter, base)
    ours, theirs = (
        json.loads((place / "adapter_config.json").read_text())["rank_pattern"]
        for place in (tmp_path / "out", folder)
    )
    assert ours == theirs
    ranks = [sum(marks) for marks in theirs.values()]
    assert min(ranks) == 0
    assert len(set(ranks)) > 2
    for name, marks in theirs.items():
        site = paths.module_names(base.params)[name.removesuffix(".lora_E")]
        place = paths.get(adapter.params, site.path)
        for letter, axes in {"a": 0, "b": 1, "e": ()}.items():
            used = (np.asarray(place[letter])[site.layer] != 0).any(axes)
            np.testing.assert_array_equal(used, marks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_dropout": 3.0}, "lora_dropout: expected a probability in [0, 1), got 3.0."),
        ({"beta1": 7}, "beta1: expected a number above 0 and below 1, got 7."),
        ({"target_r": 0}, "target_r: expected a whole number of at least 1, got 0."),
        ({"tfinal": -1}, "tfinal: expected a whole number of at least 0, got -1."),
        ({"total_step": 3}, "total_step: expected more than tinit and tfinal together, 3, got 3."),
    ],
)
def test_a_folder_with_settings_that_make_no_sense_is_refused(tmp_path, values, message):
    folder = shutil.copytree(GOLDEN / "methods" / "adalora_pruned", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    base = jp.load_model(GOLDEN / "models" / "llama3")
    with pytest.raises(jp.UserError) as error:
        jp.load_adapter(folder, base)
    assert str(error.value) == f"{file}: {message}"


@pytest.mark.parametrize(("first", "last", "steps"), [(0, 10, 10), (5, 5, 10), (12, 0, 10)])
def test_a_run_without_updates_to_lower_the_ranks_in_is_refused(first, last, steps):
    method = AdaLoRA(initial_steps=first, final_steps=last)
    with pytest.raises(jp.UserError, match="leave none of the 10 updates"):
        method.wrap_optimizer(optax.sgd(0.1), steps)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"rank": 999}, "AdaLoRA.rank 999 exceeds"),
        ({"rank": 12}, "AdaLoRA.initial_rank 18 exceeds"),
        ({"initial_rank": 17}, "AdaLoRA.initial_rank 17 exceeds"),
    ],
)
def test_a_rank_beyond_the_kernels_sides_is_refused_as_lora_does(ranks, message):
    with pytest.raises(jp.UserError) as error:
        AdaLoRA(targets=("up_proj",), **ranks).init(PARAMS, jax.random.key(0))
    assert str(error.value) == f"{message} the smaller side of {UP} (16 x 24); choose at most 16."
    AdaLoRA(targets=("up_proj",), initial_rank=16).init(PARAMS, jax.random.key(0))


def test_an_update_without_params_says_so():
    numbers = {"rank": 1, "initial_steps": 0, "final_steps": 0, "every": 1}
    schedule = Schedule(steps=3, beta1=0.5, beta2=0.5, **numbers)
    tx = allocate_ranks(optax.sgd(0.1), schedule, len)
    with pytest.raises(ValueError, match="needs params"):
        tx.update({}, tx.init({}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("rank", 0), ("initial_rank", 3), ("alpha", 0.0), ("dropout", 1.0), ("every", 0)],
        *[("initial_steps", -1), ("final_steps", -1), ("beta1", 1.0), ("targets", ())],
        ("orthogonality", -1.0),
    ],
)
def test_nonsense_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"AdaLoRA\.{field} must"):
        AdaLoRA(**{field: value})
