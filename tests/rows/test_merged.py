"""Forwards of all samples as one batch: what takes that way, what must not, and that
either gives the rows of a loop."""

import random
import threading

import pytest
import slow
import torch
import torch.nn.functional as F
from torch import nn

from vmapsafe import BlockError, NeverUpdatedWarning, per_sample, per_sample_grads
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe._block import vmap_safe as vmap_safe_module
from vmapsafe._rows import layers, merged, record, samples
from vmapsafe._rows.merged import NotAlike, Trials
from vmapsafe.rules.kept_calls import KEPT_CALLS
from vmapsafe.testing import assert_same


@pytest.fixture
def ended(monkeypatch):
    """How each trial ended; none is left out because an earlier one failed."""
    found = []

    def watched(*args):
        try:
            result = merged.merged(*args)
        except NotAlike:
            found.append(False)
            raise
        found.append(True)
        return result

    monkeypatch.setattr(samples, "merged", watched)
    monkeypatch.setattr(samples, "_trials", Trials())
    monkeypatch.setattr(Trials, "ended", lambda *args: None)
    return found


class Net(nn.Module):
    """A layer, a function of the test, a layer."""

    def __init__(self, first, function, last):
        super().__init__()
        self.first, self.function, self.last = first, function, last
        self.shift = nn.Parameter(torch.randn(first.weight.shape[0], 1, 1))
        self.register_buffer("mask", torch.rand(first.weight.shape[0], 1, 1))

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def problem(function, features=4, size=3):
    """An image net, whose function gives (B, features)."""
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3, padding=1)
    net = Net(first, function, nn.Linear(features, 3)).double()
    return net, torch.randn(size, 2, 4, 4).double(), torch.randint(3, (size,))


def pooled(function):
    return lambda net, h: function(net, h).mean((2, 3))


ALIKE = {
    **{
        name: pooled(lambda net, h, f=getattr(F, name): f(h))
        for name in (
            *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "silu"),
            *("mish", "hardswish", "hardsigmoid", "gelu", "softplus", "logsigmoid"),
            *("softsign", "tanhshrink", "tanh", "sigmoid"),
        )
    },
    **{
        f"Tensor.{name}": pooled(lambda net, h, n=name: getattr(h, n)())
        for name in ("relu", "tanh", "sigmoid", "exp", "square", "abs", "sin", "cos")
    },
    "log": pooled(lambda net, h: (h.exp() + 1).log().sqrt()),
    "in place": pooled(lambda net, h: F.relu(h, inplace=True)),
    "in place, positional": pooled(lambda net, h: F.leaky_relu(h, 0.1, True)),
    "numbers": pooled(lambda net, h: 1 - (2 * h + 1) / 3 - h**2 + 3.0 * h.pow(2)),
    "residual": pooled(lambda net, h: h + F.relu(h) * h.tanh() - h.div(2)),
    "added in place": pooled(lambda net, h: h.sin().add_(h)),
    "augmented": pooled(lambda net, h: _augmented(h)),
    "a parameter added": pooled(lambda net, h: h + net.shift),
    "a parameter in front": pooled(lambda net, h: net.shift * h),
    "a buffer": pooled(lambda net, h: h * net.mask),
    "a gate": pooled(lambda net, h: h * h.mean((2, 3), keepdim=True).sigmoid()),
    "flatten": lambda net, h: h.mean(3).flatten(1)[:, 3:7],
    "torch.flatten": lambda net, h: torch.flatten(h, -2).sum(-1),
    "view": lambda net, h: h.view(h.size(0), 4, -1).mean(2),
    "view of the rest": lambda net, h: h.reshape(-1, 64)[:, 2:6],
    "a shape": lambda net, h: h.view(*h.shape[:2], 16).mean(dim=2),
    "a shape in sums": lambda net, h: h.sum((2, 3)) / h.shape[0] / len(h) / h.shape[2],
    "permute": lambda net, h: h.permute(2, 0, 3, 1).mean(2).unbind(0)[1],
    "transpose": lambda net, h: h.transpose(0, 1)[1].mean(1),
    "unsqueeze": lambda net, h: h.unsqueeze(0).unsqueeze(-1)[0].squeeze(4).mean((2, 3)),
    "in heads": lambda net, h: _in_heads(h),
    "attention": lambda net, h: F.scaled_dot_product_attention(h, h, h.tanh()).mean(
        (2, 3)
    ),
    "a product": lambda net, h: (h @ h.transpose(2, 3)).mean((2, 3)),
    "softmax": lambda net, h: F.softmax(h, dim=1).mean((2, 3))
    + h.softmax(-1).sum((2, 3)),
    "log_softmax": lambda net, h: F.log_softmax(h.mean((2, 3)), 1),
    "cat": lambda net, h: torch.cat([h, h.sin()], 1).mean((2, 3))[:, 2:6],
    "chunk": lambda net, h: torch.cat(
        [h.chunk(2, 1)[1], h.split([1, 3], 1)[0], h.split(2, dim=1)[0][:, :1]], dim=1
    ).mean((2, 3)),
    "max_pool2d": lambda net, h: F.max_pool2d(h, 2).flatten(1)[:, :4],
    "avg_pool2d": lambda net, h: F.avg_pool2d(h, 3, 1, 1).flatten(1)[:, :4],
    "adaptive_avg_pool2d": lambda net, h: F.adaptive_avg_pool2d(h, 1).flatten(1),
    "contiguous": lambda net, h: h.transpose(2, 3).contiguous().mean((2, 3)),
    "dropout at rest": lambda net, h: F.dropout(h, 0.5, False).mean((2, 3)),
    "asked": lambda net, h: (h.mean((2, 3)) * (h.dim() + h.ndim) * h.requires_grad),
}


