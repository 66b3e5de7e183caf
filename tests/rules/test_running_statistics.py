"""Running statistics for each task, by stacked buffers in "no_running_stats".

The slow form is a Python loop over the tasks, each with a copy of the model of its own,
in plain training mode.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from state import assert_same_state, everything
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from vmapsafe import VmapSafeValueError, per_sample_grads, vmap_safe
from vmapsafe.testing import assert_same

TASKS = 3


def block(model):
    return vmap_safe(model, mode="no_running_stats", update_running_stats=True)


def stacked(model, *sizes):
    """Buffers of the model for each task, (*sizes, ...), all of them different."""
    sizes = sizes or (TASKS,)
    found = {}
    for name, buffer in model.named_buffers():
        found[name] = buffer.expand(*sizes, *buffer.shape).clone()
        places = torch.arange(math.prod(sizes)).view(*sizes, *[1] * buffer.dim())
        found[name] += places
    return found


def trained(model, buffers, index):
    """A copy of the model that has the buffers of one task."""
    model = copy.deepcopy(model)
    own = {name: buffer[index] for name, buffer in buffers.items()}
    model.load_state_dict(own, strict=False)
    return model


def joined(models):
    """Their buffers, stacked."""
    columns = zip(*[model.buffers() for model in models])
    names = [name for name, _ in models[0].named_buffers()]
    return {name: torch.stack(column) for name, column in zip(names, columns)}


class Net(nn.Module):
    """Layers of several kinds, one used twice, one frozen, one without statistics."""

    def __init__(self, momentum):
        super().__init__()
        self.first, self.mix = nn.Linear(3, 4), nn.Linear(4, 4)
        self.twice = nn.BatchNorm1d(4, momentum=momentum)
        self.rest = nn.Sequential(
            nn.BatchNorm1d(4, affine=False, track_running_stats=False),
            nn.BatchNorm1d(4).eval(),
            nn.Tanh(),
            nn.SyncBatchNorm(4, momentum=momentum),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        x = torch.tanh(self.twice(self.first(x)))
        return self.rest(self.twice(self.mix(x)))


def net(momentum=0.1):
    return Net(momentum).double()


def call(model):
    return lambda params, buffers, x: functional_call(model, (params, buffers), (x,))


LAYERS = [
    (nn.BatchNorm1d, (6, 4)),
    (nn.BatchNorm1d, (2, 4, 3)),
    (nn.BatchNorm2d, (2, 4, 3, 2)),
    (nn.BatchNorm2d, (1, 4, 3, 1)),
    (nn.BatchNorm3d, (2, 4, 2, 2, 2)),
    (nn.SyncBatchNorm, (2, 4, 3, 2)),
    (nn.InstanceNorm1d, (2, 4, 3)),
    (nn.InstanceNorm2d, (2, 4, 3, 2)),
    (nn.InstanceNorm3d, (2, 4, 2, 2, 2)),
]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer, shape", LAYERS)
def test_layers(layer, shape, momentum, affine):
    """Each task steps its own statistics, call after call; the model keeps its own."""
    model = layer(4, momentum=momentum, affine=affine, track_running_stats=True)
    if layer is nn.SyncBatchNorm:
        model = layer(4, momentum=momentum, affine=affine)
    model.double()
    buffers, before = stacked(model), everything(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]
    for _ in range(2):
        x = 3 + 2 * torch.randn(TASKS, *shape).double()
        with block(model):
            out = vmap(call(model), (None, 0, 0))({}, buffers, x)
        assert_same(out, torch.stack([m(one) for m, one in zip(copies, x)]))
        assert_same(buffers, joined(copies))
    assert_same_state(model, before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_networks(momentum):
    model, x = net(momentum), torch.randn(TASKS, 5, 3).double()
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]
    with block(model):
        out = vmap(call(model), (None, 0, 0))({}, buffers, x)
    assert_same(out, torch.stack([m(one) for m, one in zip(copies, x)]))
    assert_same(buffers, joined(copies))


def test_other_dimensions_and_chunks():
    """Stacked buffers may lie anywhere in memory; chunks are views of them."""
    model, x = nn.BatchNorm1d(4).double(), torch.randn(TASKS, 5, 4).double()
    for size in (None, 2):
        for made in (torch.clone, torch.Tensor.contiguous):
            buffers = stacked(model)
            copies = [trained(model, buffers, i) for i in range(TASKS)]
            dims = {name: b.dim() - 1 for name, b in buffers.items()}
            given = {name: made(b.movedim(0, -1)) for name, b in buffers.items()}
            with block(model):
                vmap(call(model), (None, dims, 0), chunk_size=size)({}, given, x)
            for plain, one in zip(copies, x):
                plain(one)
            found = {name: b.movedim(-1, 0) for name, b in given.items()}
            assert_same(found, joined(copies))


def test_nested_levels():
    """Buffers for each pair of seed and task, at either order of the levels."""
    model, x = net(), torch.randn(2, TASKS, 5, 3).double()
    for first, inputs in ((0, x), (1, x.transpose(0, 1))):
        buffers = stacked(model, 2, TASKS)
        copies = [trained(model, buffers, (i, j)) for i in (0, 1) for j in range(TASKS)]
        inner = vmap(call(model), (None, 0, 0))
        given = {name: b.transpose(0, first) for name, b in buffers.items()}
        with block(model):
            out = vmap(inner, (None, 0, 0))({}, given, inputs)
        expected = torch.stack([m(one) for m, one in zip(copies, x.flatten(0, 1))])
        assert_same(out.transpose(0, first).flatten(0, 1), expected)
        flat = {name: b.flatten(0, 1) for name, b in buffers.items()}
        assert_same(flat, joined(copies))


def test_data_that_tasks_share():
    """Also at one of two levels: tasks with their own data, seeds with the same."""
    model, x = nn.BatchNorm1d(3).double(), torch.randn(TASKS, 5, 3).double()
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]
    with block(model):
        vmap(call(model), (None, 0, None))({}, buffers, x[0])
    for plain in copies:
        plain(x[0])
    assert_same(buffers, joined(copies))
    buffers = stacked(model, 2, TASKS)
    copies = [trained(model, buffers, (i, j)) for i in (0, 1) for j in range(TASKS)]
    with block(model):
        inner = vmap(call(model), (None, 0, 0))
        vmap(inner, (None, 0, None))({}, buffers, x)
    for i, plain in enumerate(copies):
        plain(x[i % TASKS])
    assert_same({n: b.flatten(0, 1) for n, b in buffers.items()}, joined(copies))


def adapted(model, params, buffers, x, steps=2):
    """The loss after steps of gradient descent, by torch.func."""

    def loss(params):
        return functional_call(model, (params, buffers), (x,)).sin().square().mean()

    for _ in range(steps):
        found = grad(loss)(params)
        params = {name: p - 0.1 * found[name] for name, p in params.items()}
    return loss(params)


def adapted_by_autograd(model, x, steps=2):
    """The same, and its gradient by the first parameters, of one plain copy."""
    first = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    params = first

    def loss(params):
        return functional_call(model, params, (x,)).sin().square().mean()

    for _ in range(steps):
        wanted = [p for p in params.values()]
        found = torch.autograd.grad(loss(params), wanted, create_graph=True)
        params = {n: p - 0.1 * g for (n, p), g in zip(params.items(), found)}
    end = loss(params)
    return end.detach(), torch.autograd.grad(end, list(first.values()))


def test_steps_of_adaptation_inside():
    """MAML: each forward of each task steps its statistics once, under both grads."""
    model, x = net(), torch.randn(TASKS, 6, 3).double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]

    def meta(params):
        losses = vmap(lambda b, x: adapted(model, params, b, x))(buffers, x)
        return losses.sum(), losses

    with block(model):
        found, losses = grad(meta, has_aux=True)(params)
    slow = [adapted_by_autograd(m, one) for m, one in zip(copies, x)]
    assert_same(losses, torch.stack([end for end, _ in slow]), atol=1e-9)
    total = [sum(gs) for gs in zip(*[gs for _, gs in slow])]
    assert_same(list(found.values()), total, atol=1e-8, rtol=1e-7)
    assert_same(buffers, joined(copies))
    assert copies[0].twice.num_batches_tracked == 6  # of three forwards


def mean_of_tasks(model, buffers, x):
    """A function of the parameters."""

    def of_task(params, buffers, x):
        return call(model)(params, buffers, x).sin().square().mean()

    return lambda params: vmap(of_task, (None, 0, 0))(params, buffers, x).mean()


OUTSIDE = {
    "grad": lambda f, p: grad(f)(p),
    "jacrev": lambda f, p: jacrev(f)(p),
    "jvp": lambda f, p: jvp(f, (p,), (p,)),
    "hessian": lambda f, p: hessian(lambda b: f({**p, "first.bias": b}))(
        p["first.bias"]
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_one_step_under_every_transform(name):
    model, x = net(momentum=None), torch.randn(TASKS, 6, 3).double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]
    with block(model):
        OUTSIDE[name](mean_of_tasks(model, buffers, x), params)
    for plain, one in zip(copies, x):
        plain(one)
    assert_same(buffers, joined(copies))


def test_gradients_inside():
    """vmap(grad): the gradient of each task, and one step."""
    model, x = net(), torch.randn(TASKS, 6, 3).double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]

    def loss(params, buffers, x):
        return call(model)(params, buffers, x).sin().sum()

    with block(model):
        found = vmap(grad(loss), (None, 0, 0))(params, buffers, x)
    slow = []
    for plain, one in zip(copies, x):
        slow.append(torch.autograd.grad(plain(one).sin().sum(), plain.parameters()))
    assert_same(list(found.values()), [torch.stack(column) for column in zip(*slow)])
    assert_same(buffers, joined(copies))


def test_plain_backward():
    model, x = net(), torch.randn(TASKS, 6, 3).double()
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]
    with block(model):
        params = dict(model.named_parameters())
        mean_of_tasks(model, buffers, x)(params).backward()
    for m, one in zip(copies, x):
        (m(one).sin().square().mean() / TASKS).backward()
    total = [sum(ps) for ps in zip(*[[p.grad for p in m.parameters()] for m in copies])]
    assert_same([p.grad for p in model.parameters()], total)
    assert_same(buffers, joined(copies))


def test_without_vmap():
    """A call is a plain training step, of the model or of the buffers handed in."""
    model, x = net(), torch.randn(2, 6, 3).double()
    plain, given = copy.deepcopy(model), dict(stacked(model, 1))
    given = {name: b[0] for name, b in given.items()}
    with block(model):
        assert_same(model(x[0]), plain(x[0]))
        assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
        plain.load_state_dict(given, strict=False)
        assert_same(functional_call(model, given, (x[1],)), plain(x[1]))
    assert_same(given, dict(plain.named_buffers()))


def test_update_bn():
    """torch.optim.swa_utils computes the statistics of the model in a block too."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    data = torch.randn(4, 6, 3).double()
    plain = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(data, plain)
    with block(model):
        torch.optim.swa_utils.update_bn(data, model)
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


