"""Batches of one in any memory format, against batch norm in plain operations.

torch's batch norm on the CPU has a wrong backward for them if the layouts of the input
and of the gradient differ, so a loop over samples would be a wrong reference.
"""

import copy

import pytest
import slow
import torch
import torch.nn.functional as F
from plain import ByFormula, BySample
from torch import nn
from torch.func import functional_call, grad, vmap

from vmapsafe import (
    clipped_grad_sum,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
    vmap_safe,
)
from vmapsafe.testing import assert_same


class ByRunning(nn.Module):
    """Batch norm by running statistics, written out."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.mean, self.var = layer.running_mean, layer.running_var
        self.eps = layer.eps

    def forward(self, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (x - self.mean.view(shape)) / (self.var.view(shape) + self.eps).sqrt()
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y


class Turned(nn.Module):
    """Returns a view with the channels last, so that its gradient has that layout."""

    def forward(self, x):
        return x.movedim(1, -1).tanh().contiguous()


class FromLast(nn.Module):
    """A view of an input whose channels come last."""

    def forward(self, x):
        return x.movedim(-1, 1)


def conv(dims, channels, outputs):
    convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return convolution(channels, outputs, 3, padding=1, bias=False)


def image(norm, dims=2, size=(5, 4), middle=nn.Tanh):
    return nn.Sequential(
        *(conv(dims, 2, 4), norm(4), middle(), nn.Flatten()),
        nn.Linear(4 * torch.Size(size).numel(), 3),
    )


def two_norms(norm):
    """Two norms; the gradient between them has the layout of the second's input."""
    return nn.Sequential(
        *(conv(2, 2, 4), norm(4), nn.Tanh(), norm(4)),
        *(Turned(), nn.Flatten(), nn.Linear(80, 3)),
    )


