"""What real networks do to a block: small blocks in the manner of timm and torchvision.

Every network is compared with a slow loop over its slices, run on a copy whose
normalisation layers are written out by hand (:class:`Formula`): no batch norm of
torch's, no vmap, nothing of the package. Numbers are float64.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from blocks import EACH_ALONE, block
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from vmapsafe import per_sample_grads

GROUPS = 2
SLICES, SAMPLES = 4, 3
IMAGE = (3, 6, 6)


# -- Layers as libraries write them ---------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a forward of its own, through both flags, and an activation after it."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.act = nn.SiLU()

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        use_input = self.training or self.running_mean is None
        tracks = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            use_input,
            factor,
            self.eps,
        )
        return self.act(x)


class StdConv2d(nn.Conv2d):
    """timm's: weights standardised by a call of F.batch_norm that is no layer's."""

    def scale(self):
        return None

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=self.scale(),
            training=True,
            momentum=0.0,
            eps=1e-6,
        )
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class ScaledStdConv2d(StdConv2d):
    """timm's, with a learned gain."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels))

    def scale(self):
        return self.gain * 0.7


class FrozenBatchNorm2d(nn.Module):
    """torchvision's: everything is a buffer and nothing is ever updated."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class Attention(nn.Module):
    """LeViT's: biases looked up by a buffer, cached in eval mode, dropped by train().

    A cache filled inside a transform would hold its tensor: its gradient is zero.
    """

    def __init__(self):
        super().__init__()
        self.qk = nn.Linear(3, 8)
        self.v = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.biases = nn.Parameter(torch.linspace(-1.0, 1.0, 9))
        where = torch.arange(9)
        self.register_buffer(
            "offsets", (where[:, None] - where).abs(), persistent=False
        )
        self.cache = {}

    def train(self, mode=True):
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def bias(self, device):
        if self.training:
            return self.biases[self.offsets]
        if device not in self.cache:
            self.cache[device] = self.biases[self.offsets]
        return self.cache[device]

    def forward(self, x):
        q, k = self.qk(x.flatten(2).transpose(1, 2)).chunk(2, -1)
        v = self.v(x).flatten(2).transpose(1, 2)  # not contiguous, on purpose
        return ((q @ k.mT + self.bias(x.device)).softmax(-1) @ v).sin()


# -- Networks -------------------------------------------------------------------------


def conv_bn(inp, out, kernel=3, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    )


class Residual(nn.Module):
    """BasicBlock, Bottleneck and inverted residual: a branch, ``out += identity``."""

    def __init__(self, branch, shortcut=None, after=None):
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()
        self.after = after or nn.Identity()

    def forward(self, x):
        identity = self.shortcut(x)
        out = self.branch(x)
        out += identity
        return self.after(out)


def basic(inp, out, stride=1):
    branch = nn.Sequential(conv_bn(inp, out, 3, stride), nn.SiLU(), conv_bn(out, out))
    shortcut = conv_bn(inp, out, 1, stride) if inp != out or stride > 1 else None
    return Residual(branch, shortcut, nn.ReLU(inplace=True))


def bottleneck(inp, out):
    branch = nn.Sequential(
        *(conv_bn(inp, 4, 1), nn.ReLU(inplace=True)),
        *(conv_bn(4, 4), nn.ReLU(inplace=True), conv_bn(4, out, 1)),
    )
    return Residual(branch, conv_bn(inp, out, 1), nn.ReLU(inplace=True))


def inverted(channels):
    branch = nn.Sequential(
        *(conv_bn(channels, 8, 1), nn.ReLU6(inplace=True)),
        *(conv_bn(8, 8, groups=8), nn.ReLU6(inplace=True)),
        conv_bn(8, channels, 1),
    )
    return Residual(branch)


def resnet(norm=None):
    stem = [conv_bn(3, 4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*stem, basic(4, 4), basic(4, 8), bottleneck(8, 8), *head)


def after_conv(layer, *rest):
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), layer, *rest, nn.Tanh())


def shared_weights():
    net = nn.Sequential(conv_bn(3, 4), nn.Tanh(), conv_bn(4, 4), conv_bn(4, 4))
    net[3][0].weight = net[2][0].weight
    net[3][1].weight = net[0][1].weight
    return net


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x)).tanh())).tanh()


def under_two_names():
    block = conv_bn(3, 3)
    return nn.Sequential(block, nn.Tanh(), block, nn.Tanh())


def lazy():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Tanh())
    net(torch.randn(2, *IMAGE))
    return net


def lazy_instance_norm():
    net = after_conv(nn.LazyInstanceNorm2d(affine=True, track_running_stats=True))
    net(torch.randn(2, *IMAGE))
    return net


def mixed(dimensions, layer):
    """A layer in 1 or 3 dimensions, after something to differentiate by."""
    conv = {0: nn.Linear, 1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    mix = conv(3, 4) if dimensions == 0 else conv(3, 4, 1)
    return nn.Sequential(mix, layer, nn.Tanh())


KEPT = {"affine": True, "track_running_stats": True}

NETS = {
    "batch norm and activation": lambda: after_conv(BatchNormAct2d(4)),
    "the same, not affine": lambda: after_conv(BatchNormAct2d(4, affine=False)),
    "the same, momentum=None": lambda: after_conv(BatchNormAct2d(4, momentum=None)),
    "standardised weights": lambda: nn.Sequential(
        StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), StdConv2d(4, 4, 3)
    ),
    "standardised weights, scaled": lambda: nn.Sequential(
        ScaledStdConv2d(3, 4, 3), BatchNormAct2d(4), ScaledStdConv2d(4, 4, 3)
    ),
    "basic": lambda: basic(3, 4, 2),
    "bottleneck": lambda: bottleneck(3, 8),
    "inverted residual": lambda: inverted(3),
    "resnet": resnet,
    "max pool": lambda: after_conv(nn.BatchNorm2d(4), nn.MaxPool2d(2)),
    "shared weights": shared_weights,
    "used twice": UsedTwice,
    "under two names": under_two_names,
    "attention": Attention,
    "frozen for good": lambda: after_conv(FrozenBatchNorm2d(4), nn.BatchNorm2d(4)),
    "sync": lambda: after_conv(nn.SyncBatchNorm(4)),
    "sync, momentum=None": lambda: after_conv(nn.SyncBatchNorm(4, momentum=None)),
    "not affine": lambda: after_conv(nn.BatchNorm2d(4, affine=False)),
    "no statistics": lambda: after_conv(nn.BatchNorm2d(4, track_running_stats=False)),
    "momentum=None": lambda: after_conv(nn.BatchNorm2d(4, momentum=None)),
    "1d, (N, C)": lambda: mixed(0, nn.BatchNorm1d(4)),
    "1d, (N, C, L)": lambda: mixed(1, nn.BatchNorm1d(4)),
    "3d": lambda: mixed(3, nn.BatchNorm3d(4)),
    "instance 1d": lambda: mixed(1, nn.InstanceNorm1d(4, **KEPT)),
    "instance 2d": lambda: after_conv(nn.InstanceNorm2d(4, **KEPT)),
    "instance 3d": lambda: mixed(3, nn.InstanceNorm3d(4, **KEPT)),
    "instance 2d, no statistics": lambda: after_conv(nn.InstanceNorm2d(4)),
    "lazy": lazy,
    "lazy instance": lazy_instance_norm,
}
SHAPES = {
    "attention": (3, 3, 3),
    "1d, (N, C)": (3,),
    "1d, (N, C, L)": (3, 5),
    "instance 1d": (3, 5),
    "3d": (3, 2, 3, 4),
    "instance 3d": (3, 2, 3, 4),
}


def built(build, counter=3):
    """A network in float64 whose statistics are away from their initial values."""
    torch.manual_seed(0)
    net = build().double()
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(counter)
        elif buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    for name, parameter in net.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.rand_like(parameter))
    return net


def batch(name, samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    shape = (SLICES, samples, *SHAPES.get(name, IMAGE))
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3


# -- The reference --------------------------------------------------------------------


class Formula(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias with statistics chosen by name."""

    def __init__(self, layer, statistics):
        super().__init__()
        self.statistics, self.eps = statistics, layer.eps
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        self.register_buffer("running_mean", layer.running_mean)
        self.register_buffer("running_var", layer.running_var)
        self.after = getattr(layer, "act", nn.Identity())

    def forward(self, x):
        column = (1, -1) + (1,) * (x.dim() - 2)
        if self.statistics == "running":
            mean, var = self.running_mean.view(column), self.running_var.view(column)
            y = (x - mean) / (var + self.eps).sqrt()
        else:
            number = GROUPS if x.size(1) % GROUPS == 0 else x.size(1)
            groups = x.reshape(x.size(0), number, -1, *x.shape[2:])
            y, dims = {
                "slice": (x, [0, *range(2, x.dim())]),
                "sample": (x, [*range(2, x.dim())]),
                "groups": (groups, [*range(2, groups.dim())]),
            }[self.statistics]
            y = y - y.mean(dims, keepdim=True)
            y = (y / (y.square().mean(dims, keepdim=True) + self.eps).sqrt()).view_as(x)
        if self.weight is not None:
            y = y * self.weight.view(column) + self.bias.view(column)
        return self.after(y)


