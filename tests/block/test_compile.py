"""torch.compile(fullgraph=True), around the block and inside it."""

import contextlib
import copy

import pytest
import torch
from blocks import MODES, block
from state import assert_same_state, everything
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)

from vmapsafe import batched, per_sample, per_sample_grads
from vmapsafe import quantities as q
from vmapsafe import vmap_safe


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


@pytest.mark.parametrize("mode", MODES)
def test_compiled_call_inside_a_block(net, mode):
    """The rows are the same, without a graph break; the block's rules end with it."""
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


class ReadsItsFlag(nn.BatchNorm1d):
    def forward(self, x):
        return x + 1 if self.training else 2 * x


def test_a_layer_without_a_rule_reads_the_flag_of_the_block():
    model = nn.Sequential(ReadsItsFlag(2))
    model[0].running_mean.fill_(0.5)
    before = everything(model)
    function = compiled(lambda x: vmap(lambda x: model(x))(x))
    with vmap_safe(model, mode="eval"):
        found = function(torch.ones(3, 2))
    torch.testing.assert_close(found, torch.full((3, 2), 2.0))
    assert_same_state(model, before)
    model.eval()
    with vmap_safe(model, mode="eval"):
        torch.testing.assert_close(function(torch.ones(3, 2)), found)


@pytest.mark.parametrize("mode", MODES)
def test_block_inside_a_compiled_function(net, mode):
    """The rows are the same, without a graph break, and the model is as it was."""
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
    """Nor is it used in a block with other options."""
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


