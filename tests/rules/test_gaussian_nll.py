"""The Gaussian negative log likelihood raises torch's errors, for one slice or all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, vmap

from vmapsafe import per_sample_grads, vmap_safe
from vmapsafe.testing import assert_same


class Heteroscedastic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, x):
        return self.linear(x).chunk(2, -1)


def loss(output, y):
    mean, var = output
    return F.gaussian_nll_loss(mean, y, var.square())


def test_rows():
    net, x, y = (
        Heteroscedastic(),
        torch.randn(5, 3).double(),
        torch.randn(5, 2).double(),
    )
    rows = per_sample_grads(net, loss, x, y)
    for i in range(5):
        one = loss(net(x[i : i + 1]), y[i : i + 1])
        expected = torch.autograd.grad(one, [*net.parameters()])
        assert_same(tuple(row[i] for row in rows.values()), expected)


def test_clamped_variances_have_torchs_derivatives():
    var = torch.tensor([0.0, 1e-9, 2.0], dtype=torch.float64)
    x, y = torch.tensor([1.0, 2.0, 3.0]).double(), torch.zeros(3).double()

    def of(var, x, y):
        return F.gaussian_nll_loss(x, y, var, eps=1e-3)

    first = torch.stack([grad(of)(*one) for one in zip(var, x, y)])
    at = [v.clone().requires_grad_() for v in var]
    expected = [of(v, *one) for v, *one in zip(at, x, y)]
    second = []
    for value, v in zip(expected, at):
        (g,) = torch.autograd.grad(value, v, create_graph=True)
        second.append(torch.autograd.grad(g, v)[0])
    with vmap_safe(nn.Identity()):
        assert_same(vmap(of)(var, x, y), torch.stack(expected).detach())
        assert_same(vmap(grad(of))(var, x, y), first)
        assert_same(vmap(hessian(of))(var, x, y), torch.stack(second))


def test_errors_are_torchs():
    x = torch.randn(3, 4)
    var = torch.ones(3, 4)
    var[2, 1] = -1
    with vmap_safe(nn.Identity()):
        with pytest.raises(ValueError, match="var has negative"):
            vmap(F.gaussian_nll_loss)(x, x, var)
        with pytest.raises(ValueError, match="var is of incorrect size"):
            vmap(F.gaussian_nll_loss)(x, x, torch.ones(3, 2))
        with pytest.raises(ValueError, match="other is not valid"):
            vmap(lambda x: F.gaussian_nll_loss(x, x, x.exp(), reduction="other"))(x)
