"""Code outside of a family knows neither its name nor the names of its arrays.

What such code has to know a family declares in its `Kind`. The tests read the source of the
package; the declarations themselves are compared with the arrays of every family's adapters.
"""

import ast
import dataclasses
import functools
import pathlib

import jax
import pytest
from tiny_decoder import CONFIG, decoder

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.adapter import DROPOUT, RANK, SCALE
from jaxpeft.methods.method import Context
from jaxpeft.methods.registry import KINDS, METHODS

ROOT = pathlib.Path(jp.__file__).parent
FAMILIES = ("lora", "adalora", "kernels", "leaves", "prompts")
ALLOWED = {
    ("__init__.py", ""),  # the list of public names
    ("methods/builtin.py", ""),  # the list of families
    ("methods/algebra/combine.py", "jaxpeft.methods.lora.plain"),  # what it makes is a LoRA
    ("methods/algebra/convert.py", "jaxpeft.methods.lora.plain"),
}
ARRAYS = sorted({name for kind in KINDS.values() for name in kind.arrays})

BIASED = dataclasses.replace(CONFIG, model_type="qwen2", qkv_bias=True)
SMALL = {"rank": 2, "num_tokens": 3, "block_size": 4, "hidden_size": 8}
TOKENS = {"token_ids": (3, 7)}


def small(cls):
    """A config of the class, with small sizes where it has such fields."""
    values = SMALL | (TOKENS if cls is jp.TrainableTokens else {})
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


CASES = {name: small(cls) for name, cls in METHODS.items()} | {
    "lora-dora": jp.LoRA(rank=2, dora=True, targets=("embed_tokens", "v_proj")),
    "lora-saved": jp.LoRA(
        rank=2, bias="all", lora_bias=True, save_modules=("norm",), targets=("q_proj",)
    ),
    "lora-tokens": jp.LoRA(rank=2, targets=("q_proj",), **TOKENS),
    "lora-pissa": jp.LoRA(rank=2, init_weights="pissa", targets=("q_proj",)),
    "lokr-both": jp.LoKr(rank=1, decompose_both=True, decompose_factor=4),
}


@functools.cache
def shapes_of(method):
    """The shapes of a new adapter."""
    module, params = decoder(BIASED)
    context = Context(config=BIASED, module=module)
    return jax.eval_shape(lambda leaves: method.init(leaves, jax.random.key(0), context), params)


def sources():
    """Every module outside of the families' folders, parsed, by its path in the package."""
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith(tuple(f"methods/{family}/" for family in FAMILIES)):
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def texts(node):
    """The texts of a literal: one, or those of a tuple, list or set."""
    items = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {item.value for item in items if isinstance(item, ast.Constant)}


def comparisons(tree):
    """The operands of every ``==``, ``!=``, ``in`` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield node, [node.left, *node.comparators]


def test_no_module_imports_a_family():
    folders = tuple(f"jaxpeft.methods.{family}" for family in FAMILIES)
    found = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                modules += [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            inside = [m for m in modules if m.startswith(folders)]
            if inside and not {(name, ""), (name, inside[0])} & ALLOWED:
                found.add((name, inside[0]))
    assert not found


def test_no_module_compares_a_kind_or_a_methods_name_with_a_literal():
    found = []
    for name, tree in sources():
        for node, operands in comparisons(tree):
            attributes = {o.attr for o in operands if isinstance(o, ast.Attribute)}
            if attributes & {"kind", "name"} and any(texts(o) & METHODS.keys() for o in operands):
                found.append(f"{name}:{node.lineno}")
    assert not found


def test_no_module_looks_for_an_array_by_its_name():
    """Neither by the end of a path, as in ``path.endswith("/b")``, nor as in ``"b" in arrays``."""
    endings, found = {f"/{array}" for array in ARRAYS}, []
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in endings:
                found.append(f"{name}:{node.lineno}")
        for node, operands in comparisons(tree):
            if any(texts(operand) & set(ARRAYS) for operand in operands):
                found.append(f"{name}:{node.lineno}")
    assert not found


@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
def test_declared_roles_are_those_of_the_arrays(method):
    """The axis of the rank is as wide as it, the arrays of a side are as long as that side."""
    adapter = shapes_of(method)
    kind, width = KINDS[adapter.spec.kind], adapter.spec.rank
    for path in adapter.spec.paths:
        shape = kind.leaf_shape(paths.get(adapter.params, path))
        for name, array in paths.get(adapter.params, path).items():
            role, own = kind.role(name), array.shape[paths.is_stacked(path) :]
            if role.rank_axis is not None:
                assert own[role.rank_axis] == width, (path, name)
                assert paths.get(adapter.buffers, f"{path}/rank") is not None
            if role.side is not None and shape is not None:
                axis = -2 if role.rank_axis == -1 else -1
                assert own[axis] == shape[-2 if role.side == "in" else -1], (path, name)
            if role.replaces == "whole":
                assert array.shape == shape, (path, name)


def test_no_module_asks_for_an_array_or_an_option_of_a_family():
    """Neither as in ``arrays["b"]`` nor as in ``options.get("num_tasks")``.

    The rooms of rows of data and of configs have keys of their own with such names.
    """
    known, found = set(), []
    for method in CASES.values():
        adapter = shapes_of(method)
        leaves = paths.flatten(adapter.params) | paths.flatten(adapter.buffers)
        known |= {path.rpartition("/")[2] for path in leaves} | dict(adapter.spec.options).keys()
    known -= {RANK, SCALE, DROPOUT, "rows", "steps"}  # every family's, and words of reports
    for name, tree in sources():
        if name.startswith(("data/", "config/", "pretrained/", "methods/peft/")):
            continue
        for node in ast.walk(tree):
            asked = node.slice if isinstance(node, ast.Subscript) else None
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
                asked = node.args[0] if node.args else None
            if asked is not None and texts(asked) & known:
                found.append(f"{name}:{node.lineno}: {texts(asked)}")
    assert not found


def test_every_declared_array_is_one_of_a_family():
    found = {}
    for method in CASES.values():
        adapter = shapes_of(method)
        leaves = paths.flatten(adapter.params) | paths.flatten(adapter.buffers)
        names = found.setdefault(adapter.spec.kind, set())
        names |= {path.rpartition("/")[2] for path in leaves}
    for name, kind in KINDS.items():
        assert {*kind.arrays, *kind.compared, *(kind.lora_fa or ())} <= found[name], name
