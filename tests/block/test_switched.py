"""Layers however they are reached and whatever their class; what the owner does inside;
hand-made layers; threads."""

import abc
import contextlib
import copy
import functools
import io
import pickle
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from blocks import MODES, block
from plain import switched
from state import assert_same_state, everything
from threads import in_a_thread
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import _pop_mode, _push_mode

from vmapsafe import BlockError, LeftOutWarning, vmap_safe


def seen(model, *shape):
    """The model in double precision, after three batches."""
    torch.manual_seed(0)
    model.double()
    for _ in range(3):
        model(torch.randn(16, *shape).double() * 2 + 1)
    return model


def mlp():
    torch.manual_seed(1)
    return seen(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), 4)


# -- Layers reached past their call ----------------------------------------------------


class Reaching(nn.Module):
    """Ways to reach a batch norm; ``layer`` is the batch norm that each amounts to."""

    def __init__(self, **options):
        super().__init__()
        self.layer = nn.BatchNorm1d(4, **options)

    def forward(self, x):
        return self.layer(x)


class PastTheCall(Reaching):
    def forward(self, x):
        return self.layer.forward(x)


class OnItsBuffers(Reaching):
    def forward(self, x):
        n = self.layer
        training = n.training or not n.track_running_stats
        return F.batch_norm(
            *(x, n.running_mean, n.running_var, n.weight, n.bias),
            *(training, n.momentum, n.eps),
        )


class ByTorch(Reaching):
    def forward(self, x):
        n = self.layer
        training = n.training or not n.track_running_stats
        return torch.batch_norm(
            *(x, n.weight, n.bias, n.running_mean, n.running_var),
            *(training, n.momentum, n.eps, False),
        )


class ByKeyword(Reaching):
    def forward(self, x):
        n = self.layer
        training = n.training or not n.track_running_stats
        return F.batch_norm(
            input=x,
            running_var=n.running_var,
            running_mean=n.running_mean,
            bias=n.bias,
            weight=n.weight,
            training=training,
        )


class FromAHelper(Reaching):
    def forward(self, x):
        return normalised(self.layer, x)


def normalised(layer, x):
    return type(layer).forward(layer, x)


class Casting(nn.BatchNorm1d):
    """Its forward hands over statistics of another dtype."""

    def forward(self, x):
        training = self.training or not self.track_running_stats
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(
            x.to(torch.float64),
            None if mean is None else mean.to(torch.float64),
            None if var is None else var.to(torch.float64),
            *(self.weight, self.bias, training, 0.1, self.eps),
        ).to(x.dtype)


class CastsItself(Reaching):
    def __init__(self, **options):
        super().__init__()
        self.layer = Casting(4, **options)


class WithActivation(nn.BatchNorm1d):
    """As timm's BatchNormAct2d."""

    def forward(self, x):
        training = self.training or (self.running_mean is None)
        tracks = not self.training or self.track_running_stats
        if self.training and self.track_running_stats:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            *(self.weight, self.bias, training, 0.1, self.eps),
        )


class Activated(Reaching):
    def __init__(self, **options):
        super().__init__()
        self.layer = WithActivation(4, **options)


class Sync(Reaching):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.SyncBatchNorm(4, **options)

    def forward(self, x):
        return self.layer(x)


class WithWeights(Reaching):
    """It also normalises a weight, which is not a layer of the model."""

    def __init__(self, **options):
        super().__init__(**options)
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        kernel = F.batch_norm(self.kernel[None], None, None, training=True)[0]
        return self.layer(F.linear(x, kernel))


WAYS = [
    *(PastTheCall, OnItsBuffers, ByTorch, ByKeyword, FromAHelper),
    *(CastsItself, Activated, WithWeights, Sync),
]
KINDS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


