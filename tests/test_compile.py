"""torch.compile(fullgraph=True), around the block and inside it."""

import pytest
import torch
from plain import assert_same_state, everything
from torch import nn
from torch.func import functional_call, grad, vmap

from vmapsafe import batched, per_sample_grads, vmap_safe

MODES = ["eval", "no_running_stats", "group_norm"]

# torch's own, at its first use
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_cache():
    torch._dynamo.reset()


@pytest.fixture
def net():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)
    )
    net(torch.randn(6, 2, 5, 5))
    return net


X = torch.randn(3, 2, 2, 5, 5)


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def rows(net, params, x):
    def loss(params, x):
        return functional_call(net, params, (x,)).square().sum()

    return vmap(grad(loss), (None, 0))(params, x)


def block(net, mode):
    return vmap_safe(net, mode=mode, num_groups=2)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_call_inside_a_block(net, mode):
    """The same rows, without a graph break; after the block, none of its meaning."""
    params = {k: p.detach() for k, p in net.named_parameters()}
    function = compiled(lambda params, x: rows(net, params, x))
    forward = compiled(net)
    net.eval()
    outside = net(X[0])
    torch.testing.assert_close(forward(X[0]), outside)
    net.train()
    before = everything(net)
    with block(net, mode):
        expected = rows(net, params, X)
        torch.testing.assert_close(function(params, X), expected)
        torch.testing.assert_close(forward(X[0]), net(X[0]))
    assert_same_state(net, before)
    net.eval()
    torch.testing.assert_close(forward(X[0]), outside)


@pytest.mark.parametrize("mode", MODES)
def test_block_inside_a_compiled_function(net, mode):
    """The same rows, without a graph break; the model as it was."""
    params = {k: p.detach() for k, p in net.named_parameters()}

    def function(params, x):
        with block(net, mode):
            return rows(net, params, x)

    before = everything(net)
    out = compiled(function)(params, X)
    assert_same_state(net, before)
    torch.testing.assert_close(out, function(params, X))


def test_one_function_compiled_for_each_mode(net):
    """What was compiled in one block is not used in a block of another mode."""
    function = compiled(lambda x: vmap(lambda y: net(y))(x))
    for mode in [*MODES, *MODES]:
        with block(net, mode):
            torch.testing.assert_close(function(X), vmap(net)(X))


def test_other_num_groups(net):
    """Nor in a block with other options."""
    function = compiled(lambda x: net(x))
    for num_groups in (1, 2):
        with vmap_safe(net, mode="group_norm", num_groups=num_groups):
            torch.testing.assert_close(function(X[0]), net(X[0]))


def test_decorators_inside_a_compiled_function(net):
    """batched and a decorated function can be traced."""

    @vmap_safe(mode="eval")
    def step(model, x):
        return batched(model)(x)

    out = compiled(step)(net, X[0])
    torch.testing.assert_close(out, step(net, X[0]))


def test_hand_made_buffers_while_compiling():
    """Writes to buffers are left out of the graph."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.calls.add_(1)
            self.mean = self.mean + 1
            return x * 2

    model = Counts()
    before = everything(model)
    with vmap_safe(model):
        out = compiled(lambda x: vmap(lambda y: model(y))(x))(torch.ones(2, 3))
    assert_same_state(model, before)
    torch.testing.assert_close(out, torch.full((2, 3), 2.0))


def test_per_sample_grads_compiled(net):
    """The helper can be compiled whole."""

    def loss(output, target):
        return (output - target).square().sum()

    y = torch.randn(2, 2)
    function = compiled(lambda x, y: per_sample_grads(net, loss, x, y))
    expected = per_sample_grads(net, loss, X[0], y)
    torch.testing.assert_close(function(X[0], y), expected)


def test_inductor(net):
    """The default backend, once."""
    with block(net, "eval"):
        out = compiled(lambda x: vmap(lambda y: net(y))(x), "inductor")(X)
        torch.testing.assert_close(out, vmap(net)(X))


def test_a_compiled_part_is_compiled_once(net):
    """What runs around a compiled part does not change its graph."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    part = torch.compile(net[1:3], backend=counter, fullgraph=True)
    whole = nn.Sequential(net[0], part, net[3:])
    with block(net, "group_norm"), block(whole, "group_norm"), torch.no_grad():
        expected = net(X[0])
        for _ in range(3):
            torch.testing.assert_close(whole(X[0]), expected)
    assert counter.frame_count == 1
