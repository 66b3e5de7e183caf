"""Hand-made layers: "eval" switches them if ``also=`` names their class, and a warning
says when a write of theirs is left out."""

import copy
import gc
import warnings
import weakref

import pytest
import slow
import torch
import torch.nn.functional as F
from state import assert_same_state, everything
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from vmapsafe import (
    LeftOutWarning,
    batched,
    check,
    clipped_grad_sum,
    over,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
    vmap_safe,
)

OTHERS = ["no_running_stats", "group_norm", "sync"]
B = 5
X = torch.randn(B, 3, dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 0, 1])


class Norm(nn.Module):
    """Divides by a second moment that it keeps under a name of its own."""

    names = ("mu", "power")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, dtype=torch.float64) + 0.5)
        for name in self.names:
            self.register_buffer(name, torch.rand(4, dtype=torch.float64) + 0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        mean, power = (getattr(self, name) for name in self.names)
        if self.training:
            with torch.no_grad():
                mean.lerp_(x.mean(0), 0.1)
                power.lerp_(x.square().mean(0), 0.1)
                self.count.add_(1)
            mean, power = x.mean(0), x.square().mean(0)
        return (x - mean) * self.weight / (power + 1e-3).sqrt()


class Sub(Norm):
    pass


class Assigns(Norm):
    """Keeps its statistics by assignment."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self.mu = 0.9 * self.mu + 0.1 * x.detach().mean(0)
        return (x - x.mean(0)) * self.weight


class Running(Norm):
    """A norm with the buffer names of torch's own layers."""

    names = ("running_mean", "running_var")


class OwnBatchNorm(nn.BatchNorm1d):
    """A batch norm with its own forward."""

    def __init__(self):
        super().__init__(4, dtype=torch.float64)
        self.running_mean.uniform_(-1, 1)
        self.running_var.uniform_(0.5, 2)
        self.num_batches_tracked.add_(1)

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.running_mean.lerp_(mean.detach(), 0.1)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


KINDS = [Norm, Sub, Assigns, Running, OwnBatchNorm]


def built(kind):
    torch.manual_seed(1)
    parts = nn.Linear(3, 4), kind(), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)
    net = nn.Sequential(*parts).double()
    net[3].running_mean.uniform_(-1, 1)
    net[3].num_batches_tracked.add_(1)
    return net


def by_hand(net):
    """A copy whose normalisation layers are switched by hand."""
    net = copy.deepcopy(net)
    net[1].eval(), net[3].eval()
    return net


def own(function, **needed):
    return lambda *args, **options: function(*args, **needed, **options)


FUNCTIONS = {
    "per_sample_grads": per_sample_grads,
    "per_sample_grads, vmap": own(per_sample_grads, fast=False),
    "per_sample_grad_norms": per_sample_grad_norms,
    "clipped_grad_sum": own(clipped_grad_sum, max_grad_norm=0.3),
    "per_sample_sketch": own(per_sample_sketch, k=3),
}


def expected(name, rows, net):
    """The same from rows; of a sketch, by the block-free function on the net."""
    if "norms" in name:
        return slow.norms(rows)
    if "clipped" in name:
        return slow.clipped(rows, 0.3)
    if "sketch" in name:
        return per_sample_sketch(net, F.cross_entropy, X, Y, k=3)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("error::vmapsafe.LeftOutWarning")
def test_rows_are_those_of_a_layer_in_eval(name, kind):
    net = built(kind)
    hand = by_hand(net)
    rows = slow.rows(hand, F.cross_entropy, X, Y)
    before = everything(net)
    found = FUNCTIONS[name](net, F.cross_entropy, X, Y, also=(kind,))
    torch.testing.assert_close(found, expected(name, rows, hand.eval()))
    assert_same_state(net, before)