def statistics(layer, mode, model):
    """What a layer of torch's normalises with, from the table of modes."""
    own = "sample" if isinstance(layer, _InstanceNorm) else "slice"
    if layer.running_mean is None:
        return own if own == "sample" or mode != "group_norm" else "groups"
    if model.training and not layer.training or mode == "eval":
        return "running"
    if mode == "group_norm" and own == "sample":  # instance norm is left alone
        return own if layer.training else "running"
    return own if mode == "no_running_stats" else "groups"


def standardised(layer, x):
    """A standardised convolution written out."""
    rows = layer.weight.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / (rows.square().mean(1, keepdim=True) + 1e-6).sqrt()
    if layer.scale() is not None:
        rows = rows * layer.scale()[:, None]
    return layer._conv_forward(x, rows.view_as(layer.weight), layer.bias)


def by_hand(model, mode):
    """A copy converted by hand; layers that occur twice are converted once."""
    model = copy.deepcopy(model)
    written_out = {}
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            if isinstance(layer, (_BatchNorm, _InstanceNorm)):
                formula = Formula(layer, statistics(layer, mode, model))
                parent._modules[name] = written_out.setdefault(layer, formula)
            elif isinstance(layer, StdConv2d):
                layer.forward = functools.partial(standardised, layer)
    return model


