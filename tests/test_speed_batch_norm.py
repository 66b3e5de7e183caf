"""Batch norm's operators: the same numbers with the rules and without, everywhere."""

from dataclasses import replace

import pytest
import torch
from test_speed import TRANSFORMS, rows, tensors
from torch import nn

from vmapsafe import _operators, vmap_safe
from vmapsafe._rule import registered
from vmapsafe.rules import native_batch_norm
from vmapsafe.rules.regimes import REGIMES
from vmapsafe.testing import assert_same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RULES = [
    rule
    for rule in registered()
    if {native_batch_norm._forward, native_batch_norm._backward} & set(rule.functions)
]
MODES = {"eval": "running statistics", "no_running_stats": "statistics of the slice"}
# Where forward mode is around it, torch takes the backward apart before vmap.
NO_BACKWARD = {"vmap(jacfwd)", "vmap(hvp), forward over reverse", "vmap(hessian)"}
X = torch.randn(3, 2, 2, 4, 4, dtype=torch.float64)  # three slices of two samples


@pytest.fixture
def taken(monkeypatch):
    """The names of the rules that took a call while a block was open."""
    names = []

    def noting(rule):
        def batched(call):
            names.append(rule.name)
            return rule.batched(call)

        return replace(rule, batched=batched)

    rules = {}
    for rule in RULES:
        (operator,) = rule.functions
        rules[operator] = (*rules.get(operator, ()), noting(rule))
    monkeypatch.setattr(_operators, "speed_rules", lambda: rules)
    return names


def fused_from(values, monkeypatch):
    monkeypatch.setitem(REGIMES, "cpu", replace(REGIMES["cpu"], batch_norm=values))


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
    fused_from(9, monkeypatch)
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
    """There is one gradient then, of the input."""
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
    fused_from(1, monkeypatch)
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
    """Batched weights, running statistics or gradients alone: no rule takes them."""
    model = net()
    stacked = {n: torch.stack([p, p + 0.1]) for n, p in tensors(model).items()}
    with vmap_safe(model):
        torch.func.vmap(
            lambda p, x: torch.func.functional_call(model, p, (x,)), (0, None)
        )(stacked, X[0])
    assert not taken


def test_other_devices_are_left_alone(taken, monkeypatch):
    """A type of device that was not measured."""
    monkeypatch.delitem(REGIMES, "cpu")
    model = net()
    with vmap_safe(model):
        rows(model, tensors(model), X)
    assert not taken