def _augmented(h):
    y = h.sin()
    y += h
    y *= 2
    return y


def _in_heads(h):
    n, channels, height, width = h.shape
    y = h.flatten(2).transpose(1, 2).reshape(n, 16, 2, 2).permute(2, 0, 3, 1)
    a, b = y
    return torch.cat([a, b], 1).sum(2)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ALIKE)
def test_alike(name, size, ended):
    net, x, y = problem(ALIKE[name], size=size)
    expected = slow.rows(net, F.cross_entropy, x, y)
    assert_same(per_sample_grads(net, F.cross_entropy, x, y), expected)
    assert ended == [True]
    norms = per_sample(net, F.cross_entropy, x, y, want=q.Norms(), chunk_size=2)
    assert_same(norms, slow.norms(expected))


LOSSES = {
    "cross_entropy": lambda o, y: F.cross_entropy(o, y),
    "a sum": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "one each": lambda o, y: F.cross_entropy(o, y, reduction="none"),
    "smoothed": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "nll": lambda o, y: F.nll_loss(F.log_softmax(o, 1), y),
    "a module": nn.CrossEntropyLoss(),
    "scaled": lambda o, y: 2 * F.cross_entropy(o, y) + o.square().mean() + o.sum(),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, size, ended):
    net, x, y = problem(pooled(lambda net, h: h.tanh()), size=size)
    expected = slow.rows(net, LOSSES[name], x, y)
    assert_same(per_sample_grads(net, LOSSES[name], x, y), expected)
    assert ended == [True]


