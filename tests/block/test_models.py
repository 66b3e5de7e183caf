"""The model comes back as it was, however the block is left."""

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch
from blocks import EACH_ALONE
from hypothesis import given, settings
from hypothesis import strategies as st
from state import assert_same_state, everything
from threads import in_a_thread
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune, spectral_norm, weight_norm

from vmapsafe import BlockError, per_sample_grads, vmap_safe
from vmapsafe._block import operators, scope


def small():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4)
    )
    model(torch.randn(4, 2, 5, 5))
    return model


X = torch.randn(3, 2, 2, 5, 5)


class Stop(Exception):
    pass


# -- Random module trees × ways to leave × nesting -------------------------------------

LAYERS = st.sampled_from(
    [
        lambda: nn.BatchNorm1d(4),
        lambda: nn.BatchNorm1d(4, affine=False),
        lambda: nn.BatchNorm2d(4, momentum=None),
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        lambda: nn.BatchNorm3d(4, affine=False, track_running_stats=False),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm3d(4, track_running_stats=True),
        lambda: nn.Linear(2, 2),
        lambda: nn.Dropout(),
    ]
)
FINISH = st.sampled_from(["keep", "freeze", "seen", "half switched"])


class Branch(nn.Module):
    def __init__(self, children):
        super().__init__()
        self.branches = nn.ModuleList(children)


@st.composite
def trees(draw):
    """Modules of modules: frozen parts, layers used twice, weights shared."""
    leaves = []

    def leaf():
        if leaves and draw(st.integers(0, 4)) == 0:
            return draw(st.sampled_from(leaves))  # one object, used twice
        layer = draw(LAYERS)()
        finish = draw(FINISH)
        if finish == "freeze":
            layer.eval()
        elif finish == "half switched" and hasattr(layer, "track_running_stats"):
            layer.track_running_stats = not layer.track_running_stats
        elif finish == "seen" and getattr(layer, "running_mean", None) is not None:
            layer.running_mean.add_(1)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(3)
        leaves.append(layer)
        return layer

    def tree(depth):
        if depth == 0 or draw(st.booleans()):
            return leaf()
        branches = [tree(depth - 1) for _ in range(draw(st.integers(1, 3)))]
        branch = Branch(branches)
        branch.training = draw(st.booleans())
        return branch

    root = Branch([tree(2)])
    with_weight = [m for m in leaves if getattr(m, "weight", None) is not None]
    norms = [m for m in with_weight if isinstance(m, nn.modules.batchnorm._NormBase)]
    if len(norms) > 1 and draw(st.booleans()):
        norms[1].weight = norms[0].weight
    root.training = draw(st.booleans())
    return root


def disturb(model, how):
    """What a user may do inside."""
    if how == "train":
        model.train()
    elif how == "eval":
        model.eval()
    elif how == "copy":
        copy.deepcopy(model)


def leave(model, mode, inner, way, disturbance):
    owners = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(vmap_safe(model, mode=mode))
        for other in inner:
            stack.enter_context(vmap_safe(model, mode=other))
        disturb(model, disturbance)
        for module, training in owners.items():  # the last call counts
            module.training = training
        if way == "exception":
            raise Stop
        if way == "interrupt":
            raise KeyboardInterrupt
        if way == "generator close":
            raise GeneratorExit


@settings(max_examples=300, deadline=None)
@given(
    model=trees(),
    mode=st.sampled_from(EACH_ALONE),
    inner=st.lists(st.sampled_from(EACH_ALONE), max_size=3),
    way=st.sampled_from(["return", "exception", "interrupt", "generator close"]),
    disturbance=st.sampled_from([None, "train", "eval", "copy"]),
)
@pytest.mark.filterwarnings("ignore::vmapsafe.NeverUpdatedWarning")
def test_exit_puts_everything_back(model, mode, inner, way, disturbance):
    """Flags, hooks, buffers by value and identity, attributes: all as before."""
    before = everything(model)
    with contextlib.suppress(Stop, KeyboardInterrupt, GeneratorExit):
        leave(model, mode, inner, way, disturbance)
    assert_same_state(model, before)