@pytest.mark.parametrize("mode", OTHERS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:clipped_grad_sum")
def test_an_error_in_the_other_modes(name, mode):
    """It names the layer, and is raised before anything runs."""
    net = built(Sub)
    before = everything(net)
    words = r"'1' \(Sub\) is named by also="
    with pytest.raises(ValueError, match=words):
        FUNCTIONS[name](net, F.cross_entropy, X, Y, mode=mode, also=(Norm,))
    with pytest.raises(ValueError, match=words):
        vmap_safe(net, mode=mode, also=(Norm,)).__enter__()
    with pytest.raises(ValueError, match=words):
        vmap_safe(mode=mode, also=(Norm,))(lambda net: net(X))(net)
    assert_same_state(net, before)


@pytest.mark.parametrize("mode", OTHERS)
def test_frozen_in_every_mode(mode):
    """A layer that was put in eval mode before stays in it, without an error."""
    net = built(Norm)
    net[1].eval()
    with vmap_safe(net, mode=mode, num_groups=2, also=(Norm,)):
        assert not net[1].training
        found = vmap(net[1])(X.new_ones(2, 3, 4))
    torch.testing.assert_close(found[0], net[1](X.new_ones(3, 4)))
    report = check(net, X, mode=mode, also=(Norm,))
    assert not [f for f in report if f.kind == "unsupported" and f.path == "1"]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "also,words",
    [
        (Norm, r"Write also=\(Norm,\)"),
        ([Norm, Sub], r"Write also=\(Norm, Sub\)"),
        ((Norm(),), r"Write also=\(MyNorm,\), with classes"),
        ((int,), "with classes of modules"),
        ("Norm", "with classes of modules"),
        (None, "with classes of modules"),
    ],
)
def test_no_tuple_of_classes(name, also, words):
    net = built(Norm)
    calls = (
        lambda: FUNCTIONS[name](net, F.cross_entropy, X, Y, also=also),
        lambda: check(net, also=also),
        lambda: vmap_safe(net, also=also),
    )
    for call in calls:
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.parametrize("kind", [Norm, Sub, Running, OwnBatchNorm])
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled(kind):
    """A model compiled inside a block and around it, under vmap and as a whole."""
    net = built(kind)
    hand = by_hand(net)

    def forward(x):
        return vmap(lambda one: net(one))(x.unsqueeze(1)).squeeze(1)

    def around(x):
        with vmap_safe(net, also=(kind,)):
            return forward(x)

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, backend="eager", fullgraph=True)

    before = everything(net)
    torch.testing.assert_close(compiled(around)(X), hand(X))
    assert_same_state(net, before)
    with vmap_safe(net, also=(kind,)):
        torch.testing.assert_close(compiled(forward)(X), hand(X))
        torch.testing.assert_close(compiled(lambda x: net(x))(X), hand(X))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_one_another(kind):
    """The inner block decides; the outer one applies again after it."""
    net = built(kind)
    hand, x = by_hand(net), X.unsqueeze(1)
    before = everything(net)
    with vmap_safe(net, also=(kind,)):
        with vmap_safe(net, also=(nn.Tanh, kind)):
            torch.testing.assert_close(vmap(net)(x).squeeze(1), hand(X))
        net.train()
        torch.testing.assert_close(vmap(net)(x).squeeze(1), hand(X))
        torch.testing.assert_close(batched(net)(X), hand(X))
        rows = per_sample_grads(net, F.cross_entropy, X, Y, also=(kind,))
    expected = per_sample_grads(hand.eval(), F.cross_entropy, X, Y)
    torch.testing.assert_close(rows, expected)
    assert_same_state(net, before)


@pytest.mark.parametrize("kind", KINDS)
def test_own_rows_under_autocast(kind):
    """vmap(grad) gives the dtypes and numbers of a loop over the switched copy."""
    net = built(kind).float()
    hand, x = by_hand(net), X.float()
    params = {n: p.detach() for n, p in net.named_parameters()}

    def loss(net, params, x, y):
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    with torch.autocast("cpu", torch.bfloat16):
        with vmap_safe(net, also=(kind,)):
            one = lambda p, x, y: loss(net, p, x[None], y[None])  # noqa: E731
            rows = vmap(grad(one), (None, 0, 0))(params, x, Y)
        for i in range(B):
            given = {n: p.clone().requires_grad_() for n, p in params.items()}
            loss(hand, given, x[i : i + 1], Y[i : i + 1]).backward()
            for name, p in given.items():
                assert rows[name].dtype == p.grad.dtype
                scale = p.grad.abs().max()
                torch.testing.assert_close(
                    rows[name][i], p.grad, rtol=0.05, atol=0.05 * float(scale)
                )