def reference_of(way, mode, kind):
    """torch's own layer in place of the way's, called as usual, switched by hand."""
    way = copy.deepcopy(way)
    plain = Reaching(**kind).double()
    plain.layer.load_state_dict(way.layer.state_dict())
    plain.train(way.training)
    if isinstance(way, WithWeights):
        inner = switched(plain, mode)
        return lambda x: inner(
            x @ F.batch_norm(way.kernel[None], None, None, training=True)[0].T
        )
    return switched(plain, mode)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_layers_reached_past_their_call(way, mode, kind):
    """They follow the mode, under vmap and without, or an error says why not."""
    if len(kind) == 2 and way in (OnItsBuffers, ByTorch, ByKeyword):
        return  # it passes none of the layer's tensors
    model = seen(way(**kind), 4)
    before = everything(model)
    x = torch.randn(3, 6, 4).double()
    if mode == "sync":
        expected = reference_of(model, "no_running_stats", kind)(x.flatten(0, 1))
        expected = expected.unflatten(0, (3, 6))
    else:
        reference = reference_of(model, mode, kind)
        expected = torch.stack([reference(slice_) for slice_ in x])
    with block(model, mode):
        try:
            found = vmap(model)(x)
        except (ValueError, RuntimeError) as error:
            assert "vmap_safe" in str(error) or "layer" in str(error), error
            found = None
    assert_same_state(model, before)
    if found is not None:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("called", [F.instance_norm, torch.instance_norm])
def test_instance_norm_on_a_layers_buffers(called, mode):
    """A call on the buffers of a layer counts as a call of the layer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

        def forward(self, x):
            n = self.layer
            if called is F.instance_norm:
                tensors = x, n.running_mean, n.running_var, n.weight, n.bias
                return called(*tensors, n.training, n.momentum, n.eps)
            tensors = x, n.weight, n.bias, n.running_mean, n.running_var
            return called(*tensors, n.training, n.momentum, n.eps, False)

    model = seen(Net(), 4, 5)
    before = everything(model)
    x = torch.randn(3, 2, 4, 5).double()
    reference = switched(model.layer, "no_running_stats" if mode == "sync" else mode)
    with block(model, mode):
        found = vmap(model)(x)
    torch.testing.assert_close(found, torch.stack([reference(one) for one in x]))
    assert_same_state(model, before)


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_share_buffers(mode):
    """Each layer is computed with its own weight."""
    model = seen(nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)), 4)
    for name, buffer in model[0]._buffers.items():
        setattr(model[2], name, buffer)
    with torch.no_grad():
        model[0].weight.fill_(2), model[2].weight.fill_(3)
    before = everything(model)
    x = torch.randn(3, 6, 4).double()
    if mode == "sync":
        reference = switched(model, "no_running_stats")
        expected = reference(x.flatten(0, 1)).unflatten(0, (3, 6))
    else:
        reference = switched(model, mode)
        expected = torch.stack([reference(one) for one in x])
    with block(model, mode):
        torch.testing.assert_close(vmap(model)(x), expected)
    assert_same_state(model, before)


# -- Unusual classes -------------------------------------------------------------------


class Named(nn.BatchNorm1d):
    kinds = []

    def __init_subclass__(cls, *, tag, **options):
        super().__init_subclass__(**options)
        cls.kinds.append(tag)


class WithArguments(Named, tag="a"):
    pass


class Meta(type):
    made = []

    def __new__(mcs, name, bases, namespace):
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace)

    def __call__(cls, *args):
        return super().__call__(*args)


class OfAMetaclass(nn.BatchNorm1d, metaclass=Meta):
    pass


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x): ...


class Concrete(nn.BatchNorm1d, Abstract):
    def forward(self, x):
        return super().forward(x)


class WithSlots(nn.BatchNorm1d):
    __slots__ = ("extra",)

    def __init__(self, n):
        super().__init__(n)
        self.extra = 1


class WithHooks(nn.BatchNorm1d):
    """Hooks that see attributes."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)

    def __getattr__(self, name):
        if name == "twice":
            return 2
        return super().__getattr__(name)


class WithTraining(nn.BatchNorm1d):
    """Its mode is a property of its own."""

    @property
    def training(self):
        return self.__dict__.get("_mode", True)

    @training.setter
    def training(self, mode):
        self.__dict__["_mode"] = mode


class Copying(nn.BatchNorm1d):
    def __deepcopy__(self, memo):
        made = self.__class__.__new__(self.__class__)
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def __reduce__(self):
        return super().__reduce__()


CLASSES = [
    *(WithArguments, OfAMetaclass, Concrete, WithSlots, WithHooks, WithTraining),
    *(Copying, nn.BatchNorm1d),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CLASSES)