@settings(max_examples=100, deadline=None)
@given(model=trees(), mode=st.sampled_from(EACH_ALONE), threads=st.integers(2, 4))
@pytest.mark.filterwarnings("ignore::vmapsafe.NeverUpdatedWarning")
def test_threads_with_the_same_options(model, mode, threads):
    """The last of several threads to leave puts the model back, whatever the order."""
    before = everything(model)
    entered, errors = threading.Barrier(threads), []

    def work(i):
        try:
            with vmap_safe(model, mode=mode):
                entered.wait()
                inside = [m.training for m in model.modules()]
                if i == 0:
                    first.extend(inside)
        except BaseException as error:
            errors.append(error)

    first = []
    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert_same_state(model, before)


# -- Inside ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_state_dict_copy_pickle_and_save_inside(mode):
    """Keys and values of state_dict are those outside; copies do not need vmapsafe."""
    model = small()
    outside = copy.deepcopy(model.state_dict())
    with vmap_safe(model, mode=mode):
        inside = model.state_dict()
        vmap(model[:2])(X)
        copied = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
    assert list(inside) == list(outside)
    for state in (inside, copied.state_dict(), pickled.state_dict()):
        for name, value in outside.items():
            assert torch.equal(state[name], value)
    for other in (copied, pickled):
        assert type(other[1]) is nn.BatchNorm2d
        assert other[1].training and other[1].track_running_stats  # the owner's flags
        other[:2](X[0])
        assert other[1].num_batches_tracked == 2


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_a_train_inside_does_not_change_what_layers_compute(mode):
    """The mode is enforced at each call, and frozen layers stay frozen."""
    model = small().train()
    model[3].eval()
    with vmap_safe(model, mode=mode):
        torch.manual_seed(0)
        expected = vmap(model, randomness="same")(X)
        model.train()
        torch.manual_seed(0)
        torch.testing.assert_close(vmap(model, randomness="same")(X), expected)
        model.eval()
        model[2].train()
        torch.manual_seed(0)
        torch.testing.assert_close(vmap(model, randomness="same")(X), expected)
        model.train()
    assert model[1].training and model[3].training  # as their owner last asked


def test_what_the_user_does_inside_survives():
    """An optimizer step, load_state_dict, writes to buffers, flags of other layers."""
    model, other = small(), small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with vmap_safe(model):
        model.load_state_dict(other.state_dict())
        model[2].eval()
        vmap(model)(X).sum().backward()
        optimizer.step()
        model[1].running_mean.add_(1.0)
        model[3].running_mean = model[3].running_mean + 2.0
    assert not model[2].training
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean + 1)
    torch.testing.assert_close(model[3].running_mean, other[3].running_mean + 2)
    assert not torch.equal(model[0].weight, other[0].weight)


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_an_error_in_the_forward(mode):
    """A forward that raises, caught inside the block, leaves it in working order."""

    class Raises(nn.Module):
        def forward(self, x):
            raise Stop

    model = small()
    bad = nn.Sequential(model, Raises())
    before = everything(bad)
    with vmap_safe(bad, mode=mode):
        torch.manual_seed(0)
        expected = vmap(model, randomness="same")(X)
        with pytest.raises(Stop):
            vmap(bad, randomness="same")(X)
        torch.manual_seed(0)
        torch.testing.assert_close(vmap(model, randomness="same")(X), expected)
    assert_same_state(bad, before)


def test_interrupted_forward_puts_assigned_buffers_back():
    """Also after a KeyboardInterrupt in a forward, when torch does not call hooks."""

    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mu", torch.zeros(2))

        def forward(self, x):
            self.mu = self.mu + 1
            raise KeyboardInterrupt

    model = nn.Sequential(Interrupted())
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        with vmap_safe(model):
            model(torch.zeros(2))
    assert_same_state(model, before)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*_norm. is deprecated")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # aten::_weight_norm
