"""Batch norm's operators: the same numbers with the rules and without, everywhere."""

import copy

import pytest
import torch
from measured import change_regimes, take_regimes_of_a_gpu
from operator_rules import TRANSFORMS, X, rows, tensors, watch
from torch import nn

from vmapsafe import per_sample_grads, rules, vmap_safe
from vmapsafe._rule import operator_rules
from vmapsafe.rules import batch_norm_operators, normalisation
from vmapsafe.testing import assert_same

RULES = [
    rule
    for operator in (
        *(batch_norm_operators._forward, batch_norm_operators._backward),
        *(batch_norm_operators._cudnn_forward, batch_norm_operators._cudnn_backward),
    )
    for rule in operator_rules()[operator]
]
MODES = {"eval": "running statistics", "no_running_stats": "statistics of the slice"}
# Where forward mode is around it, torch takes the backward apart before vmap.
NO_BACKWARD = {"vmap(jacfwd)", "vmap(hvp), forward over reverse", "vmap(hessian)"}


@pytest.fixture
def taken(monkeypatch):
    """The names of the rules that took a call while a block was open, however small."""
    names = []
    change_regimes(monkeypatch, batch_norm={"batch": 0})
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
    change_regimes(monkeypatch, batch_norm={"batch": 0, "channel": 9})
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
    change_regimes(monkeypatch, batch_norm={"batch": 0, "channel": 1})
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


# -- cuDNN's operators, as CUDA has them ----------------------------------------------


def statistics_by_hand(x, training, mean, var, eps):
    if training:
        over = [d for d in range(x.dim()) if d != 1]
        mean, var = x.mean(over), x.var(over, unbiased=False)
    return mean, (var + eps).rsqrt()


def along_channels(values, x):
    return values.view(-1, *[1 for _ in x.shape[2:]])


def cudnn_forward(x, weight, bias, mean, var, training, momentum, eps):
    mean, rstd = statistics_by_hand(x, training, mean, var, eps)
    by_hand = [along_channels(t, x) for t in (mean, rstd, weight, bias)]
    y = (x - by_hand[0]) * by_hand[1] * by_hand[2] + by_hand[3]
    saved = (mean, rstd) if training else (x.new_empty(0), x.new_empty(0))
    return y, *saved, torch.empty(7, dtype=torch.uint8)


def cudnn_backward(x, grad, weight, mean, var, saved, rstd, eps, reserve):
    over = [d for d in range(x.dim()) if d != 1]
    along = (x - along_channels(saved, x)) * along_channels(rstd, x)
    of_weight, of_bias = (grad * along).sum(over), grad.sum(over)
    count = x.numel() // x.size(1)
    means = [along_channels(t / count, x) for t in (of_weight, of_bias)]
    scale = along_channels(weight * rstd, x)
    return (grad - means[1] - along * means[0]) * scale, of_weight, of_bias


@pytest.fixture(scope="module")
def kernels_of_cudnn():
    """cuDNN's operators on the CPU, written out."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_batch_norm", cudnn_forward, "CPU")
    library.impl("cudnn_batch_norm_backward", cudnn_backward, "CPU")
    yield
    library._destroy()


@pytest.fixture
def by_cudnn(kernels_of_cudnn, monkeypatch):
    """Lets torch choose cuDNN where it does on CUDA (read in torch 2.13)."""
    native, cudnn = torch.batch_norm, torch.ops.aten.cudnn_batch_norm.default

    def batch_norm(x, weight, bias, *rest):
        if x.dim() > 2 and weight is not None and bias is not None:
            return cudnn(x, weight, bias, *rest[:-1])[0]
        return native(x, weight, bias, *rest)

    return lambda: monkeypatch.setattr(torch, "batch_norm", batch_norm)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_by_cudnn_as_without_it(name, mode, by_cudnn, taken, monkeypatch):
    """The rules take cuDNN's calls in a user's own vmap; they are torch's numbers."""
    change_regimes(monkeypatch, batch_norm={"batch": 0, "channel": 9})
    model = net()
    with vmap_safe(model, mode=mode, fast=False):
        expected = TRANSFORMS[name](model, tensors(model), X)
    by_cudnn()
    if name == "channels_last":  # as CUDA sees them
        for module in (normalisation, rules.batch_norm):
            monkeypatch.setattr(module, "has_several_layouts", lambda x: x.dim() > 3)
    with vmap_safe(model, mode=mode):
        actual = TRANSFORMS[name](model, tensors(model), X)
    assert_same(actual, expected)
    if mode == "eval" or name in ("vmap(grad)", "chunk_size", "in_dims", "nested vmap"):
        assert f"cudnn_batch_norm, {MODES[mode]}" in taken
        by = "native" if mode == "eval" else "cudnn"  # as autograd chooses
        if name not in NO_BACKWARD:
            assert f"{by}_batch_norm_backward, {MODES[mode]}" in taken


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("around", ["forward", "backward"])
def test_half_of_a_call_by_cudnn(around, mode, by_cudnn, taken):
    """Forward and backward fit each other if only one of them is in a block."""
    model = net().eval()
    if mode == "no_running_stats":
        for layer in (model[1], model[6]):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = None
    params = tensors(model)
    leaves = [p.clone().requires_grad_() for p in params.values()]

    def forward(*leaves):
        named = dict(zip(params, leaves))
        return torch.func.vmap(
            lambda x: torch.func.functional_call(model, named, (x,)).square().sum()
        )(X).sum()

    expected = torch.autograd.grad(forward(*leaves), leaves)
    by_cudnn()
    if around == "forward":
        with vmap_safe(model, mode=mode):
            loss = forward(*leaves)
        found = torch.autograd.grad(loss, leaves)
    else:
        loss = forward(*leaves)
        with vmap_safe(model, mode=mode):
            found = torch.autograd.grad(loss, leaves)
    assert_same(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_rows_by_cudnn(mode, by_cudnn, taken):
    """vmap(grad) equals a loop of plain backwards over the slices."""
    model = net()
    expected = []
    for x in X:
        alone = copy.deepcopy(model).train(mode != "eval")
        alone(x).square().sum().backward()
        expected.append({n: p.grad for n, p in alone.named_parameters()})
    by_cudnn()
    with vmap_safe(model, mode=mode):
        found, _ = rows(model, tensors(model), X)
    for name, row in found.items():
        assert_same(row, torch.stack([one[name] for one in expected]))
    assert [name for name in taken if name.startswith("cudnn")]


def test_layouts_that_cuda_asks_for():
    """autograd asks for the input's where only the gradient is batched."""
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert not normalisation.has_several_layouts(x)
    last = x.to(memory_format=torch.channels_last)
    assert normalisation.has_several_layouts(last)
    assert not normalisation.has_several_layouts(last.flatten(2))


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
