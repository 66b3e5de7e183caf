"""Errors say in three parts what was called, what was found and what to do."""

import ast
import copy
import pickle
from pathlib import Path

import pytest
from torch import nn

import vmapsafe
from vmapsafe import VmapSafeError, vmap_safe

ROOT = Path(vmapsafe.__file__).parent
# Files in which another error is meant: of attributes, of comparisons, of a shell.
OTHERS = {
    "_block/switched.py": {"AttributeError"},
    "_check/command.py": {"_BadUsage", "ArgumentTypeError"},
    "_data/folder.py": {"ValueError"},  # caught there, as numpy's are
    "_data/journal.py": {"ValueError"},
    "_data/npy.py": {"ValueError"},
    "_rows/compute.py": {"Unrecordable"},
    "_rows/layers.py": {"NotAlike"},
    "_rows/merged.py": {"NotAlike"},
    "_rows/record.py": {"Unrecordable"},
    "_rows/traced.py": {"Unrecordable", "NotImplementedError"},
    "_processes.py": {"failed"},  # what failed in this process
    "examples/wrong_labels.py": {"ArgumentTypeError"},
    "rules/alike.py": {"NotAlike"},
    "rules/alike_losses.py": {"NotAlike"},
    "rules/alike_shapes.py": {"NotAlike"},
    "rules/formulas.py": {"NotImplementedError"},
    "rules/recurrent.py": {"NotUnderVmap"},  # one of ours, for those who catch it
    "rules/sync.py": {"AssertionError"},
    "testing.py": {"TypeError", "AssertionError", "ValueError"},
}


def raised(path):
    """The names of what a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            what = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            yield what.attr if isinstance(what, ast.Attribute) else what.id


def is_ours(name):
    kind = getattr(vmapsafe, name, None)
    return isinstance(kind, type) and issubclass(kind, VmapSafeError)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.stem)
def test_the_package_raises_its_own_errors(path):
    others = OTHERS.get(path.relative_to(ROOT).as_posix(), set())
    made = {"one_value", "error"}  # functions and fields that give one of ours
    assert {name for name in raised(path) if not is_ours(name)} <= others | made


def test_parts():
    with pytest.raises(ValueError) as caught:
        vmap_safe(nn.ReLU(), mode="evil")
    error = caught.value
    assert isinstance(error, VmapSafeError)
    assert error.called == "vmap_safe(...)"
    assert error.found == "unknown mode 'evil'"
    assert error.do.startswith('Choose one of "eval", ')
    assert str(error) == f"{error.called}: {error.found}. {error.do}."


@pytest.mark.parametrize("name", [n for n in vmapsafe.__all__ if is_ours(n)])
def test_copies(name):
    """An error crosses processes, as from a worker of a DataLoader."""
    error = getattr(vmapsafe, name)("f(...)", "x is 3", "Pass 4")
    error.add_note("a note")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error) and str(other) == "f(...): x is 3. Pass 4."
        assert (other.called, other.found, other.do) == error.args
        assert other.__notes__ == ["a note"]


def test_an_error_of_one_text():
    """As somebody else's code, a mock say, would make it."""
    error = vmapsafe.BlockError("no")
    assert (str(error), error.called, error.found, error.do) == ("no", "", "no", "")
