"""Cases in which torch's own normalisation is wrong or raises: derivatives of any
order, memory formats, autocast. Plain operations give the right values."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from vmapsafe import per_sample_grads, vmap_safe
from vmapsafe.testing import assert_same

D = torch.float64


# -- In plain operations ---------------------------------------------------------------


def by_statistics(layer, x, p, dims, shape):
    centred = x - x.mean(dims, keepdim=True)
    y = centred / (centred.square().mean(dims, keepdim=True) + layer.eps).sqrt()
    return affine(y, p, shape)


def affine(y, p, shape):
    if "weight" in p:
        y = y * p["weight"].reshape(shape)
    if "bias" in p:
        y = y + p["bias"].reshape(shape)
    return y


def channels(x):
    return [1, -1] + [1] * (x.dim() - 2)


def batch_norm(layer, x, p):
    dims = [d for d in range(x.dim()) if d != 1]
    return by_statistics(layer, x, p, dims, channels(x))


def running(layer, x, p):
    mean, var = (
        s.reshape(channels(x)) for s in (layer.running_mean, layer.running_var)
    )
    return affine((x - mean) / (var + layer.eps).sqrt(), p, channels(x))


def instance_norm(layer, x, p):
    return by_statistics(layer, x, p, list(range(2, x.dim())), channels(x))


def group_norm(layer, x, p):
    groups = getattr(layer, "num_groups", 1)
    grouped = x.reshape(len(x), groups, -1)
    y = by_statistics(layer, grouped, {}, [2], None).reshape(x.shape)
    return affine(y, p, channels(x))


def layer_norm(layer, x, p):
    shape = layer.normalized_shape
    return by_statistics(layer, x, p, list(range(-len(shape), 0)), shape)


def rms_norm(layer, x, p):
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return affine(y, p, layer.normalized_shape)


# (layer, shape of a slice, mode, written out)
IMAGE = (2, 3, 2, 2)
TRACKING = {"affine": True, "track_running_stats": True}
NORMS = {
    "batch norm, running": (lambda: nn.BatchNorm2d(3), IMAGE, "eval", running),
    "batch norm, own": (
        *(lambda: nn.BatchNorm2d(3), IMAGE, "no_running_stats", batch_norm),
    ),
    "batch norm, none": (
        *(lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3)),
        *("eval", batch_norm),
    ),
    "batch norm, groups": (lambda: nn.BatchNorm2d(3), IMAGE, "group_norm", group_norm),
    "instance norm": (
        *(lambda: nn.InstanceNorm2d(3, affine=True), IMAGE, "eval", instance_norm),
    ),
    "instance norm, tracking": (
        *(lambda: nn.InstanceNorm2d(3, **TRACKING), IMAGE),
        *("no_running_stats", instance_norm),
    ),
    "instance norm, running": (
        *(lambda: nn.InstanceNorm2d(3, **TRACKING), IMAGE, "eval", running),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 2, 2), "eval", group_norm),
    "layer norm": (lambda: nn.LayerNorm(3), (4, 3), "eval", layer_norm),
    "layer norm, no bias": (
        *(lambda: nn.LayerNorm((2, 3), bias=False), (4, 2, 3), "sync", layer_norm),
    ),
    "layer norm, no weight": (
        *(lambda: nn.LayerNorm(3, elementwise_affine=False), (4, 3)),
        *("group_norm", layer_norm),
    ),
    "rms norm": (lambda: nn.RMSNorm(3), (4, 3), "eval", rms_norm),
}


def made(name, dtype=D):
    make, shape, mode, written = NORMS[name]
    torch.manual_seed(1)
    layer = make().to(dtype)
    if getattr(layer, "running_mean", None) is not None:
        for _ in range(3):
            layer(torch.randn(5, *shape[1:], dtype=dtype) * 2 + 1)
    return layer, shape, mode, written


# -- Derivatives -----------------------------------------------------------------------


def forward_mode(f):
    return lambda t: jvp(f, (t,), (torch.ones_like(t),))[1]


def autograd(f):
    def derivative(t):
        t = t if t.requires_grad else t.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(f(t), t, create_graph=True)[0]

    return derivative


STEPS = {"j": forward_mode, "g": grad, "a": autograd, "r": jacrev, "w": jacfwd}
STEPS["h"] = hessian
# Derivatives from the inside out. Plain autograd sees functional ones only inside it.
ORDERS = {
    True: ["j", "g", "a", "jg", "gg", "ga", "aa", "aaa"],
    False: ["jj", "jg", "gj", "gg", "ja", "ga", "wr", "h", "jjj", "ggg", "gaa", "aaa"],
}


def derived(f, order):
    for step in order:
        f = STEPS[step](f)
    return f


def paths(layer, shape, size=3):
    """Inputs and parameters as functions of a number, and directions of outputs."""
    torch.manual_seed(2)
    a, b, c, direction = (torch.randn(size, *shape, dtype=D) for _ in range(4))
    p, q, r = (
        {n: torch.randn_like(v) for n, v in layer.named_parameters()} for _ in range(3)
    )

    def at(t):
        return {n: p[n] + t * q[n] + t * t * r[n] for n in p}

    return (a, b, c, direction), at


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_derivatives_of_any_order(name, fast):
    """Derivatives around vmap, inside it, on both sides, and without vmap."""
    layer, shape, mode, written = made(name)
    slices, at = paths(layer, shape)
    number = torch.tensor(0.7, dtype=D)

    def by_layer(x, p):
        return functional_call(layer, p, (x,))

    def by_hand(x, p):
        return written(layer, x, p)

    def of_slice(norm):
        def f(t, a, b, c, direction):
            return (norm(a + b * t + c * t * t, at(t)) * direction).sum()

        return f

    def around(norm, order, mapped):
        def f(t):
            return mapped(lambda *parts: of_slice(norm)(t, *parts))(*slices).sum()

        return derived(f, order)

    def on_both_sides(norm, inside, outside, mapped):
        def f(t):
            def row(*parts):
                return derived(lambda s: of_slice(norm)(s, *parts), inside)(t)

            return mapped(row)(*slices).square().sum()

        return derived(f, outside)

    def loop(f):
        return lambda *batches: torch.stack([f(*parts) for parts in zip(*batches)])

    def first(f):
        return lambda *batches: f(*[batch[0] for batch in batches])

    def compare(order, actual, expected):
        try:
            right = expected(number)
        except RuntimeError as error:  # the polynomial has no such derivative
            assert "does not require grad" in str(error)
            return
        assert_same(actual(number).detach(), right.detach(), rtol=1e-7, atol=1e-7)

    with vmap_safe(layer, mode=mode, num_groups=1, fast=fast):
        for order in ORDERS[fast]:
            for mapped, plainly in ((vmap, loop), (first, first)):
                compare(
                    order,
                    around(by_layer, order, mapped),
                    around(by_hand, order, plainly),
                )
            for i in range(1, len(order) + 1):
                inside, outside = order[:i], order[i:]
                if "a" not in inside:
                    compare(
                        order,
                        on_both_sides(by_layer, inside, outside, vmap),
                        on_both_sides(by_hand, inside, outside, loop),
                    )


# -- Memory ----------------------------------------------------------------------------


def orders(t):
    """The same numbers in every order of dimensions in memory, and with gaps."""
    for order in itertools.permutations(range(t.dim())):
        back = [order.index(d) for d in range(t.dim())]
        yield t.permute(order).contiguous().permute(back)
    room = torch.zeros([2 * size for size in t.shape], dtype=t.dtype)
    view = room[tuple(slice(0, None, 2) for _ in t.shape)]
    yield view.copy_(t)


SHAPES = [(1, 4, 2, 3), (2, 4, 1, 3), (3, 4, 2, 2)]
OF_IMAGES = [name for name in NORMS if name not in ("batch norm, none", "rms norm")]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", [n for n in OF_IMAGES if not n.startswith("layer")])
def test_orders_in_memory(name, mapped, fast):
    """Input and incoming gradient each in every order, in a slice or without vmap."""
    layer, _, mode, written = made(name)
    layer = layer.requires_grad_()
    channels = {n: len(v) for n, v in layer.named_parameters()}["weight"]
    p = {n: v.detach() for n, v in layer.named_parameters()}

    def rows(norm, x, g):
        def row(p, x, g):
            return grad(lambda p, x: (norm(p, x) * g).sum(), (0, 1))(p, x)

        return vmap(row, (None, 0, 0))(p, x[None], g[None]) if mapped else row(p, x, g)

    def by_layer(p, x):
        return functional_call(layer, p, (x,))

    for shape in SHAPES:
        torch.manual_seed(3)
        x, g = (torch.randn(shape, dtype=D)[:, :channels] for _ in "xg")
        expected = rows(lambda p, x: written(layer, x, p), x, g)
        with vmap_safe(layer, mode=mode, num_groups=1, fast=fast):
            for x_, g_ in itertools.product([*orders(x)][::4], [*orders(g)][::2]):
                assert_same(rows(by_layer, x_, g_), expected)


class Reorders(nn.Module):
    """Asks for orders in memory, and whether they are there, as some vision models."""

    def __init__(self, reorder):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 2)
        self.reorder = reorder

    def forward(self, x):
        h = self.conv(self.reorder(x))
        assert self.reorder(h).is_contiguous(memory_format=torch.channels_last)
        return self.norm(torch.split(self.reorder(h), [2, 2], 1)[0]).flatten(1)


LAST = {"memory_format": torch.channels_last}
REORDERINGS = {
    "contiguous": lambda t: t.contiguous(**LAST),
    "clone": lambda t: t.clone(**LAST),
    "torch.clone": lambda t: torch.clone(t, **LAST),
    "to": lambda t: t.to(**LAST),
    "to another dtype": lambda t: t.to(torch.float32, **LAST).to(D, **LAST),
    "double": lambda t: t.float().double(**LAST),
    "zeros_like": lambda t: torch.zeros_like(t, **LAST) + t,
    "full_like": lambda t: torch.full_like(t, 2.0, **LAST).mul_(0.5).mul_(t),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", REORDERINGS)
def test_orders_asked_for(name, fast):
    torch.manual_seed(1)
    net = Reorders(REORDERINGS[name]).double()
    plain = Reorders(lambda t: t.contiguous(**LAST)).double()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(3, 2, 4, 5, 6, dtype=D)
    if "dtype" in name or name == "double":
        x = x.float().double()
    params = {n: p.detach() for n, p in net.named_parameters()}
    rtol = 1e-5 if "dtype" in name or name == "double" else 1e-8

    def rows(model, x):
        return grad(lambda p: functional_call(model, p, (x,)).sin().sum())(params)

    with vmap_safe(net, fast=fast):
        actual = vmap(net)(x), vmap(lambda x: rows(net, x))(x)
    parts = [(plain(one), rows(plain, one)) for one in x]
    expected = torch.stack([y for y, _ in parts]), {
        n: torch.stack([row[n] for _, row in parts]) for n in params
    }
    assert_same(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("call", [per_sample_grads])
def test_group_norm_of_a_part_of_the_channels(call):
    """Batches of one: torch.split gives what vmap takes for contiguous."""
    torch.manual_seed(1)
    net = Reorders(lambda t: t.contiguous(memory_format=torch.channels_last)).double()
    x = torch.randn(3, 4, 5, 6, dtype=D)
    actual = call(net, lambda y: y.square().sum(), x)
    for i in range(len(x)):
        loss = net(x[i : i + 1]).square().sum()
        found = torch.autograd.grad(loss, list(net.parameters()))
        for row, expected in zip(actual.values(), found):
            assert_same(row[i], expected)


# -- Autocast --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["eval", "no_running_stats", "group_norm", "sync"])
@pytest.mark.parametrize("name", NORMS)
def test_autocast(name, mode, dtype):
    """With autocast inside the vmap and around it, gradients are near the float32 ones
    and have their dtypes. Outputs have the dtypes of plain autograd."""
    layer, shape, _, _ = made(name, torch.float32)
    if mode == "group_norm" and name == "batch norm, none":
        pytest.skip("(N, C) has one value for each group")
    torch.manual_seed(4)
    features = shape[-1] if len(shape) < 4 else shape[1]
    first = nn.Linear(5, features)
    if len(shape) == 4:
        first = nn.Conv2d(5, features, 1)
    net = nn.Sequential(first, layer, nn.Tanh())
    size = (4, 5, 3, 3) if len(shape) == 4 else (*shape[:-1], 5)
    x = torch.randn(3, *size)
    params = {n: p.detach() + 0.1 for n, p in net.named_parameters()}
    outputs = []

    def loss(p, x):
        y = functional_call(net, p, (x,))
        outputs.append(y.dtype)
        return y.float().sin().sum()

    def inside(p, x):
        with torch.autocast("cpu", dtype):
            return loss(p, x)

    rows = vmap(grad(loss), (None, 0))
    with vmap_safe(net, mode=mode, num_groups=1):
        expected = rows(params, x)
        outputs.clear()
        with torch.autocast("cpu", dtype):
            around = rows(params, x)
        within = vmap(grad(inside), (None, 0))(params, x)
        with torch.autocast("cpu", dtype):
            net(x[0])
            plain = net(x[0]).dtype
    assert set(outputs) == {plain} == {dtype}
    scale = max(row.abs().max() for row in expected.values())
    for n, row in expected.items():
        for found in (around, within):
            assert found[n].dtype == row.dtype
            assert (found[n] - row).abs().max() < 0.08 * scale, n


@pytest.mark.parametrize("mode", ["eval", "no_running_stats", "group_norm", "sync"])
def test_a_float32_layer_in_a_bfloat16_network(mode):
    """Without autocast. torch's own batch norm in eval mode raises in vmap(grad)."""
    torch.manual_seed(4)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)
    net, x = nn.Sequential(*layers), torch.randn(4, 2, 2, 6, 6)
    net(x[0])

    def rows(net, x):
        def loss(p, x):
            return functional_call(net, p, (x,)).float().square().sum()

        with vmap_safe(net, mode=mode, num_groups=2):
            return vmap(grad(loss), (None, 0))(dict(net.named_parameters()), x)

    expected = rows(net, x)
    net.bfloat16()[1].float()
    found = rows(net, x.bfloat16())
    scale = max(row.abs().max() for row in expected.values())
    for name, parameter in net.named_parameters():
        assert found[name].dtype == parameter.dtype
        assert (found[name] - expected[name]).abs().max() < 0.08 * scale, name


