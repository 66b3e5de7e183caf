"""Norms, clipped sums and out=, against a Python loop of plain backward passes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from plain import assert_same_state, everything
from plain import per_sample_grads as slow_rows
from plain import switched
from torch import nn
from torch.nn.utils import parametrizations

from vmapsafe import clipped_grad_sum, per_sample_grad_norms, per_sample_grads
from vmapsafe.testing import assert_same

# -- Networks: everything a parameter may go through -----------------------------------


class Twice(nn.Module):
    """One weight used twice, once through F.linear and once by an operator."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.out(torch.tanh(self.a(x)) @ self.a.weight + x * self.a.bias)


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=2)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.mix(self.embed(x)))).mean(1)


class Direct(nn.Module):
    """A module that uses its parameters without any layer, and one unused."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.idle = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return torch.einsum("ni,ij->nj", x.sin() * self.scale, self.matrix)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.norm(x + self.attend(x, x, x)[0])).mean(1)


class Places(nn.Module):
    """Embeddings of input and position, the latter the same for all samples."""

    def __init__(self, tokens=5, words=30):
        super().__init__()
        self.words = nn.Embedding(words, 4, padding_idx=-1)
        self.places = nn.Embedding(tokens, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        h = self.words(x) + self.places(torch.arange(x.size(1)))
        return self.out(torch.tanh(h)).mean(1)


class Folded(nn.Module):
    """Makes several rows of one sample before a convolution and batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        n = len(x)
        h = torch.tanh(self.norm(self.conv(x.flatten(0, 1))))
        return self.out(h.mean((2, 3)).view(n, -1, 4).mean(1))


