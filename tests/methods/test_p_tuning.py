"""P-tuning: the encoder against loops in float64 NumPy, and what saving keeps of it."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder, draw, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.prompts.p_tuning import PTuning, encode
from jaxpeft.methods.prompts.prompt import arrays_of
from jaxpeft.pretrained.model import Model

N, HIDDEN = 3, 5


def fresh(encoder):
    method = PTuning(num_tokens=N, encoder=encoder, hidden_size=HIDDEN)
    return method.init(decoder()[1], jax.random.key(0))


def trained(encoder):
    adapter = fresh(encoder)
    return adapter.replace(params=draw(adapter.params, seed=1, scale=0.5))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm(x, weights, place, backward):
    """One layer and direction, gate by gate, in torch's order of gates."""
    h = c = np.zeros(HIDDEN)
    out = {}
    for t in reversed(range(len(x))) if backward else range(len(x)):
        gates = x[t] @ weights[place + "_input"] + weights[place + "_input_bias"]
        gates = gates + h @ weights[place + "_state"] + weights[place + "_state_bias"]
        i, f, g, o = (gates[k * HIDDEN : (k + 1) * HIDDEN] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out[t] = h
    return np.stack([out[t] for t in range(len(x))])


def numpy_encode(weights, encoder):
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    h, layers = weights["prompt"], 3
    if encoder == "lstm":
        layers = 2
        for layer in range(2):
            places = [(f"lstm_{layer}_{way}", way == "backward") for way in ("forward", "backward")]
            h = np.concatenate([numpy_lstm(h, weights, *place) for place in places], axis=1)
    for layer in range(layers):
        h = h @ weights[f"mlp_{layer}_kernel"] + weights[f"mlp_{layer}_bias"]
        h = np.maximum(h, 0) if layer < layers - 1 else h
    return h


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_the_encoder_matches_float64_numpy(encoder):
    arrays = arrays_of(trained(encoder))
    actual = jax.jit(lambda arrays: encode(arrays, encoder))(arrays)
    assert actual.shape == (N, CONFIG.d_model)
    np.testing.assert_allclose(actual, numpy_encode(arrays, encoder), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "shapes"),
    [
        ("none", {}),
        ("mlp", {"mlp_0": (16, 5), "mlp_1": (5, 5), "mlp_2": (5, 16)}),
        ("lstm", {"mlp_0": (10, 10), "mlp_1": (10, 16)}),
    ],
)
def test_a_new_encoder_has_the_shapes_and_ranges_of_torch(encoder, shapes):
    arrays = arrays_of(fresh(encoder))
    for name, shape in shapes.items():
        kernel, bias = arrays[f"{name}_kernel"], arrays[f"{name}_bias"]
        assert (kernel.shape, bias.shape) == (shape, shape[1:])
        for leaf in (kernel, bias):
            assert 0.5 / np.sqrt(shape[0]) < np.abs(leaf).max() <= 1 / np.sqrt(shape[0])
    states = [name for name in arrays if name.startswith("lstm")]
    assert len(states) == (16 if encoder == "lstm" else 0)
    for name in states:
        assert 0.8 / np.sqrt(HIDDEN) < np.abs(arrays[name]).max() <= 1 / np.sqrt(HIDDEN)
    assert len(arrays) == 1 + len(states) + 2 * len(shapes)


def test_the_hidden_size_is_the_models_unless_given():
    adapter = PTuning(num_tokens=2).init(decoder()[1], jax.random.key(0))
    assert arrays_of(adapter)["mlp_1_kernel"].shape == (CONFIG.d_model, CONFIG.d_model)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_what_is_saved_is_the_encoders_output_and_can_be_trained_on(encoder, tmp_path):
    module, params = decoder()
    base = Model(params, CONFIG, module, name="base")
    adapter = trained(encoder)
    jp.save_adapter(tmp_path / "out", adapter, base)
    again = jp.load_adapter(tmp_path / "out", base)
    assert set(arrays_of(again)) == {"prompt"}
    tokens = np.asarray(make_batch(2, 6)["tokens"])
    expected = base(tokens, adapter=adapter)
    np.testing.assert_allclose(base(tokens, adapter=again), expected, rtol=1e-4, atol=1e-5)

    def loss(p):
        ids = jp.with_prompt(again, jnp.asarray(tokens))
        return module.apply(jp.bind(params, again.replace(params=p)), ids).sum()

    gradient = paths.get(jax.grad(loss)(again.params), paths.EMBEDDING)
    assert (np.abs(gradient["prompt"]).max(axis=1) > 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tokens": 0}, r"PTuning\.num_tokens"),
        ({"encoder": "gru"}, r"PTuning\.encoder must be one of mlp, lstm, none"),
        ({"hidden_size": 0}, r"PTuning\.hidden_size must be a whole number of at least 1"),
    ],
)
def test_nonsense_is_refused(values, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests
    with pytest.raises(ValueError, match=message):
        PTuning(**values)
