"""Folders that say how their LoRA started: what leaves the base alone, and what can't be repeated.

Those that take a part of the base off are ``lora_pissa`` and ``lora_olora`` of the golden methods.
"""

import jax
import pytest
from lora_goldens import (
    BASE,
    assert_one_line,
    assert_same_adapter,
    copy_golden,
    edit_config,
    golden,
)

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.pretrained.adapters import load_adapter


@pytest.mark.parametrize("init", [None, False, "Gaussian", "orthogonal", "eva", "mica"])
def test_a_start_that_leaves_the_base_alone_changes_nothing(tmp_path, init):
    folder, base = copy_golden("qv", tmp_path)
    edit_config(folder, init_lora_weights=init)
    assert_same_adapter(load_adapter(folder, base), load_adapter(golden("qv")[0], base))


@pytest.mark.parametrize(
    ("init", "values", "part"),
    [
        ("pissa_niter_16", {}, "a random approximation off the base, which cannot be repeated"),
        ("corda", {}, "'corda' is not supported yet: it changes the base model; convert"),
        ("loftq", {}, "'loftq': PEFT rounds the base's weights when it loads this"),
        ("pissa", {"use_dora": True}, "use_dora: expected false with init_lora_weights 'pissa'"),
        ("olora", {"lora_bias": True}, "lora_bias: expected false with init_lora_weights 'olora'"),
        ("pissa", {"lora_alpha": 0}, "needs a positive alpha, model.layers.0.self_attn.q_proj"),
        ("pissa", {"r": 17}, "rank 17 exceeds the smaller side of model.layers.0.self_attn.v_proj"),
        ("olora", {"target_modules": ["lm_head"]}, "for lm_head, of which PEFT saves a changed"),
        ("olora", {"target_modules": ["embed_tokens"]}, "not supported for model.embed_tokens"),
    ],
)
def test_a_start_that_cannot_be_repeated_is_an_error(tmp_path, init, values, part):
    folder, base = copy_golden("qv", tmp_path)
    edit_config(folder, init_lora_weights=init, **values)
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    assert_one_line(error, folder, part)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_part_of_the_base_is_taken_off_full_weights_only(tmp_path, init):
    folder, base = copy_golden("qv", tmp_path)
    edit_config(folder, init_lora_weights=init)
    for params, part in (
        (jax.eval_shape(lambda: BASE["llama3"].params), "pass it: load_adapter(..., base)"),
        (jp.quantize(base.params, "int8"), "this base is quantised; load the adapter on the full"),
    ):
        with pytest.raises(UserError) as error:
            load_adapter(folder, base.replace(params=params))
        assert_one_line(error, folder, f"init_lora_weights: '{init}' takes a part", part)
