"""Every method that changes kernels as a plain LoRA: how close, against NumPy's SVD in float64."""

import jax
import numpy as np
import pytest
from tiny_decoder import apply, decoder, make_adapter, make_batch

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.binding import bind
from jaxpeft.methods.merging import merge
from jaxpeft.methods.registry import KINDS, METHODS

LORA = {"rank": 2, "alpha": 4.0}
LOSSY = {
    "dora": METHODS["lora"](**LORA, dora=True),
    "dora rslora": METHODS["lora"](**LORA, dora=True, rslora=True),
    "adalora": METHODS["adalora"](**LORA),
    "vera": METHODS["vera"](rank=3),
    "loha": METHODS["loha"](**LORA),
    "lokr": METHODS["lokr"](**LORA),
    "oft": METHODS["oft"](block_size=4),
    "ia3": METHODS["ia3"](),
    "lora": METHODS["lora"](rank=5, alpha=4.0),
    "lora pissa": METHODS["lora"](rank=4, alpha=4.0, init_weights="pissa"),
}
EXACT = {
    "pissa": METHODS["lora"](**LORA, init_weights="pissa"),
    "olora": METHODS["lora"](**LORA, init_weights="olora"),
    "olora rslora": METHODS["lora"](**LORA, init_weights="olora", rslora=True),
    "rslora": METHODS["lora"](**LORA, rslora=True),
}


def changes(params):
    """How far the kernels of merged parameters are from the base's, in float64."""
    base = paths.flatten(decoder()[1])
    return {
        path: np.asarray(leaf, np.float64) - np.asarray(base[path], np.float64)
        for path, leaf in paths.flatten(params).items()
        if path.endswith("kernel")
    }


@pytest.mark.parametrize("name", LOSSY)
def test_the_reported_error_is_that_of_the_best_matrices_of_the_rank(name):
    adapter, base = make_adapter(LOSSY[name], trained=True), decoder()[1]
    merged = changes(merge(base, adapter))
    for given in ({"rank": 3}, {"energy": 0.8}):
        made, errors = jp.to_lora(adapter, base, **given)
        assert made.spec.kind == "lora"
        assert set(errors) == set(adapter.spec.paths)
        kept = changes(merge(base, made))
        for path, exact in merged.items():
            if path not in errors:
                assert not exact.any()
                continue
            s = np.linalg.svd(exact, compute_uv=False)
            energy = np.cumsum(s**2, axis=-1) / np.sum(s**2, axis=-1, keepdims=True)
            ranks = [given.get("rank", 1 + int((row < 0.8).sum())) for row in energy]
            lost = sum(np.sum(row[r:] ** 2) for row, r in zip(s, ranks, strict=True))
            expected = np.sqrt(lost / np.sum(s**2))
            assert errors[path] == pytest.approx(expected, rel=2e-3, abs=1e-5)
            actual = np.linalg.norm(kept[path] - exact) / np.linalg.norm(exact)
            assert actual == pytest.approx(expected, rel=2e-3, abs=1e-4)
            assert np.asarray(paths.get(made.buffers, f"{path}/rank")).tolist() == ranks


PRODUCTS = {
    "lora": lambda x: x["scale"] * (x["a"] @ x["b"]),
    "lora pissa": lambda x: x["scale"] * (x["a"] @ x["b"] - x["a0"] @ x["b0"]),
    "adalora": lambda x: x["scale"] * (x["a"] * x["e"][:, None]) @ x["b"],
    "vera": lambda x: (x["A"] * x["d"][:, None]) @ x["B"] * x["b"][:, None],
}


def spelled_out(name, adapter, path):
    """The change of a stacked kernel in float64."""
    arrays = paths.get(adapter.params, path) | paths.get(adapter.buffers, path)
    x = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    if name == "vera":
        d_in, d_out = paths.get(decoder()[1], path).shape[-2:]
        a, b = (np.asarray(adapter.buffers["shared"][key], np.float64) for key in "ab")
        x |= {"A": a[:d_in], "B": b[:, :d_out]}
    else:
        x["scale"] = x["scale"][:, None, None]
    return PRODUCTS[name](x)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_that_no_float32_kernel_would_show_is_decomposed_in_float64(name):
    method, base = LOSSY[name], decoder()[1]
    weigh = KINDS[method.name].weigh
    assert weigh is not None
    adapter = weigh(make_adapter(method, trained=True), 1e-12)
    made, errors = jp.to_lora(adapter, base, rank=2)
    assert set(errors) == set(adapter.spec.paths)
    for path, error in errors.items():
        exact = spelled_out(name, adapter, path)
        u, s, vt = np.linalg.svd(exact, full_matrices=False)
        best = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
        assert error == pytest.approx(np.sqrt(np.sum(s[:, 2:] ** 2) / np.sum(s**2)), rel=1e-6)
        away = np.linalg.norm(spelled_out("lora", made, path) - best)
        assert away < 1e-6 * np.linalg.norm(best)


def test_a_new_pissa_changes_nothing_that_a_lora_could_be_made_of():
    base = decoder()[1]
    adapter = jp.init_adapter(EXACT["pissa"], base, jax.random.key(0))
    with pytest.raises(jp.UserError, match="change nothing"):
        jp.to_lora(adapter, base, rank=2)


@pytest.mark.parametrize("name", EXACT)
def test_a_lora_that_starts_in_the_base_becomes_plain_exactly(name):
    adapter, (module, base) = make_adapter(EXACT[name], trained=True), decoder()
    made, errors = jp.to_lora(adapter, base)
    assert made.spec.options == ()
    assert set(errors.values()) == {0.0}
    ids = make_batch(2, 6)["tokens"]
    expected = apply(module, bind(base, adapter), ids)
    actual = apply(module, bind(base, made), ids)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)
    assert np.abs(expected - apply(module, {"params": base}, ids)).max() > 0.1


def test_what_has_no_kernel_to_change_is_refused():
    base = decoder()[1]
    for method, message in (
        (METHODS["prompt_tuning"](num_tokens=2), "cannot be merged"),
        (METHODS["ln_tuning"](), "changes what is no kernel"),
    ):
        adapter = method.init(base, jax.random.key(0))
        moved = adapter.replace(params=jax.tree.map(lambda x: x + 0.5, adapter.params))
        with pytest.raises(jp.UserError, match=message):
            jp.to_lora(moved, base, rank=2)
