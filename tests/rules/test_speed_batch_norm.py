"""Batch norm's operators: the same numbers with the rules and without, everywhere."""

import pytest
import torch
from measured import change_regimes, take_regimes_of_a_gpu
from operator_rules import TRANSFORMS, X, rows, tensors, watch
from torch import nn

from vmapsafe import per_sample_grads, vmap_safe
from vmapsafe._rule import operator_rules
from vmapsafe.rules import batch_norm_operators
from vmapsafe.testing import assert_same

RULES = [
    rule
    for operator in (batch_norm_operators._forward, batch_norm_operators._backward)
    for rule in operator_rules()[operator]
]
MODES = {"eval": "running statistics", "no_running_stats": "statistics of the slice"}
# Where forward mode is around it, torch takes the backward apart before vmap.
NO_BACKWARD = {"vmap(jacfwd)", "vmap(hvp), forward over reverse", "vmap(hessian)"}


@pytest.fixture
def taken(monkeypatch):
    """The names of the rules that took a call while a block was open."""
    names = []
    watch(monkeypatch, RULES, lambda rule, call: names.append(rule.name))
    return names


def net(affine=True):
    """Both kinds of input; the planes are large enough for the fused backward."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3, affine=affine),
        nn.Tanh(),
        nn.Conv2d(3, 2, 1, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.BatchNorm1d(8, affine=affine),
    ).double()
    net(torch.randn(6, 2, 4, 4, dtype=torch.float64))
    return net


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_same_as_torchs_own(name, mode, taken, monkeypatch):
    """fast=True and fast=False give the same in float64, and the rules were there."""
    change_regimes(monkeypatch, batch_norm=9)
    model = net()
    with vmap_safe(model, mode=mode, fast=False):
        expected = TRANSFORMS[name](model, tensors(model), X)
    assert not taken
    with vmap_safe(model, mode=mode):
        actual = TRANSFORMS[name](model, tensors(model), X)
    assert_same(actual, expected)
    if mode == "eval" or name in ("vmap(grad)", "chunk_size", "in_dims", "nested vmap"):
        assert f"native_batch_norm, {MODES[mode]}" in taken
        if name not in NO_BACKWARD:
            assert f"native_batch_norm_backward, {MODES[mode]}" in taken


@pytest.mark.parametrize("mode", MODES)
def test_without_weights(mode, taken):
    """Then there is only the gradient of the input."""
    model = net(affine=False)
    found = []
    for fast in (False, True):
        with vmap_safe(model, mode=mode, fast=fast):
            found.append(rows(model, tensors(model), X))
    assert_same(found[1], found[0])
    assert len(taken) == 4


@pytest.mark.parametrize("mode", MODES)
def test_gradient_in_another_layout(mode, taken, monkeypatch):
    """torch's fused backward is wrong for a batch of one and such a gradient."""
    change_regimes(monkeypatch, batch_norm=1)
    layer = nn.BatchNorm2d(3).double()
    layer(torch.randn(6, 3, 4, 4, dtype=torch.float64))
    layer.requires_grad_(False)
    x = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64)
    weights = torch.randn(16, 3, dtype=torch.float64)

    def by_hand(x):
        if mode == "eval":
            mean, var = layer.running_mean, layer.running_var
        else:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        shape = (1, 3, 1, 1)
        y = (x - mean.view(shape)) * (var.view(shape) + layer.eps).rsqrt()
        return (y.flatten(2).transpose(1, 2) * weights).pow(2).sum()

    def in_block(x):
        return (layer(x).flatten(2).transpose(1, 2) * weights).pow(2).sum()

    with vmap_safe(layer, mode=mode):
        actual = torch.func.vmap(torch.func.grad(in_block))(x)
    expected = torch.stack([torch.func.grad(by_hand)(one) for one in x])
    assert_same(actual, expected)
    assert len(taken) == 2


def test_weights_of_an_ensemble_are_left_to_torch(taken):
    """No rule takes a call in which the weights are batched."""
    model = net()
    stacked = {n: torch.stack([p, p + 0.1]) for n, p in tensors(model).items()}
    with vmap_safe(model):
        torch.func.vmap(
            lambda p, x: torch.func.functional_call(model, p, (x,)), (0, None)
        )(stacked, X[0])
    assert not taken


def test_regimes_of_a_gpu(taken, monkeypatch):
    """There the fused backward takes small calls too."""
    take_regimes_of_a_gpu(monkeypatch)
    model = net()
    with vmap_safe(model, fast=False):
        expected = rows(model, tensors(model), X)
    plain = []
    monkeypatch.setattr(batch_norm_operators, "_by_plain_operations", plain.append)
    with vmap_safe(model):
        assert_same(rows(model, tensors(model), X), expected)
    assert len(taken) == 4 and not plain


# -- Instance norm, which becomes batch norm -------------------------------------------


def test_instance_norm_is_batch_norm(taken):
    """torch calls batch norm, with a channel for each sample and channel."""
    layer = nn.InstanceNorm2d(3, affine=True).double()
    x = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    found = []
    for fast in (False, True):
        with vmap_safe(layer, fast=fast):
            found.append(rows(layer, tensors(layer), x))
    assert_same(found[1], found[0])
    assert [name.split(",")[0] for name in taken] == [
        "native_batch_norm",
        "native_batch_norm_backward",
    ]


class Scaled(nn.Module):
    """Layer norm behind a tensor of its own that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.linspace(0.5, 2, 5).double().requires_grad_()
        self.norm = nn.LayerNorm(5).double()

    def forward(self, x):
        return self.norm(x * self.scale)


def test_rows_keep_their_derivatives():
    """Derivatives with respect to a tensor that only the model knows are those of the
    speed rule that corrects torch's own."""
    model, (x, y) = Scaled(), torch.randn(2, 3, 2, 5).double()

    def loss(out, y):
        return (out**3 * y).sum()

    found = per_sample_grads(model, loss, x, y)["norm.weight"]
    expected = torch.stack(
        [
            torch.autograd.grad(
                loss(model(x[i, None]), y[i]), model.norm.weight, create_graph=True
            )[0]
            for i in range(3)
        ]
    )
    assert_same(found, expected)
    found, expected = (
        torch.autograd.grad((rows**2).sum(), model.scale)[0]
        for rows in (found, expected)
    )
    assert_same(found, expected)