@pytest.mark.parametrize(
    "hooked",
    [weight_norm, spectral_norm, lambda x: prune.l1_unstructured(x, "weight", 3)],
    ids=["weight_norm", "spectral_norm", "pruning"],
)
@pytest.mark.parametrize("way", ["vmap(grad)", "inside vmap", "rows", "error"])
def test_weights_computed_before_each_forward(hooked, way):
    """Attributes that hooks write: torch leaves them unusable after a transform."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), hooked(nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    with torch.no_grad():
        net(x)
    weight, before = net[2].weight, everything(net)

    def loss(params, x):
        return functional_call(net, params, (x[None],)).square().sum()

    def inside(params, x):
        with vmap_safe(net):
            return loss(params, x)

    def interrupted(params, x):
        loss(params, x)
        raise Stop

    params = {name: p.detach() for name, p in net.named_parameters()}
    if way == "vmap(grad)":
        with vmap_safe(net):
            vmap(grad(loss), (None, 0))(params, x)
            assert net[2].weight is not weight
    elif way == "inside vmap":
        vmap(grad(inside), (None, 0))(params, x)
    elif way == "rows":
        per_sample_grads(net, lambda out: out.square().sum(), x)
    else:
        with pytest.raises(Stop), vmap_safe(net):
            vmap(grad(interrupted), (None, 0))(params, x)
    assert net[2].weight is weight
    assert_same_state(net, before)
    torch.save(net, io.BytesIO())


# -- Objects, order, threads -----------------------------------------------------------


def test_one_object_entered_twice_and_again():
    """Nothing is kept on the object: re-entrant and reusable."""
    model = small()
    before = everything(model)
    block = vmap_safe(model)
    for _ in range(2):
        with block:
            with block:
                assert not model[1].training
            assert not model[1].training
        assert_same_state(model, before)


def test_nested_modes_of_one_model():
    """The inner mode holds inside, the outer one again after it."""
    model = small()[:2]
    with vmap_safe(model, mode="group_norm", num_groups=2):
        outer = vmap(model)(X)
        with vmap_safe(model, mode="eval"):
            inner = vmap(model)(X)
        torch.testing.assert_close(vmap(model)(X), outer)
    with vmap_safe(model, mode="eval"):
        torch.testing.assert_close(vmap(model)(X), inner)
    assert not torch.allclose(inner, outer)


def test_a_part_in_another_mode():
    """The innermost block that covers a layer decides, on either side of it."""
    whole = nn.Sequential(small()[:2], small()[1:2])
    with vmap_safe(whole, mode="group_norm", num_groups=2):
        part = vmap(whole[0])(X)
        with vmap_safe(whole[1], mode="eval"):
            out = vmap(whole)(X)
            torch.testing.assert_close(vmap(whole[0])(X), part)
    with vmap_safe(whole[1], mode="eval"):
        torch.testing.assert_close(vmap(whole[1])(part), out)


def test_models_side_by_side():
    """Each model keeps its own mode."""
    student, teacher = small()[:2], small()[:2]
    with vmap_safe(student, mode="no_running_stats"), vmap_safe(teacher):
        a, b = vmap(student)(X), vmap(teacher)(X)
    with vmap_safe(student, mode="no_running_stats"):
        torch.testing.assert_close(vmap(student)(X), a)
    with vmap_safe(teacher):
        torch.testing.assert_close(vmap(teacher)(X), b)


@pytest.mark.parametrize("mode", ["sync", "group_norm"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_without_statistics_inside_another_models_block(affine, mode):
    """The block that covers it decides, not the innermost one."""
    layer = nn.BatchNorm2d(4, affine=affine, track_running_stats=False)
    model, other, x = nn.Sequential(layer), small(), torch.randn(3, 2, 4, 5, 5)
    with vmap_safe(model, mode=mode, num_groups=2):
        expected = vmap(model)(x)
        with vmap_safe(other):
            actual = vmap(model)(x)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, torch.stack([model(one) for one in x]))


def test_blocks_closed_in_the_wrong_order():
    """An error, and both models are as they were when both are closed."""
    a, b = small(), small()
    before = everything(a), everything(b)
    block_a, block_b = vmap_safe(a), vmap_safe(b, mode="no_running_stats")
    block_a.__enter__()
    block_b.__enter__()
    with pytest.raises(BlockError, match="not the innermost block"):
        block_a.__exit__(None, None, None)
    assert_same_state(a, before[0])
    expected = vmap(b[:2])(X)
    assert expected.shape == (3, 2, 4, 3, 3)
    a(X[0])  # nothing holds it any more
    assert a[1].num_batches_tracked == 2
    block_b.__exit__(None, None, None)
    assert_same_state(b, before[1])
    with pytest.raises(BlockError, match="is not open in this thread"):
        block_a.__exit__(None, None, None)


def test_the_same_model_closed_in_the_wrong_order():
    """The block that stays open still applies its mode."""
    model = small()
    before = everything(model)
    outer, inner = vmap_safe(model), vmap_safe(model, mode="no_running_stats")
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(BlockError):
        outer.__exit__(None, None, None)
    assert model[1].training and not model[1].track_running_stats
    inner.__exit__(None, None, None)
    assert_same_state(model, before)


def test_another_thread_with_other_options():
    """An error that names the layer and both options; nothing changes."""
    model = small()
    with vmap_safe(model):
        before = everything(model)
        with pytest.raises(BlockError) as caught:
            in_a_thread(lambda: vmap_safe(model, mode="group_norm").__enter__())
        assert_same_state(model, before)
    text = str(caught.value)
    assert "'1' (BatchNorm2d)" in text
    assert 'mode="group_norm"' in text and 'mode="eval"' in text


def test_entry_that_fails_half_way():
    """A second model that cannot be entered leaves the first one alone."""
    a, b = small(), small()
    before = everything(a)
    with vmap_safe(b):
        with pytest.raises(BlockError):
            in_a_thread(lambda: vmap_safe(a, b, mode="group_norm").__enter__())
        assert_same_state(a, before)
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="lazy"):
        vmap_safe(a, lazy).__enter__()
    assert_same_state(a, before)


@pytest.mark.parametrize("step", ["listen", "switch", "install", "put_on"])
def test_entry_that_is_interrupted(step, monkeypatch):
    """KeyboardInterrupt in the middle of entering: all of it is taken back."""

    def interrupted(*args):
        raise KeyboardInterrupt

    model = small()
    before = everything(model)
    with monkeypatch.context() as patch:
        home = operators if step == "install" else scope
        patch.setattr(home, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            vmap_safe(model).__enter__()
    assert_same_state(model, before)


@pytest.mark.filterwarnings("ignore::vmapsafe.LeftOutWarning")
def test_rules_hold_in_the_thread_that_opened_the_block():
    """A hand-made layer writes in another thread, and does not in this one."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x

    model = Counts()
    with vmap_safe(model):
        model(X)
        assert model.calls == 0
        in_a_thread(lambda: model(X))
        assert model.calls == 1