def test_classes(kind, mode):
    """Work, or are refused at entry with nothing changed; what asks for the class, the
    name or the text of a module gets that of its owner."""
    model = seen(nn.Sequential(nn.Linear(4, 4), kind(4)), 4)
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(6, 4).double()
    expected = switched(plain, "no_running_stats" if mode == "sync" else mode)(x)
    before = everything(model)
    text, made = repr(model), (list(Meta.made), list(Named.kinds))
    try:
        with block(model, mode):
            found = vmap(model)(x[None])[0]
            layer = model[1]
            assert repr(model) == text
            assert isinstance(layer, kind) and layer.__class__ is kind
            twins = [copy.copy(layer), copy.deepcopy(layer)]
            twins.append(pickle.loads(pickle.dumps(layer)))
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            twins.append(torch.load(file, weights_only=False))
            for twin in twins:
                assert type(twin) is kind
                assert twin.training and twin.track_running_stats
    except (TypeError, BlockError) as error:
        assert "vmap_safe" in str(error)
    else:
        torch.testing.assert_close(found, expected)
    assert type(model[1]) is kind
    assert (Meta.made, Named.kinds) == made
    assert_same_state(model, before)
    for twin in twins:
        torch.testing.assert_close(twin(x), copy.deepcopy(plain[1])(x))


# -- What the owner does inside --------------------------------------------------------


def nested(model, mode):
    """The ways to nest blocks."""
    stack = contextlib.ExitStack()
    stack.enter_context(block(model, mode))
    stack.enter_context(block(model, MODES[MODES.index(mode) - 1]))
    return stack


def by_call(module, mode):
    module.train(mode)


def by_assignment(module, mode):
    for each in module.modules():
        each.training = mode


OPENINGS = [block, nested]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("opened", OPENINGS)
@pytest.mark.parametrize("ask", [by_call, by_assignment])
@pytest.mark.parametrize("part", ["the model", "a part", "a layer"])
@pytest.mark.parametrize("was, asked", [(a, b) for a in (0, 1) for b in (0, 1)])
def test_the_owners_last_word(part, ask, opened, mode, was, asked):
    """What the owner asks for inside counts after the block, also in generators."""
    was, asked = bool(was), bool(asked)

    def new():
        model = nn.Sequential(mlp(), nn.Sequential(mlp(), nn.Dropout(0.5)))
        parts = {"the model": model, "a part": model[1], "a layer": model[1][0][1]}
        return model.train(was), parts[part]

    def modes(model):
        return [module.training for module in model.modules()]

    expected, its_part = new()
    its_part.train(asked)

    model, its_part = new()
    with opened(model, mode):
        ask(its_part, asked)
    assert modes(model) == modes(expected)

    model, its_part = new()
    with contextlib.suppress(KeyError), opened(model, mode):
        ask(its_part, asked)
        raise KeyError
    assert modes(model) == modes(expected)

    model, its_part = new()

    def steps():
        with opened(model, mode):
            ask(its_part, asked)
            yield

    for _ in steps():
        pass
    assert modes(model) == modes(expected)