def test_files_know_the_classes(tmp_path):
    """A folder that was begun without a class cannot be continued with it."""
    net = built(Norm)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)

    def norms(**options):
        return over(loader, per_sample_grad_norms, net, F.cross_entropy, **options)

    found = norms(also=(Norm,)).save(tmp_path)
    hand = by_hand(net).eval()
    expected = per_sample_grad_norms(hand, F.cross_entropy, X, Y)
    torch.testing.assert_close(torch.tensor(found), expected)
    norms(also=(Norm,)).save(tmp_path)
    for other in ((), (Sub,), (Norm, Sub)):
        with pytest.raises(ValueError, match="also was .*Norm.* and is"):
            norms(also=other).save(tmp_path)


# -- What check says -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Norm, Sub, Assigns])
def test_check_proposes_the_class(kind):
    (finding,) = [f for f in check(built(kind), X) if f.path == "1"]
    assert finding.kind == "writes buffers"
    assert finding.becomes["eval"] == "stays in training mode; its write is left out"
    assert f"also=({kind.__name__},)" in finding.advice


@pytest.mark.parametrize("kind", KINDS)
def test_check_with_the_class(kind):
    """The layer is safe in "eval", and refused in other modes, as the error says."""
    report = check(built(kind), X, also=(kind,))
    assert report.safe("eval")
    found = [f for f in report if f.path == "1"]
    assert not any(["also=(" in f.advice for f in found])
    (refused,) = [f for f in found if f.kind == "unsupported"]
    assert refused.detail.startswith("is named by also=")
    for mode in OTHERS:
        assert not report.safe(mode)
        assert refused.becomes[mode] == "refused at entry"
    assert check(built(kind), mode="sync", also=(kind,))[0].kind == "unsupported"


@pytest.mark.parametrize("kind", [Running, OwnBatchNorm])
def test_check_proposes_nothing_where_it_is_switched_anyway(kind):
    assert not any(["also=(" in f.advice for f in check(built(kind), X)])


class ByNumpy(Norm):
    def forward(self, x):
        if self.training:
            self.mu.numpy()[:] += 1
        return x - self.mu


@pytest.mark.parametrize("kind", [ByNumpy])
def test_check_names_what_cannot_be_caught(kind):
    (finding,) = [f for f in check(built(kind), X) if f.path == "1"]
    assert "in a way that a block does not catch: by .data" in finding.detail
    assert f"also=({kind.__name__},)" in finding.advice
    assert not finding.safe["eval"]
    assert check(built(kind), X, mode="eval", also=(kind,)).safe("eval")


# -- Writes of other spellings ---------------------------------------------------------


def by_init(layer, x):
    nn.init.ones_(layer.mu)
    nn.init.uniform_(layer.power)
    nn.init.constant_(layer.mu, 3.0)


def by_lists(layer, x):
    torch._foreach_mul_([layer.mu, layer.power], 0.5)
    torch._foreach_add_([layer.mu, layer.power], [x[0], x[0]], alpha=2)


def by_inplace(layer, x):
    F.relu(layer.mu.sub_(9), inplace=True)
    F.elu(layer.mu, 1.0, True)
    F.dropout(layer.power, 0.5, training=True, inplace=True)
    nn.Hardtanh(0, 0.1, inplace=True)(layer.power)
    F.threshold(layer.power, 9.0, 0.0, inplace=True)


def by_operators(layer, x):
    torch.ops.aten.add_(layer.mu, x[0])
    torch.ops.aten.add_(layer.mu, 1.0)
    torch.ops.aten.copy_(layer.power, x[0])
    torch.ops.aten._foreach_add_([layer.mu, layer.power], 1.0)


def by_out(layer, x):
    torch.add(layer.mu, 1.0, out=layer.mu)
    torch.ops.aten.mul(layer.mu, 2.0, out=layer.mu)


WRITES = [by_init, by_lists, by_inplace, by_operators, by_out]


class Writes(Norm):
    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.write(self, x)
        return (x - self.mu) * self.weight


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("transform", ["none", "vmap", "grad"])
@pytest.mark.filterwarnings("ignore::vmapsafe.LeftOutWarning")
def test_writes_of_other_spellings_are_left_out(write, transform):
    layer = Writes(write)
    before = everything(layer)
    x = torch.randn(3, 4, dtype=torch.float64)
    with vmap_safe(layer):
        if transform == "none":
            found = layer(x)
        elif transform == "vmap":
            found = vmap(layer, randomness="different")(x.unsqueeze(1)).squeeze(1)
        else:
            grad(lambda x: layer(x).sum())(x)
            found = layer(x)
    torch.testing.assert_close(found, (x - layer.mu) * layer.weight)
    assert_same_state(layer, before)
    assert check(nn.Sequential(layer), x, randomness="same", mode="eval").safe("eval")


