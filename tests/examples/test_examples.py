"""The examples: what each prints is true, and equals its slow form."""

import importlib
import pkgutil
import runpy
import sys

import pytest

from vmapsafe import examples
from vmapsafe.examples import digits

# What ``main`` of each returns: the least and the most.
FOUND = {
    "attribution": {
        "correlation": (0.9, 1),
        "sketches": (0.25, 1),
        "exact rows": (0.25, 1),
        "same class": (0.2, 1),
    },
    "clipped_training": {
        "difference": (0, 1e-12),
        "clipped": (0.1, 0.9),
        "accuracy": (0.85, 1),
    },
    "ntk": {
        "difference": (0, 1e-10),
        "smallest eigenvalue": (-1e-12, 1),
        "alignment before": (0.3, 1),
        "alignment after": (0.55, 1),
        "accuracy": (0.92, 1),
        "accuracy of pixels": (0.7, 0.92),
    },
    "maml": {"difference": (0, 1e-10), "before": (0.4, 0.87), "after": (0.87, 1)},
    "ensemble": {
        "difference of weights": (0, 1e-10),
        "difference of statistics": (0, 1e-10),
        "accuracy": (0.92, 1),
        "accuracy of one": (0.88, 1),
    },
}


@pytest.mark.parametrize("name", FOUND)
def test_numbers(name, capsys):
    """Differences from a slow form are rounding; the other numbers show that the
    example does what it is for."""
    pytest.importorskip("sklearn")
    found = importlib.import_module(f"vmapsafe.examples.{name}").main()
    assert found.keys() == FOUND[name].keys()
    for what, (least, most) in FOUND[name].items():
        assert least <= found[what] <= most, (what, found[what])
    printed = capsys.readouterr().out
    assert 2 <= len(printed.splitlines()) <= 6
    if name == "clipped_training":
        assert "not differentially private by itself" in printed


def test_all_are_here():
    """Every file of the folder is run above."""
    folder = examples.__path__[0]
    files = pkgutil.iter_modules([folder])
    assert {file.name for file in files} == {"digits", "wrong_labels", *FOUND}


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        digits.load()
    assert str(caught.value) == (
        "vmapsafe.examples: the digits come with scikit-learn, which cannot be "
        'imported here. pip install "vmapsafe[demo]".'
    )


def test_as_a_script(monkeypatch):
    """``python -m vmapsafe.examples.NAME`` calls main."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for name in FOUND:
        monkeypatch.delitem(sys.modules, f"vmapsafe.examples.{name}", raising=False)
        with pytest.raises(ModuleNotFoundError, match="come with scikit-learn"):
            runpy.run_module(f"vmapsafe.examples.{name}", run_name="__main__")
