"""Docstrings name the errors of public functions: all that they raise, and no others."""

import ast
import builtins
import functools
import inspect
import pathlib
import re
from collections import defaultdict

import jaxpeft

ROOT = pathlib.Path(inspect.getfile(jaxpeft)).parent
MODULES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}
SOME = "an error made by another function"  # ``raise report(...)``: any name will do
OF_PYTHON = {
    "Exception",
    "KeyError",
    "OSError",
    "RecursionError",
    "SystemExit",
    "TypeError",
}  # it raises them itself
OF_BUILTINS = {name for cls in (bytes, dict, list, pathlib.Path, set, str) for name in dir(cls)}
SCOPES = (ast.FunctionDef, ast.ClassDef, ast.Lambda)


class Function:
    """A function of a module, or a method of one of its classes."""

    def __init__(self, module, owner, node):
        self.module, self.owner, self.node = module, owner, node
        self.name = f"{owner}.{node.name}" if owner else node.name
        self.public = not any(part.startswith("_") for part in self.name.split("."))

    def told(self):
        text = (ast.get_docstring(self.node) or "") + "\n"
        section = re.search(r"\nRaises:\n((?:    .*\n)+)", text)
        return set(re.findall(r"^    (\w+):", section[1], re.MULTILINE)) if section else set()


def functions_of(module, tree):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield Function(module, None, node)
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef):
                yield Function(module, node.name, part)


def last_name(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


FUNCTIONS = [one for module, tree in MODULES.items() for one in functions_of(module, tree)]
PUBLIC = [one for one in FUNCTIONS if one.public]
BASES = {
    node.name: [last_name(base) for base in node.bases]
    for tree in MODULES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}
CALLABLE = defaultdict(list)  # by the name in a call: that of a function, or of a class
for one in FUNCTIONS:
    CALLABLE[one.node.name].append(one)
    if one.node.name in ("__init__", "__post_init__"):
        CALLABLE[one.owner].append(one)


def and_bases(name):
    """The names of a class of errors and of all that it inherits from."""
    if name in BASES:
        return {name}.union(*map(and_bases, BASES[name]))
    return {cls.__name__ for cls in getattr(getattr(builtins, str(name), None), "__mro__", ())}


def parts_of(node, caught=frozenset(), *, nested=False):
    """The nodes of a body, each with the names of the errors that are caught around it.

    Functions and classes that are defined in the body are left out unless `nested`.
    """
    for field, value in ast.iter_fields(node):
        inside = caught
        if isinstance(node, ast.Try) and field == "body":
            kinds = [handler.type for handler in node.handlers]
            kinds = [kind.elts if isinstance(kind, ast.Tuple) else [kind] for kind in kinds]
            names = {
                last_name(kind) if kind else "BaseException" for some in kinds for kind in some
            }
            inside = caught | names
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST) and (nested or not isinstance(part, SCOPES)):
                yield part, inside
                yield from parts_of(part, inside, nested=nested)


def error_of(node):
    """The name of the error in a ``raise``; None for one that was caught before."""
    name = last_name(node.func if isinstance(node, ast.Call) else node)
    if isinstance(node, ast.Call):
        return name if name in BASES or hasattr(builtins, str(name)) else SOME
    return name if name and name[0].isupper() else None


@functools.cache
def body_of(function, *, nested):
    return list(parts_of(function.node, nested=nested))


def raised(function, seen=frozenset()):
    """Errors that leave a function, through private functions of its module too."""
    found = set()
    for part, caught in body_of(function, nested=False):
        errors = set()
        if isinstance(part, ast.Raise) and part.exc is not None:
            errors = {error_of(part.exc)} - {None}
        if isinstance(part, ast.Call) and (last_name(part.func) or "").startswith("_"):
            for other in CALLABLE.get(last_name(part.func), ()):
                near = other.module == function.module and other.owner in (None, function.owner)
                if near and other not in seen:
                    errors |= raised(other, seen | {function})
        found |= {error for error in errors if not and_bases(error) & caught}
    return found


@functools.cache
def imported(module):
    """For every name that a module imports from the package, where it comes from: file, name."""
    found = {}
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxpeft"):
            place = node.module.removeprefix("jaxpeft").strip(".").replace(".", "/")
            for alias in node.names:
                file = f"{place}/{alias.name}.py".lstrip("/")
                whole = (file, None) if file in MODULES else (f"{place}.py", alias.name)
                found[alias.asname or alias.name] = whole
    return found


@functools.cache
def named_in(module):
    return {last_name(node) for node in ast.walk(MODULES[module])} | {
        node.name for node in MODULES[module].body if isinstance(node, ast.ClassDef)
    }


def meant(function, node):
    """The functions that a name in a body may mean.

    A method may be that of any class that the module names, or of one that inherits from it; if
    there is none and no type of Python has such a method, it may be that of any class.
    """
    name = last_name(node)
    if isinstance(node, ast.Name):
        module, name = imported(function.module).get(name, (function.module, name))
        if name is None:
            return []
        return [one for one in CALLABLE.get(name, ()) if one.module == module]
    module, _ = imported(function.module).get(last_name(node.value), (None, None))
    if module:
        return [one for one in CALLABLE.get(name, ()) if one.module == module]
    known, methods = named_in(function.module), [one for one in CALLABLE.get(name, ()) if one.owner]
    some = [one for one in methods if and_bases(one.owner) & known]
    return some or ([] if name in OF_BUILTINS else methods)


@functools.cache
def near(function):
    """Names of errors in a body, and the functions that it may call."""
    names, ahead = set(), []
    for part, _ in body_of(function, nested=True):
        if isinstance(part, ast.Name | ast.Attribute):
            names.add(last_name(part))
            ahead += meant(function, part)
    return names, ahead


def within_reach(function):
    """Names of the errors in a function and in all functions of the package it may call."""
    names, seen, ahead = set(), set(), [function]
    while ahead:
        one = ahead.pop()
        if one not in seen:
            seen.add(one)
            names |= near(one)[0]
            ahead += near(one)[1]
    return names


def test_every_error_that_a_public_function_raises_is_in_its_docstring():
    missing = []
    for function in PUBLIC:
        told = function.told()
        for error in raised(function):
            known = bool(told) if error == SOME else bool(told & and_bases(error))
            if not known:
                missing.append(f"{function.module}:{function.node.lineno} {function.name}: {error}")
    assert not missing, "\n".join(missing)


def passed_on(function):
    """Errors that the docstrings of the public functions that it calls tell of."""
    found = set()
    for part, caught in body_of(function, nested=False):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name | ast.Attribute):
            for other in meant(function, part.func):
                if other.public and other.owner is None:
                    found |= {error for error in other.told() if not and_bases(error) & caught}
    return found


def test_the_public_names_tell_of_the_errors_of_what_they_call():
    missing = []
    homes = {(getattr(jaxpeft, name).__module__, name) for name in jaxpeft.__all__}
    for function in PUBLIC:
        module = "jaxpeft." + function.module.removesuffix(".py").replace("/", ".")
        if (module, function.owner or function.name) in homes:
            told = function.told()
            for error in passed_on(function):
                if not told & and_bases(error):
                    missing.append(
                        f"{function.module}:{function.node.lineno} {function.name}: {error}"
                    )
    assert not missing, "\n".join(missing)


def test_every_error_in_a_docstring_can_be_raised():
    strange = []
    for function in PUBLIC:
        reach = within_reach(function) if function.told() else set()
        for error in function.told() - reach - OF_PYTHON:
            strange.append(f"{function.module}:{function.node.lineno} {function.name}: {error}")
    assert not strange, "\n".join(strange)