NUMBERS = [
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    F.binary_cross_entropy_with_logits,
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("function", NUMBERS)
def test_losses_of_numbers(function, reduction, ended):
    net, x, _ = problem(pooled(lambda net, h: h.tanh()))
    y = torch.rand(3, 3).double()

    def loss(output, y):
        return function(output, y, reduction=reduction)

    assert_same(per_sample_grads(net, loss, x, y), slow.rows(net, loss, x, y))
    assert ended == [True]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_at_positions(reduction, ended):
    """A class for each pixel, and the probabilities of the classes."""
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    x = torch.randn(3, 2, 4, 4).double()
    for y in (torch.randint(3, (3, 4, 4)), torch.rand(3, 3, 4, 4).double()):

        def loss(output, y):
            return F.cross_entropy(output, y, reduction=reduction)

        assert_same(per_sample_grads(net, loss, x, y), slow.rows(net, loss, x, y))
    assert ended == [True, True]


# -- What does not treat samples alike -------------------------------------------------


class Centred(torch.autograd.Function):
    """Its backward mixes samples, and vmap has no rule for it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0)


class CentredAsItIs(torch.autograd.Function):
    """The same, which gives back the tensor that it got, and does not write it."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0)


class CentredInPlace(torch.autograd.Function):
    """The same, which gives back the tensor that it got."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


def unseen(h):
    """Written where no mode looks."""
    with torch._C.DisableTorchFunction():
        h.sub_(h.mean(0))
    return h


def swallowed(h):
    try:
        return h.mean((2, 3)) - h.mean(0).mean((1, 2))
    except Exception:
        return h.mean((2, 3))


UNALIKE = {
    "a mean over samples": pooled(lambda net, h: h - h.mean(0)),
    "a mean over all": pooled(lambda net, h: h - h.mean()),
    "a mean over samples, kept": pooled(lambda net, h: h - h.mean(0, keepdim=True)),
    "a sum from the end": pooled(lambda net, h: h - h.sum(-4, keepdim=True)),
    "softmax over samples": pooled(lambda net, h: h.softmax(0)),
    "the first": lambda net, h: (h - h[0]).mean((2, 3)),
    "some": lambda net, h: (h - h[:1]).mean((2, 3)),
    "reversed": pooled(lambda net, h: h + h.flip(0)),
    "rolled": pooled(lambda net, h: h + h.roll(1, 0)),
    "flattened": lambda net, h: h.flatten()[:4].unsqueeze(0),
    "flattened and back": lambda net, h: h.flatten(0, 1).view(1, 4, 16).mean(2),
    "unbound": lambda net, h: (h + h.unbind(0)[0]).mean((2, 3)),
    "cat of samples": lambda net, h: torch.cat([h, h], 0)[:1].mean((2, 3)),
    "a product over samples": lambda net, h: _over_samples(h.mean((2, 3))),
    "squeezed": lambda net, h: h.squeeze().mean((-2, -1)).view(1, 4),
    "samples as channels": pooled(lambda net, h: h.transpose(0, 1).transpose(0, 1)),
    "folded": lambda net, h: h.permute(1, 0, 2, 3).flatten(0, 1).view(1, 4, 16).mean(2),
    "transposed and flat": lambda net, h: h.transpose(0, 1).flatten(1).sum(1)[None],
    "all at once": lambda net, h: h.sum() * h.mean((2, 3)),
    "an axis": pooled(lambda net, h: h - h.mean(axis=0)),
    "an average over the batch dimension": lambda net, h: h.sum((0, 2, 3))[None],
    "as it was stored": lambda net, h: _stored(net, h),
    "attention over samples": lambda net, h: _mixing_attention(h),
    "the statistics of the batch": pooled(
        lambda net, h: F.batch_norm(h, None, None, training=True)
    ),
    "by hooks": lambda net, h: _with_hook(h).mean((2, 3)),
    "a transform": lambda net, h: torch.func.vmap(torch.sin)(h).mean((2, 3)),
    "without gradients": lambda net, h: _no_grad(h),
    "swallowed": lambda net, h: swallowed(h),
    "a view in place": lambda net, h: F.relu(h.flatten(2), inplace=True).mean(2)
    + h.mean((2, 3)),
    "scripted": pooled(lambda net, h: scripted(h)),
    "unseen": pooled(lambda net, h: unseen(h * 1)),
}


def _over_samples(h):
    return h @ h.transpose(0, 1) @ h


def _stored(net, h):
    net.last_seen = h
    return (h - h.mean(0)).mean((2, 3))


def _mixing_attention(h):
    y = h.transpose(0, 2)
    return F.scaled_dot_product_attention(y, y, y).transpose(0, 2).mean((2, 3))


def _with_hook(h):
    h.register_hook(lambda grad: grad - grad.mean(0))
    return h


def _no_grad(h):
    with torch.no_grad():
        y = h.mean((2, 3))
    return h.mean((2, 3)) * y


NOT_SEEN = ("samples as channels", "without gradients")


@pytest.mark.parametrize("name", UNALIKE)
def test_not_alike(name, ended):
    """These take vmap's way, if they would mix samples; either is right."""
    net, x, y = problem(UNALIKE[name])
    expected = slow.rows(net, F.cross_entropy, x, y)
    try:
        found = per_sample_grads(net, F.cross_entropy, x, y)
    except RuntimeError:
        found = None  # in vmap's words
    if found is not None:
        assert_same(found, expected)
    if name not in NOT_SEEN:
        assert ended == [False]


@pytest.mark.parametrize("function", [Centred, CentredInPlace, CentredAsItIs])
def test_functions_of_autograd(function, ended):
    """Their backward is not seen, and would get the gradients of all samples."""
    net, x, y = problem(pooled(lambda net, h: function.apply(h * 1)))
    with pytest.raises(RuntimeError, match="autograd.Function"):
        per_sample_grads(net, F.cross_entropy, x, y)
    assert ended == [False]


UNALIKE_LOSSES = {
    "of the whole batch": lambda o, y: F.cross_entropy(o, y) + o.mean(0).square().sum(),
    "by the number of samples": lambda o, y: F.cross_entropy(o, y) * len(o.tolist()),
    "with weights": lambda o, y: F.cross_entropy(o, y, torch.tensor([1.0, 2, 3]).to(o)),
    "of parameters": None,
}


@pytest.mark.parametrize("name", UNALIKE_LOSSES)
def test_losses_that_are_not_alike(name, ended):
    net, x, y = problem(pooled(lambda net, h: h.tanh()))
    loss = UNALIKE_LOSSES[name]
    if loss is None:
        loss = lambda o, y: o.sum() + net.last.weight.square().sum()  # noqa: E731
    try:
        found = per_sample_grads(net, loss, x, y)
    except RuntimeError:
        found = None
    if found is not None:
        assert_same(found, slow.rows(net, loss, x, y))
    assert ended == [False]


def test_ignored_targets(ended):
    """The mean over no target is NaN; for all samples at once it would be 0."""
    net, x, y = problem(pooled(lambda net, h: h.tanh()))
    y[1] = -100
    want = {"losses": q.Losses(), "rows": q.Rows()}
    found = per_sample(net, F.cross_entropy, x, y, want=want)
    assert found["losses"].isnan().tolist() == [False, True, False]
    assert ended == [False]
    y[1] = 7
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        per_sample(net, F.cross_entropy, x, y, want=want)


def test_a_constant_of_unknown_origin(ended):
    """It may have been computed from the batch where nobody saw it."""
    constant = torch.randn(4).double()
    net, x, y = problem(lambda net, h: h.mean((2, 3)) * constant)
    expected = slow.rows(net, F.cross_entropy, x, y)
    assert_same(per_sample_grads(net, F.cross_entropy, x, y), expected)
    assert ended == [False]


def test_a_batch_that_is_a_buffer(ended):
    """As a part of the model it is the same for all samples."""

    class Compares(nn.Module):
        def __init__(self, bank):
            super().__init__()
            self.layer, self.bank = nn.Linear(4, 4), nn.Buffer(bank)

        def forward(self, x):
            return self.layer(x) * self.bank

    x = torch.randn(3, 4).double()
    net = Compares(x).double()
    net.bank = x
    rows = per_sample_grads(net, lambda o: o.sum(), x)
    assert_same(rows, slow.rows(net, lambda o: o.sum(), x))


def test_a_batch_written_by_the_forward(ended):
    """A trial must not write it before it ends, as the forward runs again."""
    net = nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 3)).double()
    x, y = torch.randn(3, 4).double(), torch.randint(3, (3,))

    def loss(output, y):
        return F.cross_entropy(output.cumsum(1), y)  # which is not in the table

    expected = slow.rows(net, loss, x.clone(), y)
    assert_same(per_sample_grads(net, loss, x, y), expected)


