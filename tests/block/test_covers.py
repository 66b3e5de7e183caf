"""covers: whether an open block makes a module safe, and how a copy is covered."""

import copy
import pickle

import pytest
import torch
from blocks import MODES, block
from plain import switched
from threads import in_a_thread
from torch import nn
from torch.func import functional_call, grad, vmap

from vmapsafe import VmapSafeTypeError, VmapSafeValueError, covers, vmap_safe

pytestmark = pytest.mark.filterwarnings("ignore::vmapsafe.NeverUpdatedWarning")


def net():
    """In float64, with a batch norm that has seen one batch."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    model(torch.randn(8, 3).double())
    return model


@pytest.mark.parametrize("mode", MODES)
def test_while_the_block_is_open(mode):
    model = net()
    assert not covers(model) and not covers(model[1])
    with block(model, mode):
        assert covers(model) and covers(model[1])
    assert not covers(model) and not covers(model[1])
    with pytest.raises(KeyError), block(model, mode):
        raise KeyError
    assert not covers(model)


def test_in_the_threads_of_the_block():
    model = net()
    with vmap_safe(model):
        assert not in_a_thread(lambda: covers(model))
        assert not in_a_thread(lambda: covers(model[1]))
    assert in_a_thread(vmap_safe(model)(lambda: covers(model)))


def test_what_the_block_was_not_given():
    model, other = net(), net()
    with vmap_safe(model):
        for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            assert not covers(copied(model)) and not covers(copied(model)[1])
        assert not covers(copy.copy(model[1]))
        assert not covers(other)
        assert not covers(nn.Sequential(model, other))
        model[1] = nn.BatchNorm1d(4)
        assert not covers(model)
    model.add_module("3", nn.BatchNorm1d(4))
    with vmap_safe(model[1]):
        assert covers(model[1]) and not covers(model)
        with vmap_safe(model[3]):
            assert covers(model)


def test_a_container_is_covered_if_its_layers_are():
    """The container itself need not be part of the model, as a wrapper is not."""
    model = net()
    with vmap_safe(model):
        assert covers(nn.Sequential(model, nn.Softmax(1)))
        assert covers(nn.ModuleList([model[1]]))
        assert covers(nn.DataParallel(model))
        assert covers(torch.compile(model))


def test_a_module_without_layers():
    """It is covered if it belongs to a model of a block."""
    model, plain = net(), nn.Sequential(nn.Linear(3, 3))
    assert not covers(plain)
    with vmap_safe(model, plain):
        assert covers(model[0]) and covers(plain) and covers(torch.compile(plain))
        assert not covers(nn.Linear(3, 3))


class Owned(nn.Module):
    """A hand-made layer with running statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm3d(3),
        nn.SyncBatchNorm(3),
        nn.BatchNorm1d(3, affine=False, track_running_stats=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
        Owned(),
        torch.jit.script(nn.BatchNorm1d(3)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_kinds_of_layers(layer):
    model = nn.Sequential(layer)
    assert not covers(model)
    with vmap_safe(model):
        assert covers(model) and covers(layer)
        model.add_module("new", copy.deepcopy(layer))
        assert not covers(model)
    assert not covers(layer)


def test_of_some_modes():
    """A layer counts by what it computes."""
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    )
    frozen = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.ReLU())
    for mode in MODES:
        with block(model, mode), block(frozen, mode):
            found = [m for m in MODES if covers(model[0], m)]
            assert found == [mode]
            found = [m for m in MODES if covers(model[1], m)]
            assert found == ["no_running_stats" if mode == "eval" else mode]
            assert covers(model, *MODES)
            assert covers(frozen, "eval") and not covers(frozen, *MODES[1:])
    with vmap_safe(model, mode="sync"), vmap_safe(model[0], mode="group_norm"):
        assert covers(model[0], "group_norm") and not covers(model[0], "sync")
        assert covers(model, "group_norm", "sync") and not covers(model, "group_norm")


class Asks(torch.autograd.Function):
    """Asks in backward, as engines that run forwards there would."""

    found: list[bool]

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Asks.found.append(covers(ctx.layer))
        return g, None


def test_in_backward():
    """Backward of a graph that was made before the block runs outside it."""
    model, x = net(), torch.randn(4, 3).double().requires_grad_()
    Asks.found = []
    before = Asks.apply(x, model[1]).sum()
    with vmap_safe(model):
        before.backward()
        Asks.apply(x, model[1]).sum().backward()
    assert Asks.found == [False, True]