class ByHand(nn.Module):
    """A layer that is not torch's own, with running statistics."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        given = self.running_mean, self.running_var, None, None, self.training, 0.2
        return self.function(x, *given)


@pytest.mark.parametrize("mode", ["no_running_stats", "sync"])
@pytest.mark.parametrize("function", [F.batch_norm, F.instance_norm])
def test_a_layer_made_by_hand(function, mode):
    model, x = ByHand(function).double(), torch.randn(TASKS, 2, 4, 5).double()
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]
    with vmap_safe(model, mode=mode, update_running_stats=True):
        vmap(call(model), (None, 0, 0))({}, buffers, x)
        model(x[0])
    for plain, one in zip(copies, x):
        plain(one)
    assert_same(buffers, joined(copies))
    plain = ByHand(function).double()
    plain(x[0])
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("where", ["around", "inside"])
def test_compiled(where):
    model, x = net(), torch.randn(TASKS, 6, 3).double()
    expected, buffers = stacked(model), stacked(model)

    def around(buffers, x):
        return vmap(call(model), (None, 0, 0))({}, buffers, x)

    def inside(buffers, x):
        with block(model):
            return around(buffers, x)

    torch._dynamo.reset()
    compiled = torch.compile(
        around if where == "around" else inside, fullgraph=True, backend="eager"
    )
    for _ in range(2):
        with block(model):
            slow = around(expected, x)
            if where == "around":
                found = compiled(buffers, x)
        if where == "inside":
            found = compiled(buffers, x)
        assert_same(found, slow)
        assert_same(buffers, expected)


class OwnForward(nn.BatchNorm1d):
    """A layer that passes its buffers only where torch should read or write them."""

    def forward(self, x):
        writes = self.training and self.track_running_stats
        if writes:
            self.num_batches_tracked.add_(1)
        given = self.running_mean, self.running_var
        given = given if writes or not self.training else (None, None)
        rest = self.weight, self.bias, self.training, self.momentum, self.eps
        return F.batch_norm(x, *given, *rest)


def tied():
    one, other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    other.weight, other.bias = one.weight, one.bias
    return one, other


ALIKE = {
    "without weights": lambda: [nn.BatchNorm1d(4, affine=False) for _ in range(2)],
    "tied weights": tied,
    "forwards of their own": lambda: [OwnForward(4) for _ in range(2)],
}


@pytest.mark.parametrize("layers", ALIKE.values(), ids=ALIKE)
def test_layers_alike_where_the_block_is_compiled(layers):
    """torch.compile does not see which layer calls, and weights do not tell either."""
    one, other = layers()
    model = nn.Sequential(one, nn.Tanh(), other).double()
    x = 3 + 2 * torch.randn(TASKS, 6, 4).double()
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]

    @torch.compile(fullgraph=True, backend="eager")
    def step(buffers, x):
        with block(model):
            return vmap(call(model), (None, 0, 0))({}, buffers, x)

    torch._dynamo.reset()
    found = step(buffers, x)
    assert_same(found, torch.stack([m(one) for m, one in zip(copies, x)]))
    assert_same(buffers, joined(copies))


def test_a_layer_that_a_compiled_block_cannot_know():
    model = nn.Sequential(OwnForward(4, affine=False))
    before, x = everything(model), torch.randn(6, 4)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        with block(model):
            return model(x)

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        step(x)
    assert "'0' (OwnForward) has a forward of its own and no weight" in str(
        caught.value
    )
    assert_same_state(model, before)


class OwnMomentum(nn.BatchNorm1d):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        given = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *given, self.training, 0.5, self.eps)


def test_a_momentum_of_its_own():
    model, x = OwnMomentum(4).double(), torch.randn(TASKS, 6, 4).double()
    buffers = stacked(model)
    copies = [trained(model, buffers, i) for i in range(TASKS)]
    with block(model):
        vmap(call(model), (None, 0, 0))({}, buffers, x)
    for plain, one in zip(copies, x):
        plain(one)
    assert_same(buffers, joined(copies))


# -- What is refused -------------------------------------------------------------------


def test_tasks_that_share_statistics():
    """An error, before anything is written."""
    model, x = nn.BatchNorm1d(3).double(), torch.randn(2, TASKS, 5, 3).double()
    before, buffers = everything(model), stacked(model)
    kept = copy.deepcopy(buffers)
    without_count = {n: b for n, b in buffers.items() if n != "num_batches_tracked"}
    one = call(model)
    calls = [
        lambda: vmap(model)(x[0]),
        lambda: vmap(grad(lambda x: model(x).sum()))(x[0]),
        lambda: vmap(one, (None, None, 0))(
            {}, {n: b[0] for n, b in buffers.items()}, x[0]
        ),
        lambda: vmap(one, (None, 0, 0))({}, without_count, x[0]),
        lambda: vmap(vmap(one, (None, 0, 0)), (None, None, 0))({}, buffers, x),
        lambda: vmap(vmap(one, (None, None, 0)), (None, 0, 0))(
            {}, buffers, x.transpose(0, 1)
        ),
    ]
    for wrong in calls:
        with block(model):
            with pytest.raises(VmapSafeValueError) as caught:
                wrong()
        assert "slices that are not merged share its buffers" in str(caught.value)
        assert "stacked buffers to functional_call" in str(caught.value)
        assert_same_state(model, before)
        assert_same(buffers, kept)


@pytest.mark.parametrize("mode", ["no_running_stats", "sync"])
def test_buffers_that_are_one_in_memory(mode):
    model, x = nn.BatchNorm1d(3).double(), torch.randn(TASKS, 5, 3).double()
    buffers = {n: b.expand(TASKS, *b.shape) for n, b in model.named_buffers()}
    before = everything(model)
    with vmap_safe(model, mode=mode, update_running_stats=True):
        with pytest.raises(VmapSafeValueError, match=r"are one in memory.*clone\(\)"):
            vmap(call(model), (None, 0, 0))({}, buffers, x)
    assert_same_state(model, before)


def test_options():
    model, x, y = net(), torch.randn(4, 3).double(), torch.zeros(4, 2).double()
    options = {"mode": "no_running_stats", "update_running_stats": True}
    for keep in (True, False):
        with pytest.raises(VmapSafeValueError, match="each slice would need running"):
            per_sample_grads(model, F.mse_loss, x, y, keep_batch_dim=keep, **options)
    for mode in ("eval", "group_norm"):
        with pytest.raises(VmapSafeValueError, match=f'"{mode}" has no statistics to'):
            vmap_safe(model, mode=mode, update_running_stats=True)
    with pytest.raises(VmapSafeValueError, match='sync_levels has a meaning in "sync"'):
        vmap_safe(model, mode="no_running_stats", sync_levels=1)