@pytest.mark.parametrize("size", [1, 3])
def test_a_view_of_a_layer_written_in_place(size, ended):
    """Batch norm of images of one row gives a view."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ELU(inplace=True)),
        *(nn.Flatten(), nn.Linear(12, 3)),
    ).double()
    net(torch.randn(8, 2, 1, 3).double())
    x, y = torch.randn(size, 2, 1, 3).double(), torch.randint(3, (size,))
    expected = slow.rows_in(net, "eval", F.cross_entropy, x, y)
    assert_same(per_sample_grads(net, F.cross_entropy, x, y), expected)
    assert ended == [True]


def test_the_loss_of_a_slice_without_a_batch_dimension(ended, monkeypatch):
    """A linear layer takes a vector as one sample, so that a slice (1,) gives (O,)."""
    net = nn.Linear(1, 3).double()
    x = torch.randn(4).double()

    def loss(output):
        return output.square().sum() * len(output)

    losses = [loss(net(one)) for one in x.unsqueeze(1)]
    rows = [torch.autograd.grad(value, list(net.parameters())) for value in losses]
    expected = {
        name: torch.stack([row[i] for row in rows])
        for i, name in enumerate(("weight", "bias"))
    }
    for small in (record.SMALL, 0):
        monkeypatch.setattr(record, "SMALL", small)
        assert_same(per_sample_grads(net, loss, x), expected)
    assert ended == [False, False]


def test_an_image_without_a_batch_dimension(ended):
    """Of samples (H, W), three would be taken for three channels."""
    net = nn.Conv2d(3, 2, 3).double()
    x = torch.randn(3, 5, 5).double()
    with pytest.raises(RuntimeError, match="channels"):
        per_sample_grads(net, lambda o: o.sum(), x)
    net = nn.Conv2d(1, 2, 3).double()
    for some in (x, x[:1]):
        want = {"rows": q.Rows(), "losses": q.Losses()}
        found = per_sample(net, lambda o: o.square().sum(), some, want=want)
        assert_same(found["rows"], slow.rows(net, lambda o: o.square().sum(), some))
        assert found["losses"].shape == (len(some),)


@pytest.mark.parametrize("size", [1, 2])
def test_inputs_that_are_written_later(size, ended):
    """As in plain torch, that is an error."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.a(x)
            out = self.b(h)
            return out + F.relu(h, inplace=True)[:, :3]

    net, x = Writes().double(), torch.randn(size, 4).double()
    y = torch.randint(3, (size,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        per_sample_grads(net, F.cross_entropy, x, y)


# -- What a call leaves ----------------------------------------------------------------


def test_a_trial_that_failed_is_not_made_again(monkeypatch):
    """Unless something changes that it depends on."""
    trials = Trials()
    monkeypatch.setattr(samples, "_trials", trials)
    tried = []

    def failing(*args):
        tried.append(args)
        raise NotAlike

    monkeypatch.setattr(samples, "merged", failing)
    net, x, y = problem(pooled(lambda net, h: h.tanh()))
    expected = slow.rows(net, F.cross_entropy, x, y)
    for _ in range(3):
        assert_same(per_sample_grads(net, F.cross_entropy, x, y), expected)
    assert len(tried) == 1
    per_sample_grads(net, F.cross_entropy, x[:2], y[:2])  # another size is the same
    assert len(tried) == 1
    net.first.eval()
    per_sample_grads(net, F.cross_entropy, x, y)
    assert len(tried) == 2
    per_sample_grads(net, nn.CrossEntropyLoss(), x, y)
    assert len(tried) == 3


def test_numbers_that_a_failed_trial_drew(ended):
    """The forward under vmap draws them again."""

    def function(net, h):
        drawn.append(random.random())
        return (h.mean((2, 3)) * drawn[-1]).cumsum(1)  # which is not in the table

    drawn: list[float] = []
    net, x, y = problem(function)
    random.seed(3)
    per_sample_grads(net, F.cross_entropy, x, y)
    assert ended == [False] and len(drawn) == 2 and drawn[0] == drawn[1]


def test_gradients_of_functions_are_found():
    """The functions called on one sample as they are take parameters."""
    assert {*record._AS_IT_IS} <= KEPT_CALLS.keys()


# -- Networks at random ----------------------------------------------------------------


def drawn_net(seed):
    """Layers and functions at random, for images, sequences or vectors."""
    rng = random.Random(seed)
    dims = rng.choice([0, 1, 2])
    channels = rng.choice([1, 2, 3])
    conv = {1: nn.Conv1d, 2: nn.Conv2d}.get(dims)
    norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d
    parts: list[nn.Module] = []
    size = [rng.choice([1, 4, 5]) for _ in range(dims)]
    shape = [channels, *size]
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["layer", "norm", "function", "group", "layer norm"])
        if kind == "layer" and conv is not None:
            out = rng.choice([2, 4])
            groups = channels if channels == 2 and rng.random() < 0.3 else 1
            bias = rng.random() < 0.5
            parts.append(conv(channels, out, 3, padding=1, groups=groups, bias=bias))
            channels = out
        elif kind == "layer":
            out = rng.choice([1, 3])
            parts.append(nn.Linear(channels, out, bias=rng.random() < 0.7))
            channels = out
        elif kind == "norm":
            parts.append(norm(channels, affine=rng.random() < 0.8))
        elif kind == "group" and channels * _numbers(size) > 1 and dims:
            parts.append(nn.GroupNorm(1, channels))
        elif kind == "layer norm":
            parts.append(nn.LayerNorm([channels, *shape[1:]]))
        else:
            known = any([[*layer.parameters()] for layer in parts])
            inplace = rng.random() < 0.3 and known
            parts.append(rng.choice([nn.SiLU, nn.ELU, nn.CELU])(inplace=inplace))
    parts += [nn.Flatten(), nn.Linear(channels * _numbers(size), 3)]
    net = nn.Sequential(*parts).double()
    batch = rng.choice([1, 2, 4])
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked += 1
    for p in net.parameters():
        if rng.random() < 0.1:
            p.requires_grad_(False)
    next(reversed([*net.parameters()])).requires_grad_()
    if rng.random() < 0.3:
        net.eval()
    x = torch.randn(batch, *shape).double()
    if dims == 2 and rng.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    return net, x, torch.randint(3, (batch,))


def _numbers(size):
    found = 1
    for n in size:
        found *= n
    return found


@pytest.fixture
def rowed(monkeypatch):
    """How many models ran in a row, without a block."""
    found = []

    def watched(*args):
        result = layers.in_a_row(*args)
        found.append(args)
        return result

    monkeypatch.setattr(samples, "in_a_row", watched)
    return found


def cross_entropy(output, y):
    """Code of the user's own."""
    return F.cross_entropy(output, y)


@pytest.mark.parametrize("seed", range(150))
def test_networks_at_random(seed, ended, rowed, monkeypatch):
    net, x, y = drawn_net(seed)
    if seed % 3 == 0:
        monkeypatch.setattr(record, "SMALL", 0)
    expected = slow.rows_in(net, "eval", F.cross_entropy, x, y)
    assert_same(per_sample_grads(net, cross_entropy, x, y), expected)
    # The caller's own batch must not be written.
    assert ended == [True] or any([getattr(m, "inplace", False) for m in net])
    assert not rowed
    assert_same(per_sample_grads(net, F.cross_entropy, x, y), expected)
    assert len(rowed) == (layers.layers_in(net) is not None)
    norms = per_sample(net, nn.CrossEntropyLoss(), x, y, want=q.Norms())
    assert_same(norms, slow.norms(expected))


# -- torch's own layers in a row -------------------------------------------------------


def row_of_layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 3)),
    ).double()
    net(torch.randn(8, 2, 6, 6).double())
    net[3].eval()
    x, y = torch.randn(3, 2, 6, 6).double(), torch.randint(3, (3,))
    per_sample_grads(net, F.cross_entropy, x, y)  # looks at the statistics
    return net, x, y


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), F.mse_loss])
def test_in_a_row(size, loss, rowed):
    net, x, y = row_of_layers()
    x, y = x[:size], y[:size]
    if loss is F.mse_loss:
        y = F.one_hot(y, 3).double()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    rowed.clear()
    expected = slow.rows_in(net, "eval", loss, x, y)
    assert_same(per_sample_grads(net, loss, x, y), expected)
    norms = per_sample(net, loss, x, y, want=q.Norms(), chunk_size=2)
    assert_same(norms, slow.norms(expected))
    assert len(rowed) == (2 if size == 1 else 3)
    assert_same(dict(net.state_dict()), before)