def weighted(out):
    """A loss with another weight for every entry, so that nothing cancels."""
    return (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum()


def loop(reference, x):
    """Outputs and gradients, one slice after the other."""
    named = dict(reference.named_parameters())
    outs, rows = [], []
    for one in x:
        outs.append(reference(one))
        loss = weighted(outs[-1])
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        rows.append(
            [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(named.values(), grads)
            ]
        )
    stacked = [torch.stack(column) for column in zip(*rows)]
    return torch.stack(outs).detach(), dict(zip(named, stacked))


def with_parameters(net, parameters, x):
    """functional_call, every parameter named where it stands.

    Left to tie weights itself, torch 2.13 leaves plain tensors for parameters behind in
    a module that has two names.
    """
    given = {p: parameters[name] for name, p in net.named_parameters()}
    named = {
        f"{path}.{name}".lstrip("."): given[p]
        for path, module in net.named_modules()
        for name, p in module._parameters.items()
        if p is not None
    }
    return functional_call(net, named, (x,), tie_weights=False)


def transformed(net, x, called=None):
    """Outputs and gradients as the user of a block writes them."""

    def loss(parameters, one):
        return weighted(with_parameters(net, parameters, one))

    parameters = {n: p.detach() for n, p in net.named_parameters()}
    out = vmap(called or net)(x).detach()
    return out, vmap(grad(loss), in_dims=(None, 0))(parameters, x)


def state(model):
    """Flags, buffers by identity and bits, hooks and attributes of every module."""
    return [
        (
            path,
            layer.training,
            getattr(layer, "track_running_stats", None),
            [
                (n, id(b), b.tolist())
                for n, b in layer._buffers.items()
                if b is not None
            ],
            [(n, id(p), p is None or p.grad) for n, p in layer._parameters.items()],
            len(layer._forward_hooks) + len(layer._forward_pre_hooks),
            sorted(vars(layer)),
        )
        for path, layer in model.named_modules()
    ]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def assert_agrees(net, x, mode, model=None, called=None):
    """The block equals the loop, and leaves the network as it was."""
    expected = loop(by_hand(net, mode), x)
    before = state(net)
    with block(model or net, mode):
        found = transformed(net, x, called)
    assert state(net) == before
    assert_same(found, expected)
    return found


# -- Every network in every mode ------------------------------------------------------


IN_EVAL = [name for name in NETS if name != "attention"]  # which fills its cache there


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("name", NETS)
def test_slices_of_several(name, mode):
    """Outputs and gradients of every slice are those of the loop."""
    assert_agrees(built(NETS[name]), batch(name), mode)


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("name", IN_EVAL)
def test_slices_of_several_with_a_model_in_eval_mode(name, mode):
    """The mode applies there too."""
    assert_agrees(built(NETS[name]).eval(), batch(name), mode)


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("name", NETS)
def test_per_sample_gradients(name, mode):
    """Rows of batches of one, for which torch's batch norm on a CPU is wrong."""
    net, x = built(NETS[name]), batch(name, 1)
    before = state(net)
    if (name, mode) == ("1d, (N, C)", "no_running_stats"):
        with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\).* one value"):
            per_sample_grads(net, weighted, x[:, 0], mode=mode)
    else:
        _, expected = loop(by_hand(net, mode), x)
        found = per_sample_grads(net, weighted, x[:, 0], mode=mode, num_groups=GROUPS)
        assert_same(found, expected)
    assert state(net) == before