def test_closed_in_another_thread():
    """An error there; the thread that opened the block can still close it."""
    model = small()
    before = everything(model)
    block = vmap_safe(model)
    block.__enter__()
    with pytest.raises(BlockError, match="in the thread that entered it"):
        in_a_thread(lambda: block.__exit__(None, None, None))
    block.__exit__(None, None, None)
    assert_same_state(model, before)


def test_default_device_inside():
    """torch's own mode, set inside and left open, does not disturb the order."""
    model = small()
    try:
        with vmap_safe(model):
            torch.set_default_device("cpu")
            vmap(model[:2])(X)
    finally:
        torch.set_default_device(None)


# -- Activation checkpointing ---------------------------------------------------------


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_backward(mode, reentrant):
    """Inside the block the numbers are the plain ones; after it there is an error."""
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self, saving):
            super().__init__()
            torch.manual_seed(3)
            self.body, self.saving = small()[:2].double(), saving

        def forward(self, x):
            if self.saving:
                return checkpoint(self.body, x, use_reentrant=reentrant)
            return self.body(x)

    def loss(model):
        x = X[0].double().requires_grad_()
        return model(x).pow(3).sum()

    plain, model = Net(False), Net(True)
    before = everything(model)[2]["body.1.running_mean"][2].clone()
    with vmap_safe(plain, mode=mode):
        loss(plain).backward()
    with vmap_safe(model, mode=mode):
        loss(model).backward()
        later = loss(model)
    for p, q in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(RuntimeError, match="Call backward inside the block"):
        later.backward()
    assert torch.equal(model.body[1].running_mean, before)
    assert model.body[1].num_batches_tracked == 1
    del later
    loss(model).backward()  # the watch ends with the graph


def test_a_forward_that_exec_made():
    """In a namespace without a name, the function belongs to no Python module."""
    found = {}
    exec("def forward(self, x): return self.net(x)", {}, found)
    assert found["forward"].__module__ is None
    Wrapper = type("Wrapper", (nn.Module,), found)
    model = Wrapper()
    model.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(5, 3)
    model(x)
    with vmap_safe(model):
        out = vmap(model)(x[:, None])
    torch.testing.assert_close(out[:, 0], model.eval()(x))
