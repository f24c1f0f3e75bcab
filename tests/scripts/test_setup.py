"""The set-up script says what is wrong in one line and leaves everything as it was."""

import os
import shutil
import subprocess
import sys

import pytest
from places import SCRIPTS


@pytest.fixture
def checkout(tmp_path):
    """A folder with a set-up script and nothing to install."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "setup.sh", tmp_path / "scripts")
    return tmp_path


def set_up(checkout, *arguments, python=""):
    return subprocess.run(
        ["bash", str(checkout / "scripts" / "setup.sh"), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(folder, version):
    """A program that says it is another Python version."""
    path = folder / "fake-python"
    path.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = {version}\n$2"\n'
    )
    path.chmod(0o755)
    return path


def assert_refused(result, checkout, message):
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (checkout / ".venv").exists()


def test_old_python_is_refused(checkout, tmp_path):
    python = fake_python(tmp_path, (3, 10))
    assert_refused(set_up(checkout, "test", python=python), checkout, "is Python 3.10; 3.11")


@pytest.mark.parametrize("python", ["no-such-program", "true", "false"])
def test_program_that_is_no_python_is_refused(checkout, python):
    assert_refused(set_up(checkout, "quickstart", python=python), checkout, f"{python}: ")


@pytest.mark.parametrize("arguments", [(), ("tests",)])
def test_unknown_purpose_is_refused(checkout, arguments):
    assert_refused(set_up(checkout, *arguments), checkout, "expected quickstart or test")
