"""What the README says about itself is true: short, and its example runs."""

import pathlib
import re

import jax
from toy_model import toy_model
from toy_tokenizer import toy_tokenizer

import jaxpeft as jp

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_readme_is_short_and_names_the_two_commands():
    assert len(README.splitlines()) <= 150
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert re.search(rf"^{re.escape(command)}\b", README, re.M)


def test_readme_example_runs(tmp_path, monkeypatch):
    """On a toy model, whose letters stand for the words of the example."""
    found = re.search(r"```python\n(.*?)```", README, re.S)
    assert found is not None
    lines = found[1].strip().splitlines()
    assert len([line for line in lines if line]) <= 16
    base = toy_model(jax.random.key(0), tokenizer=toy_tokenizer())
    monkeypatch.setattr(jp, "load_model", lambda path: base)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(found[1], names)
    assert int(names["state"].step) == 10
    jp.load_adapter(tmp_path / "runs" / "example", base)
