"""Where the repository's files are."""

import pathlib

TESTS = pathlib.Path(__file__).parents[1]
HELPERS = TESTS / "helpers"
GOLDEN = TESTS / "golden"
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"
CONFIGS = ROOT / "configs"
