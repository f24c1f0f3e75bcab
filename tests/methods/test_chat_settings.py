import json

import jax
import optax
import pytest
from tiny_models import hf_tensors, write_hf
from toy_model import toy_adapter, toy_model

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Label
from jaxpeft.methods.binding import init_adapter
from jaxpeft.methods.chat_settings import ChatSettings, chat_of
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.pretrained.adapters import load_adapter, save_adapter
from jaxpeft.pretrained.load import load_model

SETTINGS = ChatSettings("{{ 1 }}", {"enable_thinking": False, "größe": [1, None]}, (7, 2))


def test_settings_travel_with_a_saved_adapter(tmp_path):
    write_hf(tmp_path / "base", "llama", hf_tensors("llama"))
    base = load_model(tmp_path / "base")
    adapter = init_adapter(LoRA(rank=2), base, jax.random.key(0))
    assert chat_of(adapter) == ChatSettings() == chat_of(None)
    save_adapter(tmp_path / "plain", adapter, base)
    assert str(load_adapter(tmp_path / "plain", base).chat) == ""
    taught = adapter.replace(chat=SETTINGS.label())
    save_adapter(tmp_path / "taught", taught, base)
    assert chat_of(load_adapter(tmp_path / "taught", base)) == SETTINGS


def test_what_is_trained_is_saved_with_the_names_of_the_adapter_it_was(tmp_path):
    write_hf(tmp_path / "base", "llama", hf_tensors("llama"))
    base = load_model(tmp_path / "base")
    adapter = init_adapter(LoRA(rank=2), base, jax.random.key(0))
    adapter = adapter.replace(chat=SETTINGS.label(), base_revision=Label("v1"))
    tx = jp.masked(optax.sgd(0.1), jp.adapter_only)
    state = jp.init_train_state(base.params, adapter, tx, jax.random.key(1))
    save_adapter(tmp_path / "trained", state.adapter, base)
    assert chat_of(load_adapter(tmp_path / "trained", base)) == SETTINGS
    saved = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == base.name
    assert saved["revision"] == "v1"


def test_settings_do_not_tell_two_adapters_apart():
    assert hash(SETTINGS.label()) == hash(Label(""))
    assert SETTINGS.label() == Label("")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([], "chat: expected an object"),
        ({"stop": 1}, "chat.stop: unknown"),
        ({"template": None}, "chat.template: has the wrong type"),
        ({"stop_ids": [1, True]}, "chat.stop_ids: expected ids"),
        ({"stop_ids": [-1]}, "chat.stop_ids: expected ids"),
    ],
)
def test_settings_that_are_none_are_refused(values, what):
    with pytest.raises(UserError, match=f"^f.json: {what}"):
        ChatSettings.from_values(values, "f.json")


def adapters_with(*settings):
    base = toy_model(jax.random.key(0))
    return base, [
        toy_adapter(jax.random.key(place), base).replace(chat=one.label())
        for place, one in enumerate(settings)
    ]


def test_adapters_made_of_others_stop_where_any_of_them_stops():
    one, other = ChatSettings("t", {"a": 1}, (7,)), ChatSettings("t", {"a": 1}, (2, 9))
    base, several = adapters_with(one, other, ChatSettings())
    expected = ChatSettings("t", {"a": 1}, (7, 2, 9))
    assert chat_of(jp.stack_adapters(several)) == expected
    assert chat_of(jp.combine(several, [1.0, 0.5, 2.0])) == expected
    assert chat_of(jp.to_lora(several[0], base)[0]) == one


def test_settings_that_differ_are_left_out_and_named():
    _, several = adapters_with(ChatSettings("t", {}, (7,)), ChatSettings("u", {}, (7,)))
    with pytest.warns(UserWarning, match=r"different settings \(template\), of which the result"):
        made = jp.stack_adapters(several)
    assert chat_of(made) == ChatSettings(stop_ids=(7,))
