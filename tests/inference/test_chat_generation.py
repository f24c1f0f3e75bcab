"""Generation does what training taught: the same prompts, template variables, and ends of turns."""

import json

import jax
import numpy as np
import pytest
from toy_model import random_prompts, toy_adapter, toy_model
from toy_tokenizer import CHATML, shown, toy_tokenizer

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_rows
from jaxpeft.generate import main as generate_main
from jaxpeft.inference.chat_prompts import encode_prompts, stop_ids
from jaxpeft.inference.decoding import generate_ids
from jaxpeft.inference.metrics import exact_match
from jaxpeft.methods.chat_settings import ChatSettings

USER = {"role": "user", "content": "Hi"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
DOCUMENTS = [{"text": "Bo is a dog."}]
TEMPLATE = (
    "{% for t in tools or [] %}T:{{ t['function']['name'] }};{% endfor %}"
    "{% for d in documents or [] %}D:{{ d['text'] }};{% endfor %}"
    "{% if style is defined %}S:{{ style }};{% endif %}" + CHATML
)


def settled(adapter, **settings):
    return adapter.replace(chat=ChatSettings(**settings).label())


def test_prompts_with_tools_documents_and_variables_are_those_of_training(getkey):
    base = toy_model(getkey(), tokenizer=toy_tokenizer(TEMPLATE))
    beside = {"tools": TOOLS, "documents": DOCUMENTS, "chat_template_kwargs": {"style": "dry"}}
    row = {"messages": [USER, {"role": "assistant", "content": "Ho"}], **beside}
    examples = encode_rows([row], base.tokenizer, max_length=200)
    (ids,) = encode_prompts(base, [[USER]], **beside)
    assert shown(ids).startswith("T:add;D:Bo is a dog.;S:dry;<|im_start|>system")
    assert ids == examples.tokens[0][: int(np.argmax(examples.masks[0]))].tolist()


def test_variables_and_template_of_an_adapter_are_used_and_given_ones_come_on_top(getkey):
    base = toy_model(getkey())
    adapter = settled(toy_adapter(getkey(), base), template=TEMPLATE, arguments={"style": "dry"})
    (taught,) = encode_prompts(base, [[USER]], adapter)
    assert shown(taught).startswith("S:dry;<|im_start|>")
    (given,) = encode_prompts(base, [[USER]], adapter, chat_template_kwargs={"style": "wet"})
    assert shown(given).startswith("S:wet;<|im_start|>")
    (bare,) = encode_prompts(base, [[USER]])
    assert shown(bare).startswith("<|im_start|>")


def test_what_the_template_does_not_render_is_refused_in_prompts_too(getkey):
    base = toy_model(getkey())
    with pytest.raises(UserError, match='prompt 0: "tools": the chat template does not render'):
        encode_prompts(base, [[USER]], tools=TOOLS)
    with pytest.raises(UserError, match='prompt 0: "documents": the chat template does not'):
        encode_prompts(base, [[USER]], documents=DOCUMENTS)
    with pytest.raises(UserError, match="prompt 0: tools need chat messages"):
        encode_prompts(base, ["Hi"], tools=TOOLS)


def test_end_of_the_templates_turn_stops_chats_though_eos_is_another(getkey):
    """As a base whose eos is ``<|endoftext|>`` with a ChatML template."""
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = "<s>"
    base = toy_model(getkey(), tokenizer=tokenizer, eos_token_ids=(2,))
    assert stop_ids(base) == (2,)
    assert stop_ids(base, chat=True) == (2, 1)
    # A model that says nothing but the end of a turn, or an "a".
    head = np.zeros_like(base.params["lm_head"]["kernel"])
    hidden = jax.jit(lambda p, ids: base.module.apply(p, ids, return_hidden=True))
    (ids,) = encode_prompts(base, [[USER]])
    state = np.asarray(hidden(jp.bind(base.params, None), np.array([ids])))[0, -1]
    head[:, 1] = state
    base = base.replace(params={**base.params, "lm_head": {"kernel": head}})
    assert jp.generate(base, [[USER]], max_new_tokens=8) == [""]
    assert generate_ids(base, [ids], max_new_tokens=8) == [[1] * 8]


def test_tokens_that_ended_what_an_adapter_learned_stop_it(getkey):
    base = toy_model(getkey(), tokenizer=False)
    adapter = toy_adapter(getkey(), base)
    prompts = random_prompts([5, 9])
    (one, other) = generate_ids(base, prompts, adapter=adapter, max_new_tokens=12)
    taught = settled(adapter, stop_ids=(one[4],))
    assert stop_ids(base, taught) == (*stop_ids(base), one[4])
    answers = generate_ids(base, prompts, adapter=taught, max_new_tokens=12)
    cut = [ids[: ids.index(one[4])] if one[4] in ids else ids for ids in (one, other)]
    assert answers == cut
    assert len(answers[0]) <= 4


def test_exact_match_stops_at_what_ends_the_rows_turns(getkey, monkeypatch):
    base = toy_model(getkey(), tokenizer=toy_tokenizer(eos=False))
    asked = {}

    def answer(base, prompts, **options):
        asked.update(options)
        return [base.tokenizer("Ho", add_special_tokens=False).input_ids for _ in prompts]

    monkeypatch.setattr("jaxpeft.inference.metrics.generate_ids", answer)
    rows = [{"messages": [USER, {"role": "assistant", "content": "Ho"}]}]
    assert exact_match(base, rows)[0] == 1.0
    assert asked["stops"] == (1,)  # <|im_end|>, which neither model nor tokenizer names


def test_generate_takes_tools_documents_and_variables_from_the_command_line(
    getkey, tmp_path, monkeypatch, capsys
):
    base = toy_model(getkey(), tokenizer=toy_tokenizer(TEMPLATE))
    monkeypatch.setattr("jaxpeft.pretrained.load.load_model", lambda path, **_: base)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "documents.json").write_text(json.dumps(DOCUMENTS))
    generate_main(
        [
            *("--model", "m", "--max_new_tokens", "9"),
            *("--tools", str(tmp_path / "tools.json")),
            *("--documents", str(tmp_path / "documents.json")),
            *("--chat_template_kwargs", '{"style": "dry"}', "Hi"),
        ]
    )
    beside = {"tools": TOOLS, "documents": DOCUMENTS, "chat_template_kwargs": {"style": "dry"}}
    (expected,) = jp.generate(base, [[USER]], max_new_tokens=9, **beside)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tools", "none.json"], "--tools: none.json: cannot be read: No such file"),
        (["--tools", "broken.json"], "--tools: broken.json: not JSON: "),
        (["--documents", "object.json"], "--documents: object.json: expected a JSON list"),
        (["--chat_template_kwargs", "{"], "--chat_template_kwargs: not JSON: "),
        (["--chat_template_kwargs", "[]"], "--chat_template_kwargs: expected a JSON object"),
        (["--raw", "--tools", "t"], "--tools needs the chat template; leave out --raw or --tools"),
        (["--raw", "--documents", "t"], "--documents needs the chat template"),
        (["--raw", "--chat_template_kwargs", "{}"], "--chat_template_kwargs needs the chat"),
    ],
)
def test_what_generate_cannot_read_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('[{"name": ')
    (tmp_path / "object.json").write_text('{"name": "f"}')
    with pytest.raises(UserError) as caught:
        generate_main(["--model", "m", *arguments, "Hi"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
