"""The examples: what each prints is true, and equals its slow form."""

import importlib
import pkgutil
import re
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

from vmapsafe import examples
from vmapsafe.examples import digits, ewc, noise_scale, selection, tracin

# What ``main`` of each returns: the least and the most.
FOUND = {
    "attribution": {
        "correlation": (0.9, 1),
        "marked, gradients": (0.9, 1),
        "marked, pixels": (0, 0.3),
        "marked, features": (0, 0.7),
        "marked, random": (0.1, 0.5),
        "read as 0, all images": (0.4, 1),
        "read as 0, gradients": (0, 0.1),
        "read as 0, pixels": (0.3, 1),
        "read as 0, features": (0.15, 1),
        "read as 0, random": (0.3, 1),
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
    "noise_scale": {
        "difference of weights": (0, 1e-12),
        "difference of statistics": (0, 1e-12),
        "difference of norms": (0, 1e-12),
        "first scale": (30, 70),
        "last scale": (80, 200),
        "too large in sync": (1.1, 1.4),
        "too large in eval": (0.9, 1.1),
    },
    "many_processes": {
        "batches": (24, 24),
        "difference": (0, 0),
        "correlation": (0.9, 1),
        "same class": (0.85, 1),
    },
    "tracin": {
        "difference": (0, 1e-10),
        "spoilt": (0.7, 1),
        "same class": (0.9, 1),
        "with all images": (0.88, 1),
        "without these": (0.88, 1),
        "without others": (0.8, 0.88),
    },
    "selection": {
        "difference": (0, 1e-10),
        "chosen, distance": (0, 0.2),
        "chosen, accuracy": (0.83, 1),
        "random, distance": (0.35, 1),
        "random, accuracy": (0.5, 0.75),
        "balanced, distance": (0.2, 0.4),
        "balanced, accuracy": (0.7, 0.83),
    },
    "ewc": {
        "difference": (0, 1e-10),
        "first": (0.95, 1),
        "without a penalty, first": (0.2, 0.6),
        "without a penalty, second": (0.9, 1),
        "equal penalty, first": (0.5, 0.8),
        "equal penalty, second": (0.8, 0.9),
        "EWC, first": (0.85, 1),
        "EWC, second": (0.88, 1),
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
    assert 2 <= len(printed.splitlines()) <= 16
    assert max(len(line) for line in printed.splitlines()) <= 110
    if name == "clipped_training":
        assert "not differentially private by itself" in printed


def test_all_are_here():
    """Every file of the folder is run above."""
    folder = examples.__path__[0]
    files = pkgutil.iter_modules([folder])
    assert {file.name for file in files} == {"digits", "wrong_labels", *FOUND}


def test_in_two_processes(tmp_path):
    """As the line in README.rst starts it; the second time nothing is computed."""
    pytest.importorskip("sklearn")
    line = f"""{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2
        -m vmapsafe.examples.many_processes {tmp_path / "folder"}"""
    for total in (24, 0):
        ended = subprocess.run(line.split(), capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        counts = re.findall(r"process (\d) of 2 computed (\d+) batches", ended.stdout)
        assert [rank for rank, _ in counts] == ["0", "1"]
        assert sum(int(count) for _, count in counts) == total
        assert "largest difference from the sketches of one process: 0.0\n" in (
            ended.stdout
        )


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        digits.load()
    assert str(caught.value) == (
        "vmapsafe.examples: the digits come with scikit-learn, which cannot be "
        "imported here. Run pip install scikit-learn."
    )


def test_as_a_script(monkeypatch):
    """``python -m vmapsafe.examples.NAME`` calls main."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for name in FOUND:
        monkeypatch.delitem(sys.modules, f"vmapsafe.examples.{name}", raising=False)
        with pytest.raises(ModuleNotFoundError, match="come with scikit-learn"):
            runpy.run_module(f"vmapsafe.examples.{name}", run_name="__main__")


def some_digits(count=12):
    """A network with running statistics, images and labels, without scikit-learn."""
    torch.manual_seed(0)
    x, y = torch.rand(count, 1, 8, 8, dtype=torch.float64), torch.arange(count) % 10
    model = digits.network()
    model(x)
    return model, x, y


def test_a_training_step_with_a_log_is_one_forward():
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x)

    model, x, y = some_digits()
    noise_scale.train(Counting(*model), [(x, y), (x, y)])
    assert Counting.calls == 2


def test_estimates_are_those_of_the_covariance_of_the_rows():
    rows = torch.randn(7, 5, dtype=torch.float64)
    found = {"norms": rows.norm(dim=1), "sum": {"a": rows.sum(0)[:2]}}
    found["sum"]["b"] = rows.sum(0)[2:]
    trace, square = noise_scale.estimates(found)
    expected = torch.cov(rows.T).trace()
    torch.testing.assert_close(trace, expected)
    torch.testing.assert_close(square, rows.mean(0).square().sum() - expected / 7)


def test_scores_are_those_of_the_checkpoints_and_their_statistics():
    """The network's own state is not looked at, and not written."""
    model, x, y = some_digits()
    checkpoints = tracin.train(model, x, y)
    state = checkpoints[-1]
    assert len(checkpoints) == tracin.EPOCHS / tracin.EVERY
    assert not torch.equal(checkpoints[0]["1.running_mean"], state["1.running_mean"])
    scores = tracin.tracin(model, checkpoints, (x, y), (x, y), (x, y))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    other = digits.network()
    other(x)
    again = tracin.tracin(other, checkpoints, (x, y), (x, y), (x, y))
    for one, other in zip(scores, again):
        assert torch.equal(one, other)


def test_each_choice_is_the_best_one():
    rows = torch.randn(9, 4, dtype=torch.float64)
    chosen = selection.choose(rows @ rows.T, 9).tolist()
    assert sorted(chosen) == list(range(9))
    for n in range(9):
        left = {
            j: selection.distance(rows, torch.tensor([*chosen[:n], j]))
            for j in set(range(9)) - set(chosen[:n])
        }
        assert left[chosen[n]] == pytest.approx(min(left.values()), abs=1e-12)


def test_as_many_of_each_class():
    y = torch.arange(200) % 10
    some = selection.of_each_class(y, 30)
    assert len(set(some.tolist())) == 30
    assert torch.equal(y[some].bincount(), torch.full((10,), 3))


def test_the_second_task_leaves_the_network_and_its_statistics():
    model, x, y = some_digits()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    learnt = ewc.second_task(model, x, y, importance)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in learnt.named_buffers():
        assert torch.equal(value, before[name])
    assert not torch.equal(learnt[0].weight, model[0].weight)