@pytest.mark.parametrize("counter", [0, 3])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d])
@pytest.mark.parametrize("mode", EACH_ALONE)
def test_cumulative_average(mode, layer, counter):
    """momentum=None divides by the counter, which a block must not move."""
    net = built(lambda: after_conv(layer(4, momentum=None)), counter)
    assert_agrees(net, batch(""), mode)
    assert net[1].num_batches_tracked.item() == counter


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_cumulative_instance_norm(mode):
    """Instance norm with momentum=None, which counts nothing in torch itself."""
    layer = functools.partial(nn.InstanceNorm2d, 4, momentum=None, **KEPT)
    assert_agrees(built(lambda: after_conv(layer())), batch(""), mode)


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm2d, nn.LazyInstanceNorm2d])
def test_lazy_layer_without_a_batch(lazy, mode):
    """It is refused at entry, by name, and nothing is switched."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), lazy(affine=True))
    flags = [(m.training, getattr(m, "track_running_stats", 0)) for m in net.modules()]
    with pytest.raises(ValueError, match="'2' .*lazy.*one batch"):
        with block(net, mode):
            pass
    assert flags == [
        (m.training, getattr(m, "track_running_stats", 0)) for m in net.modules()
    ]


# -- Frozen layers --------------------------------------------------------------------

FROZEN = {"0.1", "3.branch.0.1", "3.branch.2.1"}


def partly_frozen():
    """As in fine-tuning: stem and first stage in eval, the model in training."""
    net = resnet().train()
    for path in FROZEN:
        net.get_submodule(path).eval()
    return net


INSIDE = {
    "nothing": lambda net: None,
    "train()": lambda net: net.train(),
    "eval()": lambda net: net.eval().train(),
    "train() of the stem": lambda net: net[0].train(),
}


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("inside", INSIDE)
def test_frozen_layers_stay_frozen(inside, mode):
    """They use their running statistics in every mode, whatever is set inside."""
    net, x = built(partly_frozen), batch("")
    reference = by_hand(net, mode)
    if mode != "eval":
        assert FROZEN == {
            path
            for path, layer in reference.named_modules()
            if isinstance(layer, Formula) and layer.statistics == "running"
        }
    with block(net, mode):
        INSIDE[inside](net)
        found = transformed(net, x)
    assert_same(found, loop(reference, x))
    asked = built(partly_frozen)
    INSIDE[inside](asked)  # the owner's last word counts after the block
    assert [m.training for m in net.modules()] == [m.training for m in asked.modules()]


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_in_an_eval_model_no_layer_counts_as_frozen(mode):
    """The mode applies to all layers, also those set to eval before."""
    net = built(partly_frozen).eval()
    net[4].branch[0][1].train()
    assert_agrees(net, batch(""), mode)


# -- Hand-made layers -----------------------------------------------------------------


class HandMade(nn.Module):
    """Batch norm as people write it, with an update of the statistics of choice."""

    def __init__(self, update, mu="mu", sigma="sigma"):
        super().__init__()
        self.update, self.names = update, (mu, sigma)
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer(mu, torch.zeros(4))
        self.register_buffer(sigma, torch.ones(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            self.update(self, mean.detach(), var.detach())
        else:
            mean, var = (getattr(self, name) for name in self.names)
        scale = self.weight / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None]


def in_place(layer, mean, var):
    layer.mu.mul_(0.9).add_(mean, alpha=0.1)
    layer.sigma.mul_(0.9).add_(var, alpha=0.1)
    layer.count.add_(1)


def without_grad(layer, mean, var):
    with torch.no_grad():
        layer.mu.lerp_(mean, 0.1)
        layer.sigma.copy_(0.9 * layer.sigma + 0.1 * var)
        layer.count += 1


def operators(layer, mean, var):
    layer.mu *= 0.9
    layer.mu += 0.1 * mean
    layer.sigma -= 0.1 * (layer.sigma - var)


def assigned(layer, mean, var):
    layer.mu = 0.9 * layer.mu + 0.1 * mean
    layer.sigma = torch.lerp(layer.sigma, var, 0.1)
    layer.count = layer.count + 1


def assigned_then_in_place(layer, mean, var):
    layer.mu = 0.9 * layer.mu
    layer.mu.add_(0.1 * mean)


def registered(layer, mean, var):
    layer.register_buffer("mu", 0.9 * layer.mu + 0.1 * mean)
    layer._buffers["sigma"] = 0.9 * layer.sigma + 0.1 * var


def items(layer, mean, var):
    layer.mu[:] = 0.9 * layer.mu + 0.1 * mean
    layer.sigma[0] = var[0]
    layer.sigma[1:3] += 1


def out(layer, mean, var):
    torch.add(0.9 * layer.mu, mean, alpha=0.1, out=layer.mu)
    torch.mul(layer.sigma, 0.9, out=layer.sigma)


def out_of_a_pair(layer, mean, var):
    both = torch.stack([layer.mu, mean])
    torch.min(both, 0, out=(layer.mu, torch.empty(4, dtype=torch.long)))


def data(layer, mean, var):
    layer.mu.data.mul_(0.9).add_(0.1 * mean)
    layer.sigma.data.copy_(0.9 * layer.sigma + 0.1 * var)
    layer.sigma.data[0] = 2.0


def detached(layer, mean, var):
    layer.mu.detach().add_(mean)


def views(layer, mean, var):
    layer.mu[0].add_(mean[0])
    layer.mu.view(2, 2)[1].mul_(0.5)
    layer.sigma.unsqueeze(0).add_(var)
    first, _ = layer.sigma.chunk(2)
    first.zero_()


def view_out(layer, mean, var):
    torch.mul(mean[:2], 2.0, out=layer.mu[:2])


def functions(layer, mean, var):
    torch.neg_(layer.mu)
    torch.relu_(layer.sigma.sub_(1))


UPDATES = {
    f.__name__: f
    for f in (
        *(in_place, without_grad, operators, assigned, assigned_then_in_place),
        *(registered, items, out, out_of_a_pair, data, detached, views, view_out),
        functions,
    )
}


def hand_made(update):
    return built(lambda: after_conv(HandMade(update)))


def parameters_of(net):
    return {n: p.detach() for n, p in net.named_parameters()}


def buffers_of(net):
    return dict(net.named_buffers())


def loss(net, parameters, x):
    return weighted(functional_call(net, parameters, (x,)))


CONTEXTS = {
    "plain": lambda net, x: net(x[0]),
    "backward": lambda net, x: weighted(net(x[0])).backward(),
    "vmap": lambda net, x: vmap(net)(x),
    "grad": lambda net, x: grad(loss, 1)(net, parameters_of(net), x[0]),
    "vmap of grad": lambda net, x: vmap(
        grad(lambda p, one: loss(net, p, one)), (None, 0)
    )(parameters_of(net), x),
    "grad of vmap": lambda net, x: grad(lambda x: vmap(net)(x).sum())(x),
    "jacrev": lambda net, x: jacrev(lambda p: loss(net, p, x[0]))(parameters_of(net)),
    "jvp": lambda net, x: jvp(net, (x[0],), (x[1],)),
    "buffers handed in": lambda net, x: functional_call(
        net, {**parameters_of(net), **buffers_of(net)}, (x[0],)
    ),
    "buffers handed in, vmap": lambda net, x: vmap(
        lambda b, one: functional_call(net, b, (one,)), (None, 0)
    )(buffers_of(net), x),
    "buffers handed in, grad": lambda net, x: grad(
        lambda p, b: weighted(functional_call(net, (p, b), (x[0],)))
    )(parameters_of(net), buffers_of(net)),
    "buffers handed in, vmap of grad": lambda net, x: vmap(
        grad(lambda p, b, x: weighted(functional_call(net, (p, b), (x,)))),
        (None, None, 0),
    )(parameters_of(net), buffers_of(net), x),
}


@pytest.mark.filterwarnings("ignore::vmapsafe.LeftOutWarning")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("update", UPDATES)
def test_hand_made_buffers_are_not_written(update, context):
    """Same values, same objects after the block; outside they update as ever."""
    net, x = hand_made(UPDATES[update]), batch("")
    never_in_a_block = copy.deepcopy(net)
    before = [(id(b), b.tolist()) for b in net.buffers()]
    with block(net, "eval"):
        CONTEXTS[context](net, x)
        assert [(id(b), b.tolist()) for b in net.buffers()] == before
    assert [(id(b), b.tolist()) for b in net.buffers()] == before
    net(x[0])
    never_in_a_block(x[0])
    assert_same(dict(net.named_buffers()), dict(never_in_a_block.named_buffers()))
    assert [b.tolist() for b in net.buffers()] != [values for _, values in before]


# Under vmap torch itself refuses ``.data`` of a batched tensor.
@pytest.mark.parametrize("update", [name for name in UPDATES if name != "data"])
def test_stacked_buffers_are_not_written(update):
    """An ensemble's buffers, one row a member, keep their values."""
    nets, x = [hand_made(UPDATES[update]) for _ in range(SLICES)], batch("")
    parameters, buffers = stack_module_state(nets)
    before = {name: buffer.clone() for name, buffer in buffers.items()}

    def member(parameters, buffers, one):
        return functional_call(nets[0], (parameters, buffers), (one,))

    with block(nets[0], "eval"):
        found = vmap(member)(parameters, buffers, x)
        vmap(member, (0, 0, None))(parameters, buffers, x[0])
    assert_same(buffers, before)
    silent = [hand_made(lambda *_: None) for _ in nets]
    assert_same(found, torch.stack([net(one) for net, one in zip(silent, x)]))


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("update", UPDATES)
def test_hand_made_numbers(update, mode):
    """The layer computes what it computes without its update."""
    net, x = hand_made(UPDATES[update]), batch("")
    expected = loop(hand_made(lambda *_: None), x)
    with block(net, mode):
        found = transformed(net, x)
    assert_same(found, expected)


