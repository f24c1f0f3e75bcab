"""A saved soft prompt of another width or count of tokens than its config or base is refused."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import D, hf_tensors, write_hf

import jaxpeft as jp
from jaxpeft.core.errors import UserError

TOKENS = 3


def prompt_folder(folder: pathlib.Path, width: int, tokens: int) -> pathlib.Path:
    """A prompt as PEFT saves one: ``prompt_embeddings`` of shape (tokens, width)."""
    folder.mkdir()
    values = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": TOKENS, "token_dim": D}
    (folder / "adapter_config.json").write_text(json.dumps(values | {"task_type": "CAUSAL_LM"}))
    rows = np.arange(tokens * width, dtype=np.float32).reshape(tokens, width)
    save_file({"prompt_embeddings": rows}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jp.load_model(write_hf(tmp_path_factory.mktemp("base"), "llama", hf_tensors("llama")))


def test_a_prompt_that_fits_is_read(tmp_path, base):
    folder = prompt_folder(tmp_path / "a", D, TOKENS)
    jp.save_adapter(tmp_path / "b", jp.load_adapter(folder, base), base)
    saved = load_file(tmp_path / "b" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        saved["prompt_embeddings"], np.arange(TOKENS * D, dtype=np.float32).reshape(TOKENS, D)
    )


@pytest.mark.parametrize(("width", "tokens"), [(D + 8, TOKENS), (D, TOKENS + 1), (D, TOKENS - 1)])
def test_a_prompt_of_another_size_is_one_line(tmp_path, base, width, tokens):
    with pytest.raises(UserError) as error:
        jp.load_adapter(prompt_folder(tmp_path / "a", width, tokens), base)
    text = str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in text
    assert f"is [{tokens}, {width}], expected [{TOKENS}, {D}]" in text