class Doubles(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(module, args, output):
    return 2 * output


def a_hook(net, monkeypatch):
    net[2].register_forward_hook(doubled)


def a_hook_on_the_model(net, monkeypatch):
    net.register_forward_hook(doubled)


def a_pre_hook(net, monkeypatch):
    net[5].register_forward_pre_hook(lambda module, args: (2 * args[0],))


def a_global_hook(net, monkeypatch):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if module is net[5] else None
    )
    monkeypatch.setattr(net, "handle", handle, raising=False)


def a_forward(net, monkeypatch):
    forward = net[5].forward
    net[5].forward = lambda x: 2 * forward(x)


def a_class(net, monkeypatch):
    net[5].__class__ = Doubles


def a_patched_class(net, monkeypatch):
    forward = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: 2 * forward(self, x))


def a_parametrization(net, monkeypatch):
    nn.utils.parametrizations.weight_norm(net[5])


def a_layer(net, monkeypatch):
    net.append(nn.Softmax(1))


def padding(net, monkeypatch):
    net[0] = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular").double()


def a_layer_in_place(net, monkeypatch):
    net.insert(0, nn.ELU(inplace=True))


def no_statistics(net, monkeypatch):
    net[1] = nn.BatchNorm2d(4, track_running_stats=False).double()