def data_assigned(layer, mean, var):
    layer.mu.data = 0.9 * layer.mu + 0.1 * mean
    mean.data = mean + 1  # not a buffer: happens
    layer.seen = mean


def test_assignment_to_data():
    """It does not happen to a buffer's data, only to others. (vmap refuses both.)"""
    net, x = hand_made(data_assigned), batch("")[0]
    before = [(id(b), b.tolist()) for b in net.buffers()]
    expected = net[0](x).mean((0, 2, 3)).detach() + 1
    with block(net, "eval"):
        net(x)
    assert [(id(b), b.tolist()) for b in net.buffers()] == before
    assert_same(net[1].seen, expected)
    net(x)
    assert net[1].mu.tolist() != before[0][1]


def in_place_by_usual_names(layer, mean, var):
    layer.running_mean.mul_(0.9).add_(mean, alpha=0.1)
    layer.running_var.mul_(0.9).add_(var, alpha=0.1)


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_hand_made_by_the_usual_names(mode):
    """Buffers running_mean and running_var: "eval" switches the layer."""

    def build(update):
        names = ("running_mean", "running_var")
        return built(lambda: after_conv(HandMade(update, *names)))

    net, x = build(in_place_by_usual_names), batch("")
    reference = build(lambda *_: None)
    reference[1].train(mode != "eval")
    before = state(net)
    with block(net, mode):
        found = transformed(net, x)
        plain = net(x[0])
    assert state(net) == before
    assert_same(found, loop(reference, x))
    assert_same(plain, reference(x[0]))
    net(x[0])
    assert state(net) != before


