"""Configs read from text, and the problems they have."""

from pathlib import Path

import pytest

from jaxpeft.config import run_config as cfg
from jaxpeft.core.errors import UserError


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Reads a config's text from a file called c.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        Path("c.yaml").write_text(text, encoding="utf-8")
        return cfg.load_config("c.yaml", overrides)

    return load


@pytest.fixture
def problems(load):
    """The lines of the error that a config's text gives."""

    def problems(text, *overrides):
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return str(caught.value).split("\n")

    return problems