CHANGES = (
    *(a_hook, a_hook_on_the_model, a_pre_hook, a_global_hook, a_forward, a_class),
    *(a_patched_class, a_parametrization, a_layer, padding, a_layer_in_place),
    no_statistics,
)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change, rowed, monkeypatch):
    """What runs other code than is known in advance does not run in a row."""
    net, x, y = row_of_layers()
    change(net.eval(), monkeypatch)
    rowed.clear()
    try:
        expected = slow.rows(net, F.cross_entropy, x.clone(), y)
        assert_same(per_sample_grads(net, F.cross_entropy, x, y), expected)
    finally:
        if change is a_global_hook:
            net.handle.remove()
    assert not rowed


def test_changes_that_run_in_a_row(rowed):
    """Parameters, statistics and flags are read in each call."""
    net, x, y = row_of_layers()
    net[0].weight = nn.Parameter(torch.randn(4, 2, 3, 3).double())
    net[5].bias.requires_grad_(False)
    net[1].running_mean.add_(1)
    net.eval()
    net[4].append(nn.Identity())
    rowed.clear()
    expected = slow.rows_in(net, "eval", F.cross_entropy, x, y)
    assert_same(per_sample_grads(net, F.cross_entropy, x, y), expected)
    assert len(rowed) == 1