def test_in_a_decorated_function():
    @vmap_safe
    def ask(model):
        return covers(model)

    @vmap_safe
    def asking(model):
        yield covers(model)
        yield covers(model)

    model = net()
    assert ask(model) and not covers(model)
    for found in asking(model):
        assert found and not covers(model)


def test_what_is_covered_works():
    """A library that refuses batch norm unless it is covered gets a loop's rows."""

    def gradients(model, x):
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
        assert all(covers(m, "eval", "group_norm") for m in norms)
        params = dict(model.named_parameters())

        def loss(params, x):
            return functional_call(model, params, (x[None],)).square().sum()

        return vmap(grad(loss), (None, 0))(params, x)["0.weight"]

    model, x = net(), torch.randn(5, 3).double()
    with pytest.raises(AssertionError):
        gradients(model, x)
    with vmap_safe(model):
        found = gradients(model, x)
    plain = switched(model, "eval")
    loop = [
        torch.autograd.grad(plain(one[None]).square().sum(), plain[0].weight)[0]
        for one in x
    ]
    torch.testing.assert_close(found, torch.stack(loop))


def test_bad_arguments():
    with pytest.raises(VmapSafeTypeError, match="covers.*got an int, not an nn.Module"):
        covers(3)
    with pytest.raises(VmapSafeValueError, match="covers.*unknown mode 'train'"):
        covers(net(), "train")


def test_while_compiling():
    """It is never answered wrongly: the graph breaks, or an error says so."""
    model = net()

    def asking(x):
        return x * (2 if covers(model) else 3)

    one = torch.ones(())
    compiled = torch.compile(asking, backend="eager")
    with vmap_safe(model):
        assert compiled(one) == 2
    assert compiled(one) == 3
    torch._dynamo.reset()
    whole = torch.compile(asking, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        whole(one)


# -- Copies ----------------------------------------------------------------------------


def expected_of(model, x, mode):
    """vmap(model) by a loop over the copy that is switched by hand."""
    plain = switched(model, mode)
    return torch.stack([plain(one) for one in x])


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_block_for_the_copy(mode):
    """With a block of its own a copy does what the mode says, and nothing warns."""
    model, x = net(), torch.randn(5, 6, 3).double()
    with block(model, mode):
        twin = copy.deepcopy(model)
        twin[0].weight.data.mul_(2)
        with block(twin, mode):
            assert covers(twin) and covers(model)
            out = vmap(twin)(x)
        assert not covers(twin) and covers(model)
    torch.testing.assert_close(out, expected_of(twin, x, mode))
    assert twin[1].training and twin[1].num_batches_tracked == 1


class Safe(nn.Module):
    """The recipe of the README: the forward opens a block, in copies too."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, *args):
        with vmap_safe(self.model, **self.options):
            return self.model(*args)


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("within", [False, True], ids=["outside", "inside a block"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_forward_that_opens_the_block(copied, within, mode):
    """Copies that a library makes are covered, and derivatives pass through."""
    x = torch.randn(5, 6, 3).double()
    safe = Safe(net(), mode=mode, num_groups=2)
    with block(safe if within else net(), mode):
        twin = copied(safe)
        twin.model[0].weight.data.mul_(2)
        out = vmap(twin)(x)

        def loss(params, x):
            return functional_call(twin, params, (x,)).square().sum()

        params = dict(twin.named_parameters())
        rows = vmap(grad(loss), (None, 0))(params, x)["model.0.weight"]
    torch.testing.assert_close(out, expected_of(twin.model, x, mode))
    plain = switched(twin.model, mode)
    loop = [
        torch.autograd.grad(plain(one).square().sum(), plain[0].weight)[0] for one in x
    ]
    torch.testing.assert_close(rows, torch.stack(loop))
    assert twin.model[1].training and twin.model[1].num_batches_tracked == 1


def test_a_forward_that_opens_the_block_in_sync():
    """The slices are one batch, also where the block is opened inside the vmap."""
    x, safe = torch.randn(5, 6, 3).double(), Safe(net(), mode="sync")
    twin, plain = copy.deepcopy(safe), copy.deepcopy(safe.model)
    expected = plain(x.flatten(0, 1)).view(5, 6, 4)
    torch.testing.assert_close(vmap(twin)(x), expected)
