"""The table of ``tests/README.md`` names each case once, and tests that there are."""

import re

from places import TESTS

TEXT = (TESTS / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([F\d, ]+) \| (.*?) \| (.*) \| (.*?) \|$", TEXT, re.MULTILINE)


def test_every_case_has_one_line():
    cases = [case for row in ROWS for case in row[0].split(", ")]
    inputs, faults = range(1, 73), range(1, 31)
    assert sorted(cases) == sorted([*map(str, inputs), *(f"F{number}" for number in faults)])


def test_tests_of_the_table_are_there():
    named = [name for row in ROWS for name in re.findall(r"`([\w/]+\.py(?:::\w+)?)`", row[2])]
    assert len(named) >= 85
    for name in named:
        file, _, function = name.partition("::")
        text = (TESTS / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, name


def test_every_line_names_a_test_or_says_why_there_is_none():
    silent = [row[0] for row in ROWS if "`" not in row[2] and not row[2].startswith("none: ")]
    assert silent == []