def test_dropout_does_not_run_in_a_row(rowed):
    net, x, y = row_of_layers()
    net.train()
    rowed.clear()
    with pytest.raises(RuntimeError, match="random"):
        per_sample_grads(net, F.cross_entropy, x, y)
    assert not rowed


def test_statistics_that_no_batch_has_updated(rowed):
    """The warning comes from the block."""
    net, x, y = row_of_layers()
    net[1] = nn.BatchNorm2d(4).double()
    rowed.clear()
    vmap_safe_module._warned_of_statistics.discard(nn.Sequential)
    with pytest.warns(NeverUpdatedWarning):
        per_sample_grads(net, F.cross_entropy, x, y)
    assert not rowed


def test_a_model_that_another_thread_holds(rowed):
    """The block refuses it, and nothing else may run it."""
    net, x, y = row_of_layers()
    rowed.clear()
    opened, done = threading.Event(), threading.Event()

    def hold():
        with vmap_safe(net, mode="no_running_stats"):
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert opened.wait(60)
        with pytest.raises(BlockError, match="another thread holds"):
            per_sample_grads(net, F.cross_entropy, x, y)
    finally:
        done.set()
        thread.join()
    assert not rowed


def test_in_other_modes_and_blocks(rowed):
    """There layers mean something else, or the block refuses the model."""
    net, x, y = row_of_layers()
    rowed.clear()
    for mode in ("no_running_stats", "group_norm"):
        expected = slow.rows_in(net, mode, F.cross_entropy, x, y)
        found = per_sample_grads(net, F.cross_entropy, x, y, mode=mode, num_groups=2)
        assert found.keys() == expected.keys()
    with vmap_safe(net):
        per_sample_grads(net, F.cross_entropy, x, y)
    per_sample_grads(net, F.cross_entropy, x, y, also=(nn.Dropout,))
    per_sample_grads(net, F.cross_entropy, x, y, fast=False)
    assert not rowed