class Reads(HandMade):
    """Normalises with what it has just updated."""

    def forward(self, x):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        self.update(self, mean, var)
        return (x - self.mu[:, None, None]) / self.sigma[:, None, None]


READ_AFTER = {
    # After a write that was left out the old value, after "self.mu = …" the new.
    "in_place": (in_place, lambda old, new: old),
    "assigned": (assigned, lambda old, new: 0.9 * old + 0.1 * new),
}


@pytest.mark.filterwarnings("ignore::vmapsafe.LeftOutWarning")
@pytest.mark.parametrize("update", READ_AFTER)
def test_reading_what_was_updated(update):
    """What is read after an update, the same for every slice and call."""
    write, read = READ_AFTER[update]
    net, x = built(lambda: nn.Sequential(Reads(write))), batch("")
    x = torch.cat([x, x[:, :, :1]], 2)
    mu, sigma = net[0].mu.clone(), net[0].sigma.clone()
    expected = torch.stack(
        [
            (one - read(mu, one.mean((0, 2, 3)))[:, None, None])
            / read(sigma, one.var((0, 2, 3), unbiased=False))[:, None, None]
            for one in x
        ]
    )
    with block(net, "eval"):
        assert_same(vmap(net)(x), expected)
        assert_same(torch.stack([net(one) for one in x]), expected)


def ema(net, other):
    for mine, theirs in zip(net.state_dict().values(), other.state_dict().values()):
        mine.copy_(theirs)


def ema_by_lerp(net, other):
    with torch.no_grad():
        for mine, theirs in zip(net.buffers(), other.buffers()):
            mine.lerp_(theirs, 0.5) if mine.is_floating_point() else mine.copy_(theirs)


def filled(net, other):
    net[1].count.fill_(7)
    net[1].mu[0] = 5.0
    torch.add(net[1].sigma, 1.0, out=net[1].sigma)


