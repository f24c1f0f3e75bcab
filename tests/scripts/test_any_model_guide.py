"""``configs/guides/any_model.md``: its blocks run, and print what stands below them."""

import contextlib
import io
import re

import pytest
from places import CONFIGS

TEXT = (CONFIGS / "guides" / "any_model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)\n```(?:\n\n```text\n(.*?)\n```)?", TEXT, re.DOTALL)
RUN = [(code, printed) for code, printed in BLOCKS if "# In a venv of its own" not in code]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What every block prints; they share their names, as a reader's session does."""
    names, texts = {}, []
    with contextlib.chdir(tmp_path_factory.mktemp("guide")):
        for code, _ in RUN:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(code, names)
            texts.append(out.getvalue().strip())
    return texts


@pytest.mark.parametrize("place", range(len(RUN)))
def test_a_block_of_the_guide_prints_what_it_says(printed, place):
    assert printed[place] == RUN[place][1]
