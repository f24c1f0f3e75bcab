"""`scripts/chaos.py`: a run that is killed or whose disk fails ends as if it had not been."""

import subprocess
import sys

import pytest
from places import SCRIPTS

SCRIPT = SCRIPTS / "chaos.py"


@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_runs_killed_or_denied_the_disk_end_byte_identical(tmp_path, count):
    command = [sys.executable, str(SCRIPT), "--count", str(count), "--folder", str(tmp_path)]
    done = subprocess.run(
        command, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{count} of {count} ended byte-identical"
    assert "operations: " in done.stdout
