"""The package's face: what it exports, how quickly, and that all of it is explained."""

import ast
import importlib
import inspect
import json
import pathlib
import subprocess
import sys

import jax
import pytest

import jaxpeft as jp
from jaxpeft.methods.registry import METHODS

HEAVY = (
    "jax",
    "flax",
    "optax",
    "transformers",
    "datasets",
    "grain",
    "orbax",
    "matplotlib",
    "huggingface_hub",
    "safetensors",
    "gguf",
    "rich",
)
CONFIGS = sorted(config.__name__ for config in METHODS.values())
RECORDS = [name for name in jp.__all__ if inspect.isclass(getattr(jp, name))]
FUNCTIONS = [name for name in jp.__all__ if name not in RECORDS]


def run(code):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_at_most_forty_names_are_public_beside_the_methods():
    assert len(jp.__all__) <= 40 + len(CONFIGS)


def test_importing_the_package_is_quick_and_imports_nothing_heavy():
    code = f"""
import sys, time
start = time.process_time()
import jaxpeft
seconds = time.process_time() - start
print([name for name in {HEAVY} if name in sys.modules], seconds < 0.5)
"""
    assert run(code) == "[] True\n"


def test_loading_and_training_names_leave_out_what_only_some_commands_need():
    heavy = [name for name in HEAVY if name not in ("jax", "flax", "optax", "rich")]  # flax: rich
    code = f"""
import sys, jaxpeft
for name in jaxpeft.__all__:
    getattr(jaxpeft, name)
print([name for name in {heavy} if name in sys.modules])
"""
    assert run(code) == "[]\n"


@pytest.mark.parametrize("name", ["load_model", "quantize"])
def test_a_name_may_be_the_first_that_is_asked_for(name):
    """Modules import each other from the package, which must not answer by importing methods."""
    assert run(f"import jaxpeft\nprint(jaxpeft.{name}.__name__)") == f"{name}\n"


def test_editors_are_told_the_names_that_exist():
    tree = ast.parse(pathlib.Path(inspect.getfile(jp)).read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    told = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            assert alias.asname == alias.name, "without `as` it counts as private"
            told[alias.name] = getattr(importlib.import_module(statement.module), alias.name)
    assert sorted(told) == jp.__all__
    assert all(getattr(jp, name) is value for name, value in told.items())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'jaxpeft' has no attribute 'generat'"):
        _ = jp.generat
    assert {*jp.__all__} == {name for name in dir(jp) if not name.startswith("_")}


def test_type_checkers_know_the_names_their_types_and_no_others(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(
        """import numpy as np

import jaxpeft as jp

model = jp.load_model("model")
reveal_type(model)
ids = np.zeros((1, 2), np.int32)
reveal_type(jp.with_prompt(None, ids, ids))
model.replace(name="other").weights
jp.generat
"""
    )
    root = pathlib.Path(inspect.getfile(jp)).parent.parent
    found = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", str(file)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    told = [
        (entry["range"]["start"]["line"] + 1, entry["severity"], entry["message"].split("\n")[0])
        for entry in json.loads(found.stdout)["generalDiagnostics"]
    ]
    assert told == [
        (6, "information", 'Type of "model" is "Model"'),
        (8, "information", 'Type of "jp.with_prompt(None, ids, ids)" is "Prompted"'),
        (9, "error", 'Cannot access attribute "weights" for class "Model"'),
        (10, "error", '"generat" is not a known attribute of module "jaxpeft"'),
    ]
    assert (pathlib.Path(inspect.getfile(jp)).parent / "py.typed").is_file()


def test_nnx_is_imported_by_those_who_use_it():
    code = """
import sys
import jaxpeft as jp
for name in jp.__all__:
    getattr(jp, name)
print("flax.nnx" in sys.modules)
"""
    assert run(code) == "False\n"


def test_methods_and_adapters_are_printed_in_a_line():
    base = {"layers": {"mlp": {"up_proj": {"kernel": jax.numpy.ones((3, 4, 5))}}}}
    adapter = jp.init_adapter(jp.LoRA(rank=2, dora=True), base, jax.random.key(0))
    assert repr(adapter) == "Adapter(lora, rank 2, 1 places, 69 trained numbers)"
    assert str(jp.LoRA(rank=2, dora=True)) == "lora(rank=2, dora=True)"
    assert str(jp.TrainableTokens(token_ids=(3,))) == "trainable_tokens(token_ids=(3,))"


@pytest.mark.parametrize("first", ["import jaxpeft.generate, jaxpeft.merge", "import jaxpeft"])
def test_commands_do_not_take_the_place_of_the_functions_of_their_name(first):
    code = f"""
{first}
import jaxpeft as jp
from jaxpeft import generate, merge
from jaxpeft.generate import main as generate_command
from jaxpeft.merge import main as merge_command
assert generate is jp.generate and merge is jp.merge
print(generate.__module__, merge.__module__, generate_command.__module__, merge_command.__module__)
"""
    assert (
        run(code)
        == "jaxpeft.inference.decoding jaxpeft.methods.merging jaxpeft.generate jaxpeft.merge\n"
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_explains_every_argument_and_the_result(name):
    function = getattr(jp, name)
    text = inspect.getdoc(function)
    arguments = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    for parameter in inspect.signature(function).parameters.values():
        assert f"    {parameter.name.lstrip('*')}: " in arguments.replace("*", ""), parameter
    returns = ast.parse(inspect.getsource(inspect.unwrap(function))).body[0].returns
    if ast.unparse(returns) != "None":
        assert "\nReturns:\n" in text


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "UserError"])
def test_docstring_explains_every_field_or_argument_of_a_class(name):
    classes = getattr(jp, name).__mro__[:-1]  # a field that is inherited is explained there
    text = "\n".join(inspect.getdoc(cls) or "" for cls in classes)
    for parameter in inspect.signature(getattr(jp, name)).parameters:
        assert f"    {parameter}: " in text
