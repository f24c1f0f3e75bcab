"""A log on a full disk costs its lines, never the program."""

import subprocess
import sys

from full_disk import files_no_larger_than
from places import ROOT

from jaxpeft.cli.log_files import open_lossy


def test_lines_that_do_not_fit_are_lost(tmp_path):
    with open(tmp_path / "log", "w") as file:
        stream = open_lossy(file.fileno(), file)
        print("fits", file=stream)
        with files_no_larger_than(8):
            print("does not fit", file=stream)
        print("fits again", file=stream)
        stream.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert (lines[0], lines[-1][-10:]) == ("fits", "fits again")


def test_a_program_whose_output_goes_to_a_full_disk_ends_well(tmp_path):
    code = (
        "import sys; from jaxpeft.cli import exits, log_files; log_files.survive_full_disks()\n"
        "def main(argv):\n"
        "    for stream in (sys.stdout, sys.stderr):\n"
        "        print('x' * 100_000, file=stream)\n"
        "    open(argv[0], 'w').write('done')\n"
        "exits.run(main)"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code, str(tmp_path / "done")]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, check=False)
    assert done.returncode == 0
    assert (tmp_path / "done").read_text() == "done"
