"""What docstrings say of arguments, results and errors, beyond what flake8 checks."""

import ast
import builtins
import importlib
import inspect
import re
from pathlib import Path

import pytest

import vmapsafe
from vmapsafe import testing
from vmapsafe._rows import record

ROOT = Path(vmapsafe.__file__).parent
PUBLIC = [
    getattr(module, name)
    for module in (vmapsafe, testing)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
]


def sections(text):
    """{the name of a section: its text}"""
    parts = re.split(r"^(\w+):$", inspect.cleandoc(text or ""), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def raised(function):
    """The names of errors in raise statements, not of functions inside this one."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.exc.func.id
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)


def undocumented(source, names):
    """(function, error) where a Raises section misses an error of the body."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            text = sections(ast.get_docstring(node)).get("Raises")
            if text is not None:
                documented = re.findall(r"^    (\w+):", text, re.MULTILINE)
                classes = tuple([names[name] for name in documented])
                for name in raised(node):
                    if not issubclass(names[name], classes):
                        yield node.name, name


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(ROOT.rglob("*.py")) if "Raises:" in path.read_text()],
    ids=lambda path: path.stem,
)
def test_errors_are_documented(path):
    """A Raises section names every error of the body, or a class that it belongs to."""
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    names = {**vars(builtins), **vars(vmapsafe), "Unrecordable": record.Unrecordable}
    names.update(vars(importlib.import_module(name)))
    assert list(undocumented(path.read_text(), names)) == []


def test_an_error_that_is_not_documented_is_found():
    source = '''def f(x):
        """Do something.

        Raises:
            KeyError: sometimes.
        """
        if x:
            raise KeyError(x)
        raise TypeError(x)
    '''
    assert list(undocumented(source, vars(builtins))) == [("f", "TypeError")]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_public_functions_have_sections(function):
    found = sections(function.__doc__)
    assert "Args" in found
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert "Returns" in found