def writes_a_copy(h, y):
    a = h[:, :2].contiguous()  # of one sample a view of h
    a.mul_(3)
    return F.cross_entropy(h, y)


def writes_what_was_copied(h, y):
    a = h.transpose(0, 1).unsqueeze(0).contiguous().squeeze(0).transpose(0, 1)
    h *= 2
    return F.cross_entropy(a, y)


def writes_in_a_function(h, y):
    F.relu(h[:, :2].contiguous(), inplace=True)
    return F.cross_entropy(h, y)


def writes_a_sum(h, y):
    v = h[:, 0]
    total = v.sum()
    total *= 2
    return total + v


def multiplies_by_itself(h, y):
    return F.linear(h, h).sum()


@pytest.mark.parametrize(
    "loss",
    [
        *(writes_a_copy, writes_what_was_copied, writes_in_a_function),
        *(writes_a_sum, multiplies_by_itself),
    ],
)
def test_what_only_a_batch_shares(loss):
    """Memory and samples: views of one sample that are copies of a batch, and so on."""
    net = nn.Linear(4, 4).double()
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.randint(4, (4,))
    expected = slow.rows_in(net, "eval", lambda h, y: loss(h, y).sum(), x, y)
    assert_same(per_sample_grads(net, loss, x, y), expected)


def test_a_wider_number_does_not_widen():
    """A parameter without dimensions leaves the dtype of a float32 tensor."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.tensor(1e30, dtype=torch.float64))

        def forward(self, x):
            return self.layer(x) * self.scale

    def loss(h):
        return h.square().sum().sqrt()

    losses = per_sample(Scaled(), loss, torch.randn(3, 4), want=q.Losses())
    assert losses.dtype == torch.float32 and losses.isinf().all()


def test_an_input_of_a_frozen_layer_is_written():
    """Also if the call is too large to be caught."""

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(128, 128)
            self.frozen = nn.Linear(128, 128).requires_grad_(False)

        def forward(self, x):
            h = self.layer(x)
            z = self.frozen(h)
            h += z
            return h

    net, x = Adds().double(), torch.randn(1025, 128, dtype=torch.float64)
    y = torch.randint(4, (1025,))
    found = per_sample_grads(net, F.cross_entropy, x, y)
    some = slow.rows_in(net, "eval", F.cross_entropy, x[:3], y[:3])
    assert_same({name: found[name][:3] for name in some}, some)
