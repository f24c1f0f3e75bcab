"""Folders of checkpoints to look at and to break."""

import shutil
from pathlib import Path

import pytest
from checkpoint_states import small_state

from jaxpeft.checkpoints.checkpoints import Checkpoints


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def checkpoints(tmp_path, warnings):
    with Checkpoints(tmp_path / "checkpoints", warn=warnings.append) as opened:
        yield opened


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with steps 10 and 20; copy it, don't change it."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpoints(folder) as opened:
        for step in (10, 20):
            opened.save(step, small_state(step), meta={"seed": 5})
    return folder


@pytest.fixture
def copied(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "copied"))