FROM_OUTSIDE = {
    "load_state_dict": lambda net, other: net.load_state_dict(other.state_dict()),
    "EMA by copy_": ema,
    "EMA by lerp_": ema_by_lerp,
    "item, out=, fill_": filled,
    "assignment": lambda net, other: setattr(net[1], "mu", other[1].mu + 1),
}


@pytest.mark.parametrize("write", FROM_OUTSIDE)
@pytest.mark.parametrize("mode", EACH_ALONE)
def test_writes_from_outside_a_forward_happen(mode, write):
    """They happen inside the block and stay after it."""
    net = built(lambda: after_conv(HandMade(in_place), nn.BatchNorm2d(4)))
    other = built(lambda: after_conv(HandMade(in_place), nn.BatchNorm2d(4)), 9)
    for tensor in other.state_dict().values():
        tensor.add_(1)
    expected = copy.deepcopy(net)
    FROM_OUTSIDE[write](expected, other)
    with block(net, mode):
        vmap(net)(batch(""))
        FROM_OUTSIDE[write](net, other)
        vmap(net)(batch(""))
        assert_same(net.state_dict(), expected.state_dict())
    assert_same(net.state_dict(), expected.state_dict())


class Rotary(nn.Module):
    """A table that grows with the input, its size kept beside it: no statistics."""

    def __init__(self):
        super().__init__()
        self.size = 0
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x):
        if x.size(-1) > self.size:
            self.size = x.size(-1)
            self.register_buffer("table", torch.arange(self.size).cos(), False)
        return x * self.table[: x.size(-1)]


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_a_table_that_grew_in_a_block_fits_afterwards(mode):
    """After the block the network works like one that never was in it."""
    net = built(lambda: after_conv(nn.BatchNorm2d(4), Rotary()))
    x = batch("")
    with block(net, mode):
        vmap(net)(x)
    assert_same(net.eval()(x[0]), by_hand(net, "eval")(x[0]))


# -- Random layers --------------------------------------------------------------------


def torchvision_draw(x, keep, shape):
    noise = torch.empty(shape, dtype=x.dtype, device=x.device)
    return noise.bernoulli_(keep).div_(keep)


def statement_draw(x, keep, shape):
    """Must not go on with the memory as it was before the draw."""
    noise = torch.empty(shape, dtype=x.dtype)
    noise.bernoulli_(keep)
    return noise.div_(keep)


def timm_draw(x, keep, shape):
    return x.new_empty(shape).bernoulli_(keep).div_(keep)


def bernoulli_draw(x, keep, shape):
    return torch.bernoulli(torch.full(shape, keep, dtype=x.dtype)) / keep


def rand_draw(x, keep, shape):
    return (torch.rand(shape, dtype=x.dtype) < keep) / keep


DRAWS = {
    f.__name__: f
    for f in (
        *(torchvision_draw, statement_draw, timm_draw),
        *(bernoulli_draw, rand_draw),
    )
}


class StochasticDepth(nn.Module):
    """Drops a branch for each sample (a row) or for the batch, never in eval mode."""

    def __init__(self, draw, row):
        super().__init__()
        self.draw, self.row = draw, row

    def forward(self, x):
        if not self.training:
            return x
        shape = (x.size(0) if self.row else 1,) + (1,) * (x.dim() - 1)
        return x * self.draw(x, 0.5, shape)


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("row", [True, False], ids=["row", "batch"])
@pytest.mark.parametrize("draw", DRAWS)
def test_stochastic_depth(draw, row, mode):
    """Live inside a block: every slice draws for itself, what is kept is doubled."""
    branch = lambda: nn.Sequential(  # noqa: E731
        conv_bn(3, 3), StochasticDepth(DRAWS[draw], row)
    )
    net, x = built(branch), batch("").repeat(16, 1, 1, 1, 1)
    reference = by_hand(net, mode)
    reference[1].eval()
    expected = torch.stack([reference(one) for one in x])
    torch.manual_seed(2)
    with block(net, mode):
        found = vmap(net, randomness="different")(x)
    kept = found.flatten(2).abs().sum(2) > 0  # (slices, samples)
    assert_same(found, 2 * expected * kept[..., None, None, None])
    assert 0.3 < kept.double().mean() < 0.7
    assert row == any(len(set(one)) == 2 for one in kept.tolist())


@pytest.mark.parametrize("draw", DRAWS)
def test_the_same_draw_for_all_slices(draw):
    """randomness="same" means what it means in vmap."""
    net = built(
        lambda: nn.Sequential(conv_bn(3, 3), StochasticDepth(DRAWS[draw], True))
    )
    torch.manual_seed(2)
    with block(net, "eval"):
        found = vmap(net, randomness="same")(batch("", 8)) != 0
    kept = found.flatten(2).any(2)
    assert (kept == kept[0]).all() and kept[0].any() and not kept[0].all()


