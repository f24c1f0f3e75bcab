"""The proof on other packages: its table, and what it says where something is missing or broken."""

import sys

import any_model_laws as laws
import any_model_venvs as venvs
import check_any_model as check
import jax
import jax.numpy as jnp
import pytest


def toy():
    """A model that keeps the laws."""
    draw = lambda seed, *shape: 0.5 * jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    params = {"params": {"first": draw(0, 6, 8), "last": draw(1, 8, 5)}}
    wanted = draw(3, 4, 5)
    return laws.AnyModel(
        "toy 1.0",
        "function",
        lambda p, x: jnp.tanh(x @ p["params"]["first"]) @ p["params"]["last"],
        params,
        (draw(2, 4, 6),),
        lambda out: jnp.square(out - wanted).mean(),
    )


def test_a_model_that_keeps_the_laws_has_a_row():
    lines = []
    with jax.default_matmul_precision("highest"):
        found = laws.check(toy(), lines.append)
    assert found["broken"] == []
    assert found["roles"] == {"kernel": 2}
    assert (found["kernels"], found["adapted"], found["traces"]) == (2, 88, 1)
    assert any(line.startswith("roles: 2 kernel") for line in lines)
    found |= {"package": "toy 1.0", "kind": "function", "jax": "0"}
    cells = check.row("gemma", found)
    assert len(cells) == len(check.HEAD)
    assert (
        check.table([cells]).splitlines()[2].startswith("| Gemma 3 | toy 1.0, jax 0 | function |")
    )


def test_broken_laws_are_sentences():
    found = {
        "gaps": {"start": 1e-7, "LoRA merged": 2e-5, "DoRA merged": float("nan")},
        "moved": {"LoRA": 1e-4},
        "losses": [1.0, 0.95],
    }
    assert laws._broken(found) == [
        "start: the gap is 1.00e-07, allowed is 0",
        "LoRA merged: the gap is 2.00e-05, allowed is 1e-05",
        "DoRA merged: the gap is nan, allowed is 1e-05",
        "LoRA: the moved adapter changes outputs by 1.00e-04 only, so nothing is shown",
        "training does not bring the loss down",
    ]


def test_an_environment_that_cannot_be_made_is_said_in_plain_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(venvs, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    broken = [sys.executable, "-c", "import sys; sys.exit('no such index')"]
    with pytest.raises(venvs.VenvError, match=r"no such index.*without a network"):
        venvs._do("gemma", broken)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho it is broken >&2; exit 3\n")
    python.chmod(0o755)
    assert check.main(["--only", "gemma", "--python", str(python)]) == 2
    error = capsys.readouterr().err
    assert "error: Gemma 3: the environment of gemma cannot be made" in error
    assert "exit code 3: it is broken" in error