@pytest.mark.parametrize(
    "options",
    [{}, *({"mode": "sync", "rows": r} for r in ("contribution", "jacobian"))],
    ids=str,
)
def test_per_sample_grads_compiled(net, options):
    """The helper can be compiled whole."""

    def loss(output, target):
        return (output - target).square().sum()

    y = torch.randn(2, 2)
    function = compiled(lambda x, y: per_sample_grads(net, loss, x, y, **options))
    expected = per_sample_grads(net, loss, X[0], y, **options)
    torch.testing.assert_close(function(X[0], y), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_inference_mode(net, backend):
    """The same rows, also of a function that was compiled outside."""

    def loss(output, target):
        return (output - target).square().sum()

    y = torch.randn(2, 2)
    expected = per_sample_grads(net, loss, X[0], y)
    function = compiled(lambda x, y: per_sample_grads(net, loss, x, y), backend)
    with torch.inference_mode():
        torch.testing.assert_close(function(X[0], y), expected)
    torch.testing.assert_close(function(X[0], y), expected)
    with torch.inference_mode():
        torch.testing.assert_close(function(X[0], y), expected)


WANTED = {
    "losses": lambda net: q.Losses(),
    "norms": lambda net: q.Norms(),
    "sum": lambda net: q.Sum(),
    "clipped": lambda net: q.ClippedSum(0.1),
    "groups": lambda net: q.ClippedSum({"0.*": 0.1, "*": 0.2}),
    "weighted": lambda net: q.WeightedSum(torch.tensor([0.0, 2.0])),
    "squares": lambda net: q.SumOfSquares(),
    "gram": lambda net: q.Gram(),
    "gram with another": lambda net: q.Gram(other=(X[0], torch.ones(2, 2))),
    "dots": lambda net: q.Dots(dict(net.named_parameters())),
    "sketch": lambda net: q.Sketch(6),
    "kronecker": lambda net: q.Sketch(6, "kronecker"),
}


@pytest.mark.parametrize("name", WANTED)
def test_quantities_compiled(net, name):
    """Each in one graph."""

    def loss(output, target):
        return (output - target).square().sum()

    y, want = torch.randn(2, 2), WANTED[name](net)
    function = compiled(lambda x, y: per_sample(net, loss, x, y, want=want))
    expected = per_sample(net, loss, X[0], y, want=want)
    torch.testing.assert_close(function(X[0], y), expected)


def test_inductor(net):
    """One test with the default backend."""
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


# -- "sync" ----------------------------------------------------------------------------

XX = torch.randn(2, *X.shape)
SYNC = {
    "vmap": (X, lambda f, x: vmap(f)(x)),
    "vmap(vmap)": (XX, lambda f, x: vmap(vmap(f))(x)),
    "vmap(grad)": (X, lambda f, x: vmap(grad(lambda x: f(x).square().sum()))(x)),
    "grad(vmap)": (X, lambda f, x: grad(lambda x: vmap(f)(x).sin().sum())(x)),
    "grad(vmap(grad))": (
        X,
        lambda f, x: grad(
            lambda x: vmap(grad(lambda x: f(x).sin().sum()))(x).square().sum()
        )(x),
    ),
    "vmap(jvp)": (X, lambda f, x: vmap(lambda x: jvp(f, (x,), (x,))[1])(x)),
    "jacrev(vmap)": (X, lambda f, x: jacrev(vmap(f))(x)),
    "no vmap": (X[0], lambda f, x: f(x)),
}
UPDATE = {"update_running_stats": True}
WITH_OPTIONS = [
    *((name, {}) for name in SYNC),
    *((name, UPDATE) for name in ("vmap(vmap)", "vmap(grad)", "grad(vmap)")),
    ("vmap(vmap)", {"sync_levels": 1}),
]


@pytest.mark.parametrize("name, options", WITH_OPTIONS, ids=str)
def test_sync(net, name, options):
    """Numbers and running statistics equal those without compiling, call after call."""
    net.double()
    x, transform = SYNC[name][0].double(), SYNC[name][1]
    twin = copy.deepcopy(net)
    function = compiled(lambda x: transform(lambda x: net(x), x))
    for shift in (0, 1):
        with vmap_safe(twin, mode="sync", **options):
            expected = transform(twin, x + shift * x.sin())
        with vmap_safe(net, mode="sync", **options):
            torch.testing.assert_close(function(x + shift * x.sin()), expected)
        for b, e in zip(net.buffers(), twin.buffers()):
            torch.testing.assert_close(b, e)
    moved = net[1].num_batches_tracked != 1
    assert moved == ("update_running_stats" in options)


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.InstanceNorm2d(4, momentum=None, track_running_stats=True),
        nn.BatchNorm2d(4, track_running_stats=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["around", "inside"])
def test_sync_of_other_layers(net, norm, where):
    """Forward, plain backward and one step of the statistics."""
    net[1] = copy.deepcopy(norm)
    outcomes = []
    for compiles in (False, True):
        model = copy.deepcopy(net)

        def around(x):
            return vmap(lambda x: model(x))(x)

        def inside(x):
            with vmap_safe(model, mode="sync", **UPDATE):
                return around(x)

        function = inside if where == "inside" else around
        function = compiled(function) if compiles else function
        with contextlib.ExitStack() as stack:
            if where == "around":
                stack.enter_context(vmap_safe(model, mode="sync", **UPDATE))
            out = function(X)
        out.sin().sum().backward()
        grads = [p.grad for p in model.parameters()]
        outcomes.append((out.detach(), grads, list(model.buffers())))
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("bare", [False, True])
def test_sync_keeps_members_apart(net, bare):
    """An ensemble by stack_module_state, its buffers updated member by member; a layer
    that has nothing of its own belongs to a member all the same."""
    if bare:
        net[1] = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    members = [copy.deepcopy(net) for _ in range(2)]
    members[1][0].weight.data += 1
    params, buffers = stack_module_state(members)
    kept = copy.deepcopy(buffers)

    def call(params, buffers, x):
        return vmap(lambda x: functional_call(net, (params, buffers), (x,)))(x)

    def ensemble(params, buffers, x):
        return vmap(call, (0, 0, None))(params, buffers, x)

    with vmap_safe(net, mode="sync", update_running_stats=True):
        expected = ensemble(params, kept, X)
        out = compiled(ensemble)(params, buffers, X)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(buffers, kept)


def test_sync_with_other_batch_sizes(net):
    """A graph made for one size is right for another."""
    function = compiled(lambda x: vmap(lambda x: net(x))(x))
    with vmap_safe(net, mode="sync"):
        for x in (X, X[:2], X[:, :1]):
            torch.testing.assert_close(function(x), vmap(net)(x))


def test_sync_on_the_default_backend():
    net, x = nn.BatchNorm1d(3), torch.randn(4, 2, 3)
    function = compiled(lambda x: vmap(lambda x: net(x))(x), "inductor")
    with vmap_safe(net, mode="sync"):
        torch.testing.assert_close(function(x), vmap(net)(x))


def test_one_value_while_compiling():
    """The error is that of the eager call, also after a graph for more slices."""
    net = nn.BatchNorm1d(3)
    function = compiled(lambda x: vmap(grad(lambda x: net(x).sin().sum()))(x))
    with vmap_safe(net, mode="sync"):
        for size in (3, 2, 1):
            x = torch.randn(size, 1, 3)
            if size > 1:
                function(x)
            else:
                with pytest.raises(Exception, match="has one value for each channel"):
                    function(x)


REFUSED = [
    (
        lambda net: vmap_safe(net, mode="sync", update_running_stats=True),
        lambda net, x: vmap(net)(x),
        "momentum=None, whose average needs the value of a counter, which "
        "torch.compile cannot trace",
    ),
    (
        lambda net: vmap_safe(net, mode="sync"),
        lambda net, x: vmap(hessian(lambda x: net(x).sum()))(x),
        "a derivative of a derivative inside the vmap",
    ),
]


@pytest.mark.parametrize("make, call, text", REFUSED, ids=["momentum", "hessian"])
def test_what_sync_refuses_while_compiling(net, make, call, text):
    """An error gives the reason, and the model is as it was."""
    net[1].momentum = None
    before = everything(net)
    with make(net):
        with pytest.raises(Exception) as caught:
            compiled(lambda x: call(lambda x: net(x), x))(X[:, :1])
    assert text in str(caught.value).replace("\\", "")
    assert_same_state(net, before)