@pytest.mark.parametrize("mode", MODES)
def test_what_layers_compute_does_not_change(mode):
    """This holds whatever the owner asks for inside."""
    model = mlp()
    x = torch.randn(2, 6, 4).double()
    with block(model, mode):
        expected = vmap(model)(x)
        for ask in (by_call, by_assignment):
            for asked in (False, True):
                for part in (model, model[1]):
                    ask(part, asked)
                    torch.testing.assert_close(vmap(model)(x), expected)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_reset_inside(mode):
    """They are reset, as outside a block."""
    model = mlp()
    with block(model, mode):
        model[1].reset_running_stats()
    for name, buffer in nn.BatchNorm1d(4).double().named_buffers():
        assert torch.equal(getattr(model[1], name), buffer), name


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_update_bn(mode, updates):
    """Happens where forwards update, and is refused elsewhere, with the statistics as
    they were."""
    from torch.optim.swa_utils import update_bn

    if updates and mode != "sync":
        return
    loader = [torch.randn(8, 4).double() + i for i in range(3)]
    expected = mlp()
    update_bn(loader, expected)
    model = mlp()
    before = everything(model)
    if updates:
        with block(model, mode, update_running_stats=True):
            update_bn(loader, model)
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer)
        assert model[1].momentum == expected[1].momentum
    else:
        with block(model, mode), pytest.raises(BlockError, match="update_bn"):
            update_bn(loader, model)
        assert model[1].momentum == 0.1
        assert_same_state(model, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_loaded_inside(mode, old, assign):
    """It loads as outside, also if it is older than ``num_batches_tracked``."""
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    state = seen(other, 4).state_dict()
    if old:
        del state["1.num_batches_tracked"]
        state._metadata["1"]["version"] = 1
    model, expected = mlp(), mlp()
    with torch.no_grad():
        model[1].num_batches_tracked.fill_(9)
        expected[1].num_batches_tracked.fill_(9)
    said = [str(expected.load_state_dict(copy.copy(state), assign=assign))]
    with block(model, mode):
        said.append(str(model.load_state_dict(copy.copy(state), assign=assign)))
    assert said[0] == said[1]
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        if assign and name in state:
            assert model.state_dict()[name].data_ptr() == state[name].data_ptr()


@pytest.mark.parametrize("mode", MODES)
def test_another_dtype_inside(mode):
    """The dtype stays, and the layer still follows the block's mode."""
    model = mlp().float()
    reference = switched(mlp(), "no_running_stats" if mode == "sync" else mode)
    x = torch.randn(6, 4).double()
    with block(model, mode):
        model.double()
        found = vmap(model)(x[None])[0]
    assert model[1].running_mean.dtype == torch.float64
    torch.testing.assert_close(found, reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_replaced_inside(mode):
    """The new layer stays, and the old one is restored too."""
    model = mlp()
    old, new = model[1], nn.BatchNorm1d(4).double()
    before = everything(old)
    with block(model, mode):
        model[1] = new
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new(torch.randn(5, 4).double())
    assert model[1] is new and type(old) is nn.BatchNorm1d
    assert new.num_batches_tracked == 1  # it is the owner's
    assert_same_state(old, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", [False, True])
def test_parametrizations_inside(mode, kept):
    """They outlive the block, and the layer works in it and after it."""

    class Positive(nn.Module):
        def forward(self, w):
            return w.abs() + 1

    model = mlp()
    x = torch.randn(6, 4).double()
    reference = mlp()
    if kept:
        parametrize.register_parametrization(reference[1], "weight", Positive())
    after = copy.deepcopy(reference)(x)
    plain = mlp()
    with torch.no_grad():
        if kept:
            plain[1].weight.copy_(plain[1].weight.abs() + 1)
    expected = switched(plain, "no_running_stats" if mode == "sync" else mode)(x)
    with block(model, mode):
        parametrize.register_parametrization(model[1], "weight", Positive())
        if not kept:
            parametrize.remove_parametrizations(
                model[1], "weight", leave_parametrized=False
            )
        torch.testing.assert_close(vmap(model)(x[None])[0], expected)
    assert parametrize.is_parametrized(model[1]) == kept
    assert type(model[1]).__module__ != "vmapsafe._block.switched"
    torch.testing.assert_close(model(x), after)


@pytest.mark.parametrize("mode", MODES)
def test_parametrizations_removed_inside(mode):
    """The layer had a parametrization at entry."""
    model = mlp()
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[1], dim=None)
    x = torch.randn(6, 4).double()
    plain = mlp()
    expected = switched(plain, "no_running_stats" if mode == "sync" else mode)(x)
    with block(model, mode):
        torch.testing.assert_close(vmap(model)(x[None])[0], expected)
        for layer in model[:2]:
            parametrize.remove_parametrizations(layer, "weight")
        torch.testing.assert_close(vmap(model)(x[None])[0], expected)
    assert type(model[1]) is nn.BatchNorm1d
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copy_that_runs_inside(how, mode):
    """It has the flags of outside. Except in "eval", a warning says so."""
    model = mlp()
    x = torch.randn(6, 4).double()
    expected = copy.deepcopy(model)(x)
    with block(model, mode), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        twin = how(model)
        torch.testing.assert_close(twin(x), expected)
        twin(x)
    said = [str(w.message) for w in said if "copy" in str(w.message)]
    assert len(said) == (mode != "eval")
    assert twin[1].num_batches_tracked == 5


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_with_another_state(mode):
    """A warning says that it is not covered, whatever its numbers are by then."""
    model, other = mlp(), mlp()
    state = {name: t + 1 for name, t in other.state_dict().items()}
    x = torch.randn(6, 4).double()
    with block(model, mode), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        twin = copy.deepcopy(model)
        twin.load_state_dict(state)
        other.load_state_dict(state)
        other(x)  # not a copy
        assert not said
        torch.testing.assert_close(twin(x), copy.deepcopy(other)(x))
        twin(x)
    said = [str(w.message) for w in said if "a copy of '1'" in str(w.message)]
    assert len(said) == (mode != "eval")


@pytest.mark.parametrize("mode", MODES)
def test_stacked_states_inside(mode):
    """The members' states are those of outside."""
    models = [mlp() for _ in range(2)]
    expected = stack_module_state(models)
    with block(nn.ModuleList(models), mode):
        found = stack_module_state(models)
    torch.testing.assert_close(found, expected)


def test_functional_call_with_other_buffers():
    """They are read, not written."""
    model = mlp()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    buffers["1.running_mean"] += 1
    kept = {k: v.clone() for k, v in buffers.items()}
    x = torch.randn(6, 4).double()
    plain = mlp().eval()
    plain.load_state_dict(buffers, strict=False)
    with vmap_safe(model):
        torch.testing.assert_close(functional_call(model, buffers, (x,)), plain(x))
    torch.testing.assert_close(buffers, kept)


# -- Hand-made layers ------------------------------------------------------------------


def own(update, **tensors):
    """A new class each time, because a class is warned about once."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            for name, buffer in tensors.items():
                self.register_buffer(name, buffer.clone())

        def forward(self, x):
            if not self.training:
                return x - self.mu
            with torch.no_grad():
                update(self, x)
            return x - x.mean(0)

    return Own


def in_place(module, x):
    module.mu.mul_(0.9).add_(x.mean(0), alpha=0.1)


def by_item(module, x):
    module.mu[:] = x.mean(0)


def by_operator(module, x):
    module.mu += x.mean(0)


def by_out(module, x):
    torch.add(module.mu, 1, out=module.mu)


def by_copy(module, x):
    module.mu.copy_(x.mean(0))


def of_a_view(module, x):
    module.mu[:2].zero_()


def assigned(module, x):
    module.mu = 0.9 * module.mu + 0.1 * x.mean(0)


def by_a_function(module, x):
    helper(module, "mu", x.mean(0))


def helper(module, name, value):
    setattr(module, name, value)


def in_place_by_a_function(module, x):
    written(module.mu, x.mean(0))


def written(buffer, value):
    buffer.lerp_(value, 0.1)


def registered(module, x):
    module.register_buffer("mu", x.mean(0))


def by_dict(module, x):
    module._buffers["mu"] = x.mean(0)


WRITES = [
    *(in_place, by_item, by_operator, by_out, by_copy, of_a_view, assigned),
    *(by_a_function, in_place_by_a_function, registered, by_dict),
]


def warned(said):
    return [str(w.message) for w in said if w.category is LeftOutWarning]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("update", WRITES)
def test_a_write_left_out(update, vmapped, mode):
    """One warning per class names the path and the way out."""
    kind = own(update, mu=torch.zeros(4).double())
    model = nn.Sequential(nn.Tanh(), nn.Sequential(kind(), kind())).double()
    before = everything(model)
    x = torch.randn(2, 5, 4).double()
    with block(model, mode), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            found = vmap(model)(x) if vmapped else torch.stack([model(e) for e in x])
    assert_same_state(model, before)
    y = x.tanh()
    torch.testing.assert_close(found, y - y.mean(1, keepdim=True))
    (text,) = warned(said)
    for word in ("'1.0'", "also=(Own,)", "'mu'"):
        assert word in text


@pytest.mark.parametrize("update", WRITES)
def test_also(update):
    """It switches them in "eval"; other modes accept frozen ones. Subclasses count."""
    kind = own(update, mu=torch.ones(4).double())
    model = nn.Sequential(type("Sub", (kind,), {})(), nn.Tanh())
    x = torch.randn(2, 5, 4).double()
    before = everything(model)
    with block(model, "eval", also=(kind,)):
        torch.testing.assert_close(vmap(model)(x), (x - 1).tanh())
    for mode in MODES[1:]:
        with pytest.raises(ValueError, match="also="):
            block(model, mode, also=(kind,)).__enter__()
    assert_same_state(model, before)
    model[0].eval()
    for mode in MODES:
        with block(model, mode, also=(kind,)):
            torch.testing.assert_close(vmap(model)(x), (x - 1).tanh())


class Holding(nn.Module):
    """A module with its function in an attribute."""

    def __init__(self, function):
        super().__init__()
        self.register_buffer("mu", torch.zeros(4).double())
        self.function = function

    def forward(self, x):
        self.function(self, x)
        return x


functions = types.ModuleType("functions")
functions.overwrite = assigned


class OfAnotherFile(Holding):
    def forward(self, x):
        functions.overwrite(self, x)
        return x


@pytest.mark.parametrize(
    "make",
    [
        *(lambda: Holding(assigned), lambda: Holding(functools.partial(assigned))),
        lambda: OfAnotherFile(None),
    ],
)
def test_functions_that_assign(make):
    """They are found in a module's attributes and in other files."""
    model = nn.Sequential(make())
    before = everything(model)
    x = torch.randn(2, 5, 4).double()
    with vmap_safe(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        vmap(model)(x)
        model(x[0])
    assert_same_state(model, before)


class Cached(nn.Module):
    """Buffers that grow or count are not statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x):
        self.calls += 1
        if len(self.table) < x.shape[-1]:
            self.table = torch.arange(x.shape[-1], dtype=x.dtype)
        return x + self.table


@pytest.mark.parametrize("mode", MODES)
def test_caches_and_counters(mode):
    """They are not warned about."""
    model = nn.Sequential(Cached(), nn.utils.spectral_norm(nn.Linear(4, 4))).double()
    x = torch.randn(2, 5, 4).double()
    with block(model, mode), warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        vmap(model)(x)
    assert model[0].calls == 0


@pytest.mark.parametrize("update", WRITES)
def test_updates_of_hand_made_layers(update):
    """They are left out, and if updates were asked for, a warning says so."""
    kind = own(update, mu=torch.zeros(4).double())
    model = nn.Sequential(kind(), nn.BatchNorm1d(4)).double()
    expected = nn.BatchNorm1d(4).double()
    x = torch.randn(2, 5, 4).double()
    with block(model, "sync", update_running_stats=True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            vmap(model)(x)
    assert len(warned(said)) == 1
    assert not model[0].mu.any()
    expected((x - x.mean(1, keepdim=True)).flatten(0, 1))
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model[1].get_buffer(name), buffer)


# -- Threads ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_flags_in_another_thread(mode):
    """They are those of outside the block."""
    model = mlp()
    model[0].eval()
    layer = model[1]
    with block(model, mode):
        flags = in_a_thread(lambda: (layer.training, layer.track_running_stats))
        text = in_a_thread(lambda: type(copy.deepcopy(layer)))
    assert flags == (True, True) and text is nn.BatchNorm1d


@pytest.mark.parametrize("mode", MODES)
def test_training_while_another_thread_scores(mode):
    """The statistics are those of training alone, the scores those of a block alone."""
    batches = [torch.randn(8, 4).double() for _ in range(60)]
    x = torch.randn(2, 6, 4).double()
    expected = mlp()
    trained = [expected(batch) for batch in batches]
    model = mlp()
    stop, scores = threading.Event(), []
    constant = mode != "eval"  # in which they move with the statistics
    with block(model, mode):
        first = vmap(model)(x)

    def score():
        while not stop.is_set():
            with block(model, mode):
                scores.append(vmap(model)(x))

    thread = threading.Thread(target=score)
    thread.start()
    try:
        found = [model(batch) for batch in batches]
    finally:
        stop.set()
        thread.join()
    torch.testing.assert_close(found, trained)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)
    assert not constant or all(torch.equal(score, first) for score in scores)


def test_other_options_in_another_thread():
    """They are refused, and nothing changes."""
    model = mlp()
    before = everything(model)
    with block(model, "eval"):
        for mode in MODES[1:]:
            with pytest.raises(BlockError, match="another thread"):
                in_a_thread(lambda: block(model, mode).__enter__())
        x = torch.randn(2, 6, 4).double()
        found = in_a_thread(lambda: block(model, "eval").run(vmap(model), x))
        torch.testing.assert_close(found, vmap(model)(x))
    assert_same_state(model, before)


@pytest.mark.parametrize("held", [False, True])
def test_a_thread_that_ends_inside(held):
    """Its block does not stay open, whether its object lives on or not."""
    model = mlp()
    before = everything(model)
    opened = block(model, "group_norm")

    def enter():
        (opened if held else block(model, "group_norm")).__enter__()

    assert in_a_thread(enter) is None
    x = torch.randn(2, 6, 4).double()
    with block(model, "no_running_stats"):  # which would be other options
        found = vmap(model)(x)
    reference = switched(model, "no_running_stats")
    torch.testing.assert_close(found, torch.stack([reference(one) for one in x]))
    assert_same_state(model, before)


class ByHand(nn.BatchNorm1d):
    """Batch norm whose forward is its own arithmetic."""

    def forward(self, x):
        if not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var, 0.1)
                self.num_batches_tracked += 1
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


@pytest.mark.parametrize("mode", ["no_running_stats", "group_norm", "sync"])
def test_a_batch_norm_layer_that_normalises_by_hand(mode):
    """No rule can tell what it does: it does what it does in training, and that is
    said. "eval" is eval."""
    torch.manual_seed(0)
    kind = type("ByHand", (ByHand,), {})  # anew: one warning a class
    model = nn.Sequential(nn.Linear(3, 4), kind(4)).double()
    model(torch.randn(8, 3).double() * 2 + 1)
    x, before = torch.randn(2, 5, 3).double(), copy.deepcopy(model.state_dict())
    with pytest.warns(LeftOutWarning, match="ByHand"), vmap_safe(model, mode=mode):
        out = vmap(model)(x)
    with vmap_safe(model):
        by_running = vmap(model)(x)
    after = model.state_dict()
    assert all([torch.equal(after[name], value) for name, value in before.items()])
    plain = copy.deepcopy(model)
    torch.testing.assert_close(out, torch.stack([plain(one) for one in x]))
    plain.load_state_dict(before)
    torch.testing.assert_close(by_running, plain.eval()(x.flatten(0, 1)).view_as(out))


@pytest.mark.parametrize("mode", ["eval", "no_running_stats", "group_norm", "sync"])
def test_a_mode_that_an_interrupt_in_torch_took_away(mode):
    """torch takes a mode off its stack while it handles a call; the next forward of a
    layer puts it on again, and nothing is left after the block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)).double()
    model(torch.randn(8, 2, 6).double() * 2 + 1)
    x = torch.randn(3, 2, 2, 6).double()
    with vmap_safe(model, mode=mode, num_groups=2):
        expected = vmap(model)(x)
        lost = _pop_mode()
        assert torch.equal(vmap(model)(x), expected)
        _push_mode(lost)  # as when the interrupted call is freed
    assert torch._C._len_torch_function_stack() == 0
    _push_mode(lost)
    with vmap_safe(model):
        pass
    assert torch._C._len_torch_function_stack() == 0


def test_a_layer_of_another_model_that_shares_statistics():
    """It is not taken for the one that the block covers."""
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.BatchNorm1d(3)).double() for _ in range(2))
    one(torch.randn(8, 3).double() * 2 + 1)
    with torch.no_grad():
        other[0].weight.mul_(2)
    other[0].running_mean = one[0].running_mean
    other[0].running_var = one[0].running_var
    x = torch.randn(5, 3).double()
    centred = x - x.mean(0)
    by_batch = 2 * centred / (centred.square().mean(0) + other[0].eps).sqrt()
    with vmap_safe(one):
        torch.testing.assert_close(other(x), by_batch)
    by_running = 2 * (x - one[0].running_mean) / (one[0].running_var + 1e-5).sqrt()
    for blocks in (
        (vmap_safe(one, mode="sync"), vmap_safe(other)),
        (vmap_safe(other), vmap_safe(one, mode="sync")),
    ):
        with blocks[0], blocks[1]:
            torch.testing.assert_close(other(x), by_running)


@pytest.mark.parametrize("mode", ["eval", "no_running_stats", "group_norm", "sync"])
@pytest.mark.parametrize("training", [True, False])
def test_operators_below_batch_norm(training, mode):
    """They are refused where the mode would not reach them, and nothing is written."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3) * 2 + 1)
    x, before = torch.randn(5, 3), copy.deepcopy(norm.state_dict())
    given = norm.weight, norm.bias, norm.running_mean, norm.running_var
    for function in (torch.native_batch_norm, torch.ops.aten.native_batch_norm):
        with vmap_safe(norm, mode=mode, num_groups=1):
            if training or mode != "eval":
                with pytest.raises(BlockError, match="Call the layer, or F.batch_norm"):
                    function(x, *given, training, 0.1, 1e-5)
            else:
                y = function(x, *given, training, 0.1, 1e-5)[0]
                torch.testing.assert_close(y, copy.deepcopy(norm).eval()(x))
    after = norm.state_dict()
    assert all([torch.equal(after[name], value) for name, value in before.items()])
