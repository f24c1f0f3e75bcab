import jax
import pytest
from tiny_models import hf_tensors, write_hf

from jaxpeft.chat_settings import ChatSettings, chat_of
from jaxpeft.errors import UserError
from jaxpeft.methods import LoRA, init_adapter
from jaxpeft.methods.base import Label
from jaxpeft.models.load import load_model
from jaxpeft.peft_format import load_adapter, save_adapter

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