class Halves(nn.Module):
    """Two branches, of which the second part of a sample goes through one only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        self.unused(self.a(x[:, :4]))
        return self.a(x[:, :4]) * self.b(x[:, 4:].detach())


def net(*layers):
    return nn.Sequential(*layers)


def image(*layers, channels, classes=3):
    return net(*layers, nn.Tanh(), nn.Flatten(2), Mean(), nn.Linear(channels, classes))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(2)


def conv(dims, channels, outputs, kernel, **options):
    return getattr(nn, f"Conv{dims}d")(channels, outputs, kernel, **options)


def normed():
    layer = nn.Linear(4, 3)
    return net(parametrizations.weight_norm(layer), nn.Tanh(), nn.Linear(3, 3))


def frozen():
    model = net(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    return model


def batch(*shape):
    return lambda: torch.randn(5, *shape, dtype=torch.float64)


def words(count, *shape):
    return lambda: torch.randint(count, (5, *shape))


# name: (network, inputs)
NETS = {
    "conv2d": (
        lambda: image(conv(2, 2, 3, 3), nn.BatchNorm2d(3), channels=3),
        batch(2, 6, 5),
    ),
    "conv2d, stride and padding": (
        lambda: image(
            conv(2, 2, 8, 3, stride=2, padding=1),
            *(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            conv(2, 8, 9, (2, 3), padding="valid"),
            channels=9,
        ),
        batch(2, 7, 6),
    ),
    "conv2d, same, dilation": (
        lambda: image(
            conv(2, 2, 4, 3, padding="same"),
            conv(2, 4, 4, 2, padding="same", dilation=2, bias=False),
            channels=4,
        ),
        batch(2, 5, 5),
    ),
    "conv2d, few positions": (
        lambda: image(conv(2, 8, 16, 3, stride=2), channels=16),
        batch(8, 5, 5),
    ),
    "conv2d, 1 x 1": (
        lambda: image(
            conv(2, 6, 8, 1, stride=2), conv(2, 8, 4, 1, padding=1), channels=4
        ),
        batch(6, 5, 5),
    ),
    "conv2d, groups": (
        lambda: image(
            conv(2, 4, 8, 3, groups=2), conv(2, 8, 8, 2, groups=8), channels=8
        ),
        batch(4, 5, 5),
    ),
    "conv1d": (
        lambda: image(
            conv(1, 2, 4, 3, stride=2, padding=1), nn.BatchNorm1d(4), channels=4
        ),
        batch(2, 9),
    ),
    "conv3d": (
        lambda: image(conv(3, 1, 4, 2), nn.BatchNorm3d(4), channels=4),
        batch(1, 4, 3, 3),
    ),
    "transposed": (
        lambda: image(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4), channels=4),
        batch(2, 4, 4),
    ),
    "mlp": (
        lambda: net(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 3, bias=False)
        ),
        batch(4),
    ),
    "linear on tokens": (
        lambda: net(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3), nn.Flatten(1, 2)),
        batch(3, 4),
    ),
    "linear on many tokens": (
        lambda: net(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(1)),
        batch(9, 2),
    ),
    "norms": (
        lambda: image(
            *(conv(2, 2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)),
            *(nn.LayerNorm([4, 4, 4]), nn.BatchNorm2d(4, affine=False)),
            nn.InstanceNorm2d(4, affine=True),
            channels=4,
        ),
        batch(2, 5, 5),
    ),
    "embedding": (lambda: Places(), words(30, 5)),
    "embedding, many words": (lambda: Places(9, 2), words(2, 9)),
    "used twice": (Twice, batch(4)),
    "tied": (Tied, words(7, 3)),
    "direct": (Direct, batch(4)),
    "weight norm": (normed, batch(4)),
    "attention": (Attends, batch(3, 4)),
    "frozen": (frozen, batch(4)),
    "several rows a sample": (Folded, batch(3, 2, 5, 4)),
    "branches": (Halves, batch(8)),
}
# Batch norm with more than one value a channel.
NORMED = [
    *("conv2d", "conv2d, stride and padding", "conv1d", "conv3d", "norms"),
    *("transposed", "several rows a sample"),
]
CASES = [
    *((name, "eval") for name in NETS),
    *((name, mode) for name in NORMED for mode in ("no_running_stats", "group_norm")),
]




def problem(name):
    torch.manual_seed(3)
    make, inputs = NETS[name]
    model = make().double()
    for _ in range(2):
        model(inputs())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = inputs()
    return model, x, torch.randn_like(model(x)).detach()


def mse(output, target):
    return F.mse_loss(output, target, reduction="sum")


def slow(model, mode, x, y):
    """{name: (B, *shape)} by a loop, of what the parameters are called in ``model``."""
    plain = switched(model, mode, 2)
    for module in plain.modules():  # see PERFORMANCE: a kernel of torch's
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(contiguous_gradient)
    wanted = [n for n, p in plain.named_parameters() if p.requires_grad]
    named = dict(plain.named_parameters())
    rows = []
    for i in range(len(x)):
        loss = mse(plain(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, [named[n] for n in wanted], allow_unused=True)
        zeros = [torch.zeros_like(named[n]) for n in wanted]
        rows.append([z if g is None else g for g, z in zip(grads, zeros)])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return {n: torch.stack(column) for n, column in zip(names, zip(*rows))}


def contiguous_gradient(module, args, output):
    if output.requires_grad:
        output.register_hook(lambda g: g.contiguous())


def norm_of(rows):
    return sum([r.flatten(1).square().sum(1) for r in rows.values()]).sqrt()


def clipped(rows, most):
    total = {name: torch.zeros_like(r[0]) for name, r in rows.items()}
    for i, norm in enumerate(norm_of(rows)):
        factor = 1.0 if norm <= most else float(most / norm)
        for name, r in rows.items():
            total[name] += factor * r[i]
    return total


# torch's weight norm, under vmap
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name,mode", CASES)
def test_against_the_loop(name, mode):
    """Norms, norms by parameter, clipped sums and rows into given memory."""
    model, x, y = problem(name)
    expected = slow(model, mode, x, y)
    before = everything(model)
    options = {"mode": mode, "num_groups": 2}
    assert_same(per_sample_grad_norms(model, mse, x, y, **options), norm_of(expected))
    by_name = per_sample_grad_norms(model, mse, x, y, per_parameter=True, **options)
    assert list(by_name) == list(expected)
    for key, rows in expected.items():
        assert_same(by_name[key], rows.flatten(1).norm(dim=1))
    most = float(norm_of(expected).median())
    for chunk_size in (None, 2):
        total = clipped_grad_sum(
            model, mse, x, y, max_grad_norm=most, chunk_size=chunk_size, **options
        )
        assert_same(total, clipped(expected, most))
    out = {key: torch.full_like(rows, torch.nan) for key, rows in expected.items()}
    for chunk_size in (2, None):
        found = per_sample_grads(
            model, mse, x, y, out=out, chunk_size=chunk_size, **options
        )
        assert found is out
        assert_same(found, expected)
    assert_same(per_sample_grads(model, mse, x, y, **options), expected)
    assert_same_state(model, before)
