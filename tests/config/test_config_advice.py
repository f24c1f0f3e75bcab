"""How to write what was probably meant: said where it helps, and following it works."""

import re

import pytest
from config_values import SMALL, value

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.ops.quant import check_quant_type


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("'0-1'", "; write [0, 1]"),
        ("0-3", "; write [0, 1, 2, 3]"),
        ("0..2", "; write [0, 1, 2]"),
        ("0:2", "; write [0, 1, 2]"),
        ("0 to 2", "; write [0, 1, 2]"),
        ("0-79", "; write every number: [0, 1, ..., 79]"),
        ("'0,1'", "; write [0, 1]"),
        ("'(0, 1)'", "; write [0, 1]"),
        ("'1'", "; write [1]"),
        ("all", ""),
        ("3-1", ""),
        ("first", ""),
    ],
)
def test_a_list_of_layers_is_written_out(problems, load, text, advice):
    (line,) = problems(SMALL.replace("name: lora", f"name: lora, layers: {text}"))
    assert line.startswith("c.yaml:2: method.layers: expected a ")
    assert line.partition(", got ")[2].strip().partition(";")[1:] == advice.partition(";")[1:]
    written = re.search(r"write (\[[\d, ]+\])$", line)
    if written:
        config = load(SMALL.replace("name: lora", f"name: lora, layers: {written[1]}"))
        assert str(list(config.method.layers)) == written[1]


@pytest.mark.parametrize(
    ("key", "given", "write"),
    [
        ("model.quantization", "4bit", "nf4"),
        ("model.quantization", "'4-bit'", "nf4"),
        ("model.quantization", "4", "nf4"),
        ("model.quantization", "true", "nf4"),
        ("model.quantization", "bitsandbytes", "nf4"),
        ("model.quantization", "bnb_4bit", "nf4"),
        ("model.quantization", "load_in_4bit", "nf4"),
        ("model.quantization", "8bit", "int8"),
        ("model.quantization", "LLM.int8", "int8"),
        ("model.quantization", "load_in_8bit", "int8"),
        ("model.quantization", "none", "null"),
        ("model.dtype", "bf16", "bfloat16"),
        ("model.dtype", "torch.bfloat16", "bfloat16"),
        ("model.dtype", "fp16", "bfloat16"),
        ("model.dtype", "float16", "bfloat16"),
        ("model.dtype", "fp32", "float32"),
        ("model.compute_dtype", "bf16", "bfloat16"),
        ("optim.name", "adamw_torch", "adamw"),
        ("optim.name", "paged_adamw_8bit", "adamw"),
        ("optim.schedule", "constant_with_warmup", "constant"),
        ("train.remat", "true", "full"),
        ("train.remat", "false", "none"),
    ],
)
def test_another_librarys_value_is_answered_with_ours(problems, load, key, given, write):
    flag = f"--{key}"
    (line,) = problems(SMALL, flag, given.strip("'"))
    assert line.startswith(f"{flag}: expected one of ")
    found = re.search(r'(?:write |did you mean ")(\w+)', line)
    assert found is not None
    assert found[1] == write
    load(SMALL, flag, write)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_weights_that_are_not_read_are_called_so(problems, kind):
    (line,) = problems(SMALL, "--model.quantization", kind)
    assert "such weights are not read: give the plain model" in line


def test_commands_and_functions_say_the_same():
    with pytest.raises(UserError, match=r"got '4bit'; write nf4"):
        check_quant_type("4bit")
    with pytest.raises(UserError, match=r"got 'none'; leave it out"):
        check_quant_type("none")
    with pytest.raises(UserError, match=r"^dtype: 'bf16' is not one of .*; write bfloat16"):
        jp.load_model("absent/model.gguf", dtype="bf16")
    with pytest.raises(UserError, match=r"^dtype: 'fp16' is not one of .*; write float16"):
        jp.load_model("absent/model.gguf", dtype="fp16")


@pytest.mark.parametrize(
    ("key", "text", "helps"),
    [("count", '"8"', True), ("count", '"eight"', False), ("number", '"1e-4"', True),
     ("number", '"fast"', False), ("flag", '"true"', True), ("flag", '"maybe"', False)],
)  # fmt: skip
def test_quotes_are_to_be_dropped_only_where_that_helps(key, text, helps):
    with pytest.raises(UserError) as error:
        value(key, text)
    assert str(error.value).endswith("; drop the quotes") == helps
    if helps:
        value(key, text.strip('"'))