def test_lists_with_some_buffers():
    """Tensors that are not buffers are written."""

    class Lists(Norm):
        def forward(self, x):
            own, mine = torch.zeros(4), [torch.ones(4), torch.ones(4)]
            torch._foreach_add_([own, self.mu, mine[0]], [1.0, 2.0, 3.0])
            torch.ops.aten._foreach_add_([mine[1], self.mu], 5.0)
            return own, *mine

    layer = Lists()
    before = everything(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        with vmap_safe(layer):
            found = layer(X)
    assert [float(t[0]) for t in found] == [1.0, 4.0, 6.0]
    assert_same_state(layer, before)


def test_observers_write_nothing():
    from torch.ao.quantization import (
        FakeQuantize,
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
    )

    for kind in (FakeQuantize, FusedMovingAvgObsFakeQuantize):
        layer = kind(observer=MovingAverageMinMaxObserver)
        layer(torch.randn(5, 4))
        before = {n: b.clone() for n, b in layer.named_buffers()}
        net = nn.Sequential(layer, nn.BatchNorm1d(4)).train()
        net[1].num_batches_tracked.add_(1)
        with vmap_safe(net):
            net(9 * torch.randn(5, 4))
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, before[name]), name


def test_in_place_on_tensors_that_are_not_buffers():
    """They are written: new tensors, their views, and tensors saved for backward."""

    class Works(Norm):
        def forward(self, x):
            y = F.relu(x + 0, inplace=True)
            y += 1
            z = y.exp()
            z[:, :2].mul_(2)
            torch.ops.aten.add_(z, self.mu)
            return z

    layer = Works()
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = layer(x)
    with vmap_safe(layer):
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(vmap(layer)(x.unsqueeze(1)).squeeze(1), expected)


# -- The warning -----------------------------------------------------------------------


def said(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if w.category is LeftOutWarning]


def run(net, x=X, **options):
    with vmap_safe(net, **options):
        vmap(net)(x.unsqueeze(0))


@pytest.mark.parametrize("base", [Norm, Assigns])
def test_warns_once_a_class(base):
    class Fresh(base):
        pass

    check(built(Fresh), X)  # which says it in its report
    (text,) = said(lambda: run(built(Fresh)))
    assert "'1' (Fresh)" in text and "also=(Fresh,)" in text
    assert said(lambda: run(built(Fresh), mode="sync")) == []


def test_the_class_is_not_kept_alive():
    def used():
        class Fresh(Norm):
            pass

        assert len(said(lambda: run(built(Fresh)))) == 1
        run(built(Fresh), also=(Fresh,))
        return weakref.ref(Fresh)

    ref = used()
    gc.collect()
    assert ref() is None


class Quiet(nn.Module):
    """A module whose writes are not updates of statistics."""

    def __init__(self, write):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.zeros(1, dtype=torch.float64))
        self.write = write

    def forward(self, x):
        self.write(self, x)
        return x + self.table[0]


def counts(layer, x):
    layer.seen += 1


def grows(layer, x):
    layer.table = torch.zeros(len(x), dtype=torch.float64)


@pytest.mark.parametrize("write", [counts, grows])
def test_no_warning_of_counters_and_tables(write):
    net = nn.Sequential(Quiet(write)).train()
    assert said(lambda: run(net)) == []
    advised = [f for f in check(nn.Sequential(Quiet(write)), X) if "also" in f.advice]
    assert not advised


class OwnLinear(nn.Linear):
    pass


def test_no_warning_of_spectral_norm():
    for wrap in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
        net = nn.Sequential(wrap(OwnLinear(3, 2))).double()
        assert said(lambda net=net: run(net)) == []
        assert not [f for f in check(net, X) if "also" in f.advice]


def test_no_warning_of_observers():
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    class Own(FakeQuantize):
        pass

    quantize = Own.with_args(observer=MovingAverageMinMaxObserver)()
    net = nn.Sequential(nn.Linear(3, 4), quantize)

    def call():
        with vmap_safe(net):
            net(X.float())

    assert said(call) == []


def test_no_warning_in_eval_or_where_named():
    class Fresh(Norm):
        pass

    assert said(lambda: run(built(Fresh).eval())) == []
    assert said(lambda: run(built(Fresh), also=(Fresh,))) == []
    assert len(said(lambda: run(built(Fresh)))) == 1