@pytest.mark.parametrize("draw", DRAWS)
def test_no_draw_under_randomness_error(draw):
    """The error names the layer and the argument to write; the network is unharmed."""
    net = built(
        lambda: nn.Sequential(conv_bn(3, 3), StochasticDepth(DRAWS[draw], True))
    )
    before = state(net)
    with pytest.raises(RuntimeError) as error:
        with block(net, "eval"):
            vmap(net)(batch(""))
    notes = " ".join(error.value.__notes__)
    assert "'1' (StochasticDepth)" in notes and "randomness=" in notes
    assert state(net) == before


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_dropout_stays_live(mode):
    """Every slice drops entries of its own; those it keeps are the loop's, doubled."""
    net, x = built(lambda: after_conv(BatchNormAct2d(4), nn.Dropout(0.5))), batch("")
    net = net[:-1]  # without the tanh
    reference = by_hand(net, mode)
    reference[2].eval()
    torch.manual_seed(2)
    with block(net, mode):
        found = vmap(net, randomness="different")(x)
    kept = found != 0
    assert_same(found, 2 * kept * torch.stack([reference(one) for one in x]))
    assert 0.4 < kept.double().mean() < 0.6
    assert not (kept == kept[0]).all()


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_a_cache_filled_in_eval_mode_stays_empty(mode):
    """The network itself stays in training, so its biases have a gradient."""
    net = built(Attention)
    _, rows = assert_agrees(net, batch("attention"), mode)
    assert net.training and net.cache == {}
    assert (rows["biases"] != 0).all()


# -- Wrapped models -------------------------------------------------------------------

WRAPPERS = {
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DataParallel of torch.compile": lambda net: nn.DataParallel(
        torch.compile(net, backend="eager")
    ),
}


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("name", ["resnet", "batch norm and activation"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper, name, mode):
    """The numbers are the same whether the model is called wrapped or not."""
    net = built(NETS[name])
    wrapped = WRAPPERS[wrapper](net)
    assert_agrees(net, batch(""), mode, model=wrapped, called=wrapped)


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_model_without_vmap(wrapper, mode):
    """A plain call of the wrapped model works in a block, before it and after it."""
    net, x = built(NETS["resnet"]), batch("")[0]
    wrapped = WRAPPERS[wrapper](net)
    expected = by_hand(net, mode)(x)
    before = state(net)
    with block(wrapped, mode):
        assert_same(wrapped(x), expected)
    assert state(net) == before
    never_in_a_block = copy.deepcopy(net)
    assert_same(wrapped(x), never_in_a_block(x))
    assert_same(net.state_dict(), never_in_a_block.state_dict())


def test_one_compiled_model_in_all_modes():
    """A trace of outside, or of a block in another mode, is not used again."""
    net = built(lambda: after_conv(nn.BatchNorm2d(4), HandMade(in_place)))
    x = batch("")[0]
    compiled = torch.compile(net, backend="eager")
    for mode in (*EACH_ALONE, *reversed(EACH_ALONE)):
        never_in_a_block = copy.deepcopy(net)
        assert_same(compiled(x), never_in_a_block(x))
        assert_same(net.state_dict(), never_in_a_block.state_dict())
        expected = by_hand(net, mode)(x)
        before = state(net)
        with block(compiled, mode):
            assert_same(compiled(x), expected)
        assert state(net) == before


def with_a_compiled_part(net):
    net[1] = torch.compile(net[1], backend="eager")


def with_compiled_parts(net):
    for part in net:
        part.compile(backend="eager")


PARTS = {
    "a compiled part": with_a_compiled_part,
    "parts compiled in place": with_compiled_parts,
    "compiled in place": lambda net: net.compile(backend="eager"),
}


# torch's own, when the input of a compiled part has a history.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("parts", PARTS)
def test_models_with_compiled_parts(parts, mode):
    """Compiled regions give the same numbers, plain and under vmap."""
    torch._dynamo.reset()  # what other cases compiled must not be used here
    net, x = built(lambda: nn.Sequential(conv_bn(3, 4), basic(4, 4))), batch("")
    reference = by_hand(net, mode)
    expected = torch.stack([reference(one) for one in x])
    PARTS[parts](net)
    before = state(net)
    with block(net, mode):
        assert_same(net(x[0]), expected[0])
        assert_same(vmap(net)(x), expected)
    assert state(net) == before
