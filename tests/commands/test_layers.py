"""The layers that import-linter holds are those that the guide draws, and no face is imported."""

import ast
import re
import tomllib

from places import CONFIGS, ROOT, TESTS

PACKAGE = ROOT / "jaxpeft"
LAYERS = [
    name
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    if contract["type"] == "layers"
    for line in contract["layers"]
    for name in line.split(" | ")
]


def modules():
    """Every module of the package by its dotted name."""
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), file


def imported(file):
    """The modules that a file imports, at its top or inside of functions."""
    known = dict(modules())
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module)


def test_every_package_and_command_has_a_layer():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(LAYERS) == sorted(there - {"__init__", "__main__", "__pycache__", "py"})


def test_the_guide_draws_the_same_layers_from_top_to_bottom():
    text = (CONFIGS / "guides" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == LAYERS


def test_no_module_imports_the_face_of_a_package_it_lies_under():
    wrong = [
        f"{name} imports {other}"
        for name, file in modules()
        for other in imported(file)
        if other.startswith("jaxpeft") and (name == other or name.startswith(f"{other}."))
    ]
    assert wrong == []


def test_packages_and_files_stay_small():
    for folder in {file.parent for _, file in modules()}:
        files = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(files) <= 15, folder
        for file in files:
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 350, file


def test_no_test_imports_another_test():
    """What they share is a helper: a test's file cannot be imported by its name."""
    wrong = [
        f"{file} imports {name}"
        for file in TESTS.rglob("*.py")
        if "golden" not in file.parts
        for name in imported(file)
        if name.startswith("test_")
    ]
    assert wrong == []
