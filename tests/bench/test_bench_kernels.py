"""bench/kernels.py counts what one call runs."""

import kernels
import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

X, WEIGHT, BIAS = torch.randn(5, 3), torch.randn(2, 3), torch.randn(2)


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (lambda: F.linear(X, WEIGHT, BIAS), {"addmm": 1}),
        (lambda: X.T[None].expand(2, 3, 5).detach()[0], {}),
        (lambda: torch.empty(2).fill_(1.0), {"fill_": 1}),
        (lambda: vmap(lambda x: WEIGHT @ x + BIAS)(X), {"mm": 1, "add": 1}),
    ],
)
def test_counts_are_of_what_starts_a_kernel(run, found):
    assert kernels.counted(run) == found


def test_counts_include_the_backward():
    layer = torch.nn.Linear(3, 2)
    found = kernels.counted(lambda: layer(X).sum().backward())
    # The weight's gradient, the bias's, and both added to those of before.
    assert found == {"addmm": 1, "sum": 2, "ones_like": 1, "mm": 1, "add_": 2}


def test_the_table_has_a_line_for_each_network(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernels.py", "--nets", "tiny net"])
    kernels.main()
    title, line = capsys.readouterr().out.splitlines()
    numbers = [int(number) for number in line.removeprefix("tiny net").split()]
    assert len(numbers) == len(kernels.CALLS)
    plain, by_vmap, rows = numbers[:3]
    assert plain == sum(kernels.counts("tiny net", "plain", 128).values())
    assert plain < rows < by_vmap
