"""An optimizer from outside of the package does all that ours do, once it is registered."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_decoder import decoder, make_adapter, make_batch
from tiny_run import make_files, training_lines, write_config

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.config import run_config
from jaxpeft.config.schema import describe
from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.updates.optimizers import OPTIMIZERS, WHOLE_ARRAYS

RATE, DECAY, MOMENTUM = 0.02, 0.1, 0.8


def signum(config, rate):
    """``m <- b1 m + g,  p <- p - rate * (sign(m) + decay * p)``."""
    return optax.chain(
        optax.trace(config.b1),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The optimizer is known while the tests of this file run, and afterwards it is not."""
    jp.register_optimizer("signum", signum)
    yield
    del OPTIMIZERS["signum"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def config(**values):
    fixed = {"learning_rate": RATE, "weight_decay": DECAY, "b1": MOMENTUM, "clip_norm": None}
    return jp.OptimConfig(**{"name": "signum", "schedule": "constant", **fixed, **values})


def test_three_updates_follow_the_formula():
    rng = np.random.default_rng(0)
    p, gradients = rng.normal(size=(3, 4)), rng.normal(size=(3, 3, 4))
    tx, params = jp.make_optimizer(config(), 10), jnp.asarray(p, jnp.float32)
    state, momentum = tx.init(params), np.zeros_like(p)
    for g in gradients:
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, params)
        params += updates
        momentum = MOMENTUM * momentum + g
        p = p - RATE * (np.sign(momentum) + DECAY * p)
    np.testing.assert_allclose(params, p, rtol=1e-5)


def test_the_real_step_moves_b_faster_by_the_ratio_of_lora_plus():
    """From zero, one step of signs moves B by its rate; A by its own, after B has moved."""
    module, params = decoder()
    method, adapter = jp.LoRA(rank=2, alpha=4.0), make_adapter()
    optim = config(lora_plus_ratio=4.0, weight_decay=0.0)
    tx = jp.masked(jp.make_optimizer(optim, 10, method), jp.adapter_only)
    step = jp.make_train_step(jp.make_lm_loss(module, head_frozen=True), tx)
    state = jp.init_train_state(params, adapter, tx, jax.random.key(0))
    for _ in range(2):
        before = paths.flatten(state.adapter.params)
        before = {path: np.asarray(leaf) for path, leaf in before.items()}  # the state is donated
        state, _ = step(state, params, make_batch(2, 8))
    for path, after in paths.flatten(state.adapter.params).items():
        expected = RATE * (4.0 if path.endswith("/b") else 1.0)
        moved = np.abs(np.asarray(after) - before[path])
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("more", [{}, {"lora_plus_ratio": 4.0}], ids=["plain", "lora plus"])
def test_a_run_that_stops_and_goes_on_ends_as_one_that_does_not(files, tmp_path, more):
    optim = {"name": "signum", "learning_rate": 0.005, "schedule": "constant", "b1": 0.8, **more}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    program.main([write_config(files, straight, optim=optim)])
    program.main([write_config(files, stopped, optim=optim, train={"steps": 5})])
    program.main([write_config(files, stopped, optim=optim)])
    losses = [line["loss"] for line in training_lines(straight)]
    assert losses[-1] < losses[0]
    assert [line["loss"] for line in training_lines(stopped)] == losses
    one, other = (run / "adapter" / "adapter_model.safetensors" for run in (straight, stopped))
    assert one.read_bytes() == other.read_bytes()


def test_a_changed_decay_is_refused_where_the_state_would_have_another_form(files, tmp_path):
    """Adafactor's state has one part more with a decay; the other rules' have not."""
    from jaxpeft.training.output.resume import _changes_the_state

    def changes(name, was, now):
        written = write_config(files, tmp_path / "run", optim={"name": name, "weight_decay": now})
        return _changes_the_state(jp.load_config(written), "optim.weight_decay", was, now)

    assert changes("adafactor", 0.0, 0.1)
    assert not changes("adafactor", 0.2, 0.1)
    for name in ("adamw", "lion", "sgd", "signum"):
        assert not changes(name, 0.0, 0.1), name


def test_configs_and_help_know_the_name_and_wrong_names_are_answered_with_all(files, tmp_path):
    known = "adamw, adafactor, lion, sgd, signum"
    assert f"--optim.name (adamw)  One of {known}." in describe(run_config.SCHEMA)
    loaded = jp.load_config(write_config(files, tmp_path / "run", optim={"name": "signum"}))
    assert loaded.optim.name == "signum"
    for wrong, advice in (("sigmun", ', did you mean "signum"?'), ("adamw_torch", "; write adamw")):
        path = write_config(files, tmp_path / "run", optim={"name": wrong})
        with pytest.raises(UserError, match=r"optim\.name: ") as error:
            jp.load_config(path)
        assert str(error.value).endswith(f"expected one of {known}, got {wrong}{advice}")
    with pytest.raises(ValueError, match=r"optim\.name must be one of .*'signum'\), got 'sigmun'"):
        config(name="sigmun")


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(UserError, match="there is an optimizer called 'adamw' already"):
        jp.register_optimizer("adamw", signum)
    with pytest.raises(UserError, match="there is an optimizer called 'signum' already"):
        jp.register_optimizer("signum", lambda config, rate: optax.sgd(rate))
    assert {"adafactor"} == WHOLE_ARRAYS
