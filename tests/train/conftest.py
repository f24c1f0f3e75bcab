"""Runs to look at: one finished with evaluations, one plain."""

import jax
import pytest
from tiny_run import (
    make_files,
    write_config,
)
from train_runs import losses

from jaxpeft import train as program


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module", autouse=True)
def in_a_hurry(one_device):
    """Most facts hold on one device, and in code compiled in a hurry; tests are quicker so."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The config of a run that was done once; look at it, don't change it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    evaluation = {"exact_match": True, "max_new_tokens": 3}
    config = write_config(files, output, evaluation=evaluation)
    program.main([config])
    return config


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """The folder of a run without evaluations, the reference of many tests."""
    output = tmp_path_factory.mktemp("plain") / "run"
    losses(files, output)
    return output
