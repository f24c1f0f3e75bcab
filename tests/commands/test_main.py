"""``python -m jaxpeft``: which commands there are."""

import subprocess
import sys

import pytest
from places import ROOT

from jaxpeft.__main__ import COMMANDS, main


def test_every_command_is_listed_with_what_it_does():
    done = subprocess.run(
        [sys.executable, "-m", "jaxpeft"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[2] for line in lines[:-1]] == [f"jaxpeft.{verb}" for verb in COMMANDS]
    assert all(len(line.split()) > 5 for line in lines[:-1])


def test_the_list_holds_every_module_that_is_a_program():
    programs = {
        file.stem
        for file in (ROOT / "jaxpeft").glob("*.py")
        if file.stem != "__main__" and '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    }
    assert programs == set(COMMANDS)


@pytest.mark.parametrize(("argv", "verb"), [(["merge", "x"], "merge"), (["tune"], "train")])
def test_a_command_is_a_module(argv, verb, capsys):
    assert main(argv) == 2
    assert f"write python -m jaxpeft.{verb};" in capsys.readouterr().err