# -- Levels ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("fast", [True, False])
def test_a_vmap_that_batches_nothing(fast):
    """In a call inside two vmaps, the inner or the outer one batches no argument."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Flatten(2), nn.LayerNorm(4)),
        nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True),
    ).double()
    params = {n: p.detach() for n, p in net.named_parameters()}
    x = torch.randn(3, 1, 2, 2, 2, dtype=D)

    def row(x):
        f = grad(lambda p: functional_call(net, p, (x,)).square().sum())
        return torch.cat([g.flatten() for g in f(params).values()])

    def pairs(mapped):
        inner = lambda x: mapped(lambda y: row(x) @ row(y))  # noqa: E731
        return lambda xs: mapped(lambda x: inner(x)(xs))(xs)

    def loop(f):
        return lambda xs: torch.stack([f(x) for x in xs])

    net(x[0])
    net.eval()
    expected = pairs(loop)(x)
    with vmap_safe(net, fast=fast):
        assert_same(pairs(vmap)(x), expected)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1)])
def test_one_value_in_a_group_raises_as_torch_does(shape, fast):
    """The result would be the bias alone."""
    norm = nn.GroupNorm(4, 4)
    with vmap_safe(norm, fast=fast):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(torch.randn(shape))
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            vmap(norm)(torch.randn(3, *shape))