def untracked(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


def instance(channels, **options):
    return nn.InstanceNorm2d(channels, affine=True, **options)


def tracking_instance(channels):
    return instance(channels, track_running_stats=True)


# name: (network, shape of a sample)
NETS = {
    "batch norm": (lambda: image(nn.BatchNorm2d), (2, 5, 4)),
    "turned": (lambda: image(nn.BatchNorm2d, middle=Turned), (2, 5, 4)),
    "no statistics": (lambda: two_norms(untracked), (2, 5, 4)),
    "two norms": (lambda: two_norms(nn.BatchNorm2d), (2, 5, 4)),
    "one line": (
        lambda: image(nn.BatchNorm2d, size=(1, 6), middle=Turned),
        (2, 1, 6),
    ),
    "a view": (
        lambda: nn.Sequential(FromLast(), image(untracked)),
        (5, 4, 2),
    ),
    "instance norm": (lambda: image(instance, middle=Turned), (2, 5, 4)),
    "instance norm with statistics": (
        lambda: image(tracking_instance, middle=Turned),
        (2, 5, 4),
    ),
    "planes": (
        lambda: image(nn.BatchNorm3d, 3, (3, 2, 2), middle=Turned),
        (2, 3, 2, 2),
    ),
}


def written_out(model, mode):
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
                tracked = layer.running_mean is not None and mode == "eval"
                new = ByRunning(layer) if tracked else BySample(layer)
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
                tracked = layer.running_mean is not None and mode == "eval"
                new = ByRunning(layer) if tracked else ByFormula(layer)
            else:
                continue
            setattr(parent, name, new)
    return model


def problem(name, mode, channels_last):
    torch.manual_seed(2)
    make, shape = NETS[name]
    model = make().double()
    for _ in range(3):
        model(1 + 2 * torch.randn(9, *shape).double())
    x, y = torch.randn(3, *shape).double(), torch.tensor([0, 2, 1])
    rows = slow.rows(written_out(model, mode), F.cross_entropy, x, y)
    want = dict(zip([name for name, _ in model.named_parameters()], rows.values()))
    if channels_last:
        formats = {3: torch.channels_last, 4: torch.channels_last_3d}
        memory_format = formats[len(shape)]
        x = x.to(memory_format=memory_format)
        for p in model.parameters():
            if p.dim() == x.dim():
                p.data = p.data.to(memory_format=memory_format)
    return model, x, y, want


MODES = ["eval", "no_running_stats"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETS)
def test_rows(name, mode, channels_last):
    """Rows are right in whole batches, chunks of one, and a last part of one."""
    model, x, y, want = problem(name, mode, channels_last)
    norms = sum([row.flatten(1).square().sum(1) for row in want.values()]).sqrt()
    total = {n: row.sum(0) for n, row in want.items()}
    sketch = per_sample_sketch(model, F.cross_entropy, x, y, mode=mode, k=6)
    for options in (
        *({}, {"chunk_size": 1}, {"chunk_size": 2}),
        *({"fast": False}, {"chunk_size": 1, "fast": False}),
    ):
        options["mode"] = mode
        call = model, F.cross_entropy, x, y
        assert_same(per_sample_grads(*call, **options), want)
        out = {n: row.new_empty(row.shape) for n, row in want.items()}
        assert_same(per_sample_grads(*call, out=out, **options), want)
        assert_same(per_sample_grad_norms(*call, **options), norms)
        assert_same(clipped_grad_sum(*call, max_grad_norm=1e9, **options), total)
        assert_same(per_sample_sketch(*call, k=6, **options), sketch)
    last = per_sample_grads(model, F.cross_entropy, x[2:], y[2:], mode=mode)
    assert_same(last, {n: row[2:] for n, row in want.items()})


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETS)
def test_a_block(name, mode, channels_last, fast):
    """The user's own vmap(grad) over one sample, grad without vmap, and backward; the
    in_dims in which the samples come last are those of such a layout too."""
    model, x, y, want = problem(name, mode, channels_last)
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params, x, y):
        output = functional_call(model, params, (x[None],))
        return F.cross_entropy(output, y[None])

    one = {n: row[:1] for n, row in want.items()}
    ends = x.movedim(1, -1).contiguous().movedim(-1, 1)
    inside = x.movedim(0, -2).contiguous()  # (..., B, last)
    with vmap_safe(model, mode=mode, fast=fast):
        assert_same(vmap(grad(loss), (None, 0, 0))(params, x[:1], y[:1]), one)
        assert_same(vmap(grad(loss), (None, 0, 0))(params, ends[:1], y[:1]), one)
        assert_same(vmap(grad(loss), (None, -2, 0))(params, inside, y), want)
        found = grad(loss)(params, x[0], y[0])
        assert_same({n: g[None] for n, g in found.items()}, one)
        value = F.cross_entropy(model(x[:1]), y[:1])
        found = torch.autograd.grad(value, list(model.parameters()))
        assert_same([g[None] for g in found], list(one.values()))


def test_group_norm_of_batch_norm_with_channels_last():
    """torch's own kernel ends the process for some of these."""
    torch.manual_seed(0)
    for shape in ((3, 4, 3, 2), (1, 4, 2, 5), (2, 3, 5, 2)):
        norm = nn.BatchNorm2d(shape[1]).double()
        x = torch.randn(shape).double().to(memory_format=torch.channels_last)
        x.requires_grad_()
        with vmap_safe(norm, mode="group_norm", num_groups=shape[1]):
            y = norm(x)
        weight, bias, grad = torch.autograd.grad(
            y.sin().sum(), [norm.weight, norm.bias, x]
        )
        mean = x.mean((2, 3), keepdim=True)
        var = (x - mean).square().mean((2, 3), keepdim=True)
        plain = (x - mean) / (var + norm.eps).sqrt()
        plain = plain * norm.weight[:, None, None] + norm.bias[:, None, None]
        wanted = torch.autograd.grad(plain.sin().sum(), [norm.weight, norm.bias, x])
        for found, right in zip((weight, bias, grad), wanted):
            torch.testing.assert_close(found, right)
