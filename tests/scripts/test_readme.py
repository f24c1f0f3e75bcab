"""What the README says about itself is true: short, and its example runs."""

import re

import jax
import numpy as np
from places import ROOT
from toy_model import toy_adapter, toy_model
from toy_tokenizer import toy_tokenizer

import jaxpeft as jp

README = (ROOT / "README.md").read_text()


def test_readme_is_short_and_names_the_two_commands():
    assert len(README.splitlines()) <= 195
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert re.search(rf"^{re.escape(command)}\b", README, re.M)


def test_readme_examples_run(tmp_path, monkeypatch):
    """On a toy model, whose letters stand for the words of the examples."""
    first, any_model, second, third = re.findall(r"```python\n(.*?)```", README, re.S)
    lines = first.strip().splitlines()
    assert len([line for line in lines if line]) <= 16
    base = toy_model(jax.random.key(0), tokenizer=toy_tokenizer())
    monkeypatch.setattr(jp, "load_model", lambda path: base)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(first, names)
    assert int(names["state"].step) == 10
    jp.load_adapter(tmp_path / "runs" / "example", base)
    exec(any_model, names)
    params, roles = names["params"], names["roles"]
    mine = jp.load_adapter(tmp_path / "runs" / "mine", params, roles=roles)
    assert mine.spec == names["mine"].spec
    np.testing.assert_array_equal(
        names["y"], names["module"].apply({"params": names["merged"]}, names["x"])
    )
    adapters = iter([toy_adapter(jax.random.key(i), base, rank=i) for i in (1, 2)])
    monkeypatch.setattr(jp, "load_adapter", lambda path, base: next(adapters))
    exec(second, names)
    assert names["one"].spec.rank == 3
    exec(third, names)
    assert jax.tree.structure(names["grads"]) == jax.tree.structure(names["a"].params)
