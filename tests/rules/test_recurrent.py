"""Recurrent layers and cells in a block equal a Python loop in plain torch."""

import copy
import itertools
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from slow import rows as slow_rows
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

from vmapsafe import (
    VmapSafeError,
    VmapSafeRuntimeError,
    VmapSafeValueError,
    clipped_grad_sum,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
)
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe._rows import looks
from vmapsafe.rules import through_time
from vmapsafe.testing import assert_same

B, T, N, C, H = 3, 4, 2, 3, 2


class Case(NamedTuple):
    """A layer; its input is one sequence without ``batch``, and the initial state is
    zero without ``state``."""

    layer: type
    options: dict = {}
    batch: bool = True
    state: bool = False

    def __str__(self):
        options = [f"{name}={value}" for name, value in self.options.items()]
        flags = ["a state"] * self.state + ["one sequence"] * (not self.batch)
        return ", ".join([self.layer.__name__, *options, *flags])


EVERYTHING = {"num_layers": 2, "bidirectional": True, "batch_first": True}
LAYERS = [
    Case(nn.RNN),
    Case(nn.RNN, {"nonlinearity": "relu", **EVERYTHING}, state=True),
    Case(nn.GRU),
    Case(nn.GRU, {"bias": False, "num_layers": 2}, batch=False),
    Case(nn.GRU, EVERYTHING, state=True),
    Case(nn.LSTM),
    Case(nn.LSTM, {"bidirectional": True}, batch=False, state=True),
    Case(nn.LSTM, {"proj_size": 1, "bias": False}, state=True),
    Case(nn.LSTM, {"proj_size": 1, **EVERYTHING}),
]
CELLS = [
    Case(nn.RNNCell),
    Case(nn.RNNCell, {"nonlinearity": "relu", "bias": False}, state=True),
    Case(nn.GRUCell, batch=False),
    Case(nn.GRUCell, {"bias": False}, state=True),
    Case(nn.LSTMCell),
    Case(nn.LSTMCell, {"bias": False}, batch=False, state=True),
]
CASES = pytest.mark.parametrize("case", LAYERS + CELLS, ids=str)


class Net(nn.Module):
    """A layer whose initial state follows from the input and a parameter; all that it
    returns becomes one vector."""

    def __init__(self, case, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.layer = case.layer(C, H, **case.options).to(dtype)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.mul_(2)
        if case.state:
            self.first = nn.Parameter(torch.randn(2, 4 * H, dtype=dtype))

    def forward(self, x):
        found = self.layer(x, self.state(x)) if self.case.state else self.layer(x)
        leaves = torch.utils._pytree.tree_leaves(found)
        return torch.cat([leaf.flatten() for leaf in leaves])

    def state(self, x):
        layer, options = self.layer, self.case.options
        shape = (N,) if self.case.batch else ()
        if isinstance(layer, nn.RNNBase):
            shape = (layer.num_layers * (1 + layer.bidirectional), *shape)
        widths = (options.get("proj_size") or H, H)
        states = [
            self.first[i, : torch.Size(shape).numel() and 1] * x.sum().sin()
            + self.first[i, :width].expand(*shape, width)
            for i, width in enumerate(widths)
        ]
        return tuple(states) if "LSTM" in self.case.layer.__name__ else states[0]


def input_of(case, size=B, dtype=torch.float64):
    torch.manual_seed(1)
    shape = (N, C) if case.batch else (C,)
    if case in LAYERS:
        first = case.options.get("batch_first") and case.batch
        shape = (N, T, C) if first else (T, *shape)
    return torch.randn(size, *shape, dtype=dtype)


def loss(output):
    """Of every output another derivative, and a second one."""
    weights = torch.arange(output.numel(), dtype=output.dtype).cos()
    return (output * weights.view_as(output)).sum() + output.square().sum()


def parameters(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def stacked(dicts):
    return {name: torch.stack([one[name] for one in dicts]) for name in dicts[0]}


def plain_grads(net, x):
    return stacked([one for one in _each(net, x)])


def _each(net, x):
    for one in x:
        named = dict(net.named_parameters())
        found = torch.autograd.grad(loss(net(one)), [*named.values()])
        yield dict(zip(named, found))


# -- Transforms ------------------------------------------------------------------------


@CASES
def test_forward(case):
    """vmap, along another dimension, nested, and with plain autograd around it."""
    net, x = Net(case), input_of(case, 4)
    expected = torch.stack([net(one) for one in x])
    leaves = [*net.parameters()]
    wanted = torch.autograd.grad(loss(expected), leaves)
    with vmap_safe(net):
        assert_same(vmap(net)(x), expected)
        assert_same(vmap(net, in_dims=-1)(x.movedim(0, -1)), expected)
        nested = vmap(vmap(net), in_dims=1, out_dims=1)(x.unflatten(0, (2, 2)))
        assert_same(nested.flatten(0, 1), expected)
        with torch.no_grad():
            assert_same(vmap(net)(x), expected.detach())
        found = torch.autograd.grad(loss(vmap(net)(x)), leaves)
    assert_same(found, wanted)


@CASES
def test_gradients(case):
    """grad and vmap(grad), by the parameters and by the input."""
    net, x = Net(case), input_of(case)
    expected = plain_grads(net, x)
    given = x.clone().requires_grad_()
    (by_input,) = torch.autograd.grad(sum(loss(net(one)) for one in given), given)

    def of(values, x):
        return loss(functional_call(net, values, (x,)))

    values = parameters(net)
    with vmap_safe(net):
        for i in range(B):
            one = {name: row[i] for name, row in expected.items()}
            assert_same(grad(of)(values, x[i]), one)
        both = vmap(grad(of, argnums=(0, 1)), (None, 0))(values, x)
    assert_same(both, (expected, by_input))


@CASES
def test_forward_mode_and_second_derivatives(case):
    """jvp, jacrev, jacfwd, hessian, and each under vmap."""
    net, x = Net(case), input_of(case, 2)
    v = torch.randn_like(x)
    jacobian = torch.autograd.functional.jacobian
    jacobians = torch.stack([jacobian(net, one) for one in x])
    scalar = lambda x: loss(net(x))  # noqa: E731
    hessians = [torch.autograd.functional.hessian(scalar, one) for one in x]
    dims = x[0].dim()
    tangents = torch.stack(
        [torch.tensordot(j, one, dims) for j, one in zip(jacobians, v)]
    )
    with vmap_safe(net):
        one = jvp(net, (x[0],), (v[0],))[1]
        assert_same(one, tangents[0])
        many = vmap(lambda x, v: jvp(net, (x,), (v,))[1])(x, v)
        assert_same(many, tangents)
        for derive in (jacrev, jacfwd):
            assert_same(derive(net)(x[0]), jacobians[0])
            assert_same(vmap(derive(net))(x), jacobians)
        assert_same(hessian(scalar)(x[0]), hessians[0])
        assert_same(vmap(hessian(scalar))(x), torch.stack(hessians))
        assert_same(jacrev(jacfwd(scalar))(x[0]), hessians[0])


@CASES
def test_second_derivatives_by_weights(case):
    """A hessian by one weight, and the gradient of a gradient's norm under vmap."""
    net, x = Net(case), input_of(case, 2)
    named = dict(net.named_parameters())
    name = next(name for name in named if "weight_hh" in name)

    def norms(x):
        found = torch.autograd.grad(loss(net(x)), [*named.values()], create_graph=True)
        return sum(one.square().sum() for one in found)

    expected = [torch.autograd.grad(norms(one), [*named.values()]) for one in x]
    expected = stacked([dict(zip(named, one)) for one in expected])

    def of(values, x):
        return loss(functional_call(net, values, (x,)))

    def norm(values, x):
        return sum(one.square().sum() for one in grad(of)(values, x).values())

    def by_weight(weight):
        values = {**parameters(net), name: weight}
        return loss(functional_call(net, values, (x[0],)))

    wanted = torch.autograd.functional.hessian(by_weight, named[name].detach())
    with vmap_safe(net):
        found = vmap(grad(norm), (None, 0))(parameters(net), x)
        assert_same(found, expected)
        assert_same(hessian(by_weight)(named[name].detach()), wanted)


@pytest.mark.parametrize("own", [False, True])
@CASES
def test_ensembles(case, own):
    """Stacked weights, with one input for all or each its own; gradients of the sum,
    by plain autograd around it and by grad inside it."""
    nets = [Net(case) for _ in range(B)]
    for i, net in enumerate(nets):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + 0.3 * i)
    x = input_of(case)
    inputs = [*x] if own else [x[0]] * B
    expected = torch.stack([net(one) for net, one in zip(nets, inputs)])
    grads = stacked([plain_grads(n, one[None]) for n, one in zip(nets, inputs)])
    grads = {name: value.squeeze(1) for name, value in grads.items()}
    values, _ = stack_module_state(nets)
    base = Net(case)

    def of(values, x):
        return functional_call(base, values, (x,))

    dims, given = (0, 0 if own else None), x if own else x[0]
    with vmap_safe(base):
        output = vmap(of, dims)(values, given)
        assert_same(output, expected)
        total = sum(map(loss, output))
        found = torch.autograd.grad(total, [*values.values()])
        assert_same(dict(zip(values, found)), grads)
        inside = vmap(grad(lambda v, x: loss(of(v, x))), dims)(values, given)
    assert_same(inside, grads)


@pytest.mark.parametrize("case", [Case(nn.LSTM), Case(nn.GRU), Case(nn.RNN)], ids=str)
def test_float32(case):
    """torch's kernels for float32 are others, without a derivative by forward mode."""
    net, x = Net(case, torch.float32), input_of(case, dtype=torch.float32)
    v = torch.randn_like(x)
    wide = Net(case)
    with vmap_safe(net), vmap_safe(wide):
        for transformed in (
            lambda net: vmap(net),
            lambda net: vmap(lambda x: jvp(net, (x,), (v[0].to(x.dtype),))[1]),
            lambda net: vmap(hessian(lambda x: loss(net(x)))),
            lambda net: lambda x: jvp(net, (x[0],), (v[0].to(x.dtype),))[1],
            lambda net: lambda x: hessian(lambda x: loss(net(x)))(x[0]),
        ):
            found, wanted = transformed(net)(x), transformed(wide)(x.double())
            assert_same(found, wanted.float(), rtol=1e-4, atol=1e-5)


def test_torchs_own_runs_where_it_can(monkeypatch):
    """Outside transforms, and under one gradient, a block changes nothing."""
    net = Net(Case(nn.LSTM), torch.float32).requires_grad_(False)
    x = input_of(net.case, dtype=torch.float32)[0]
    own = net(x)
    with vmap_safe(net):
        monkeypatch.setattr(F, "linear", None)
        assert torch.equal(net(x), own)
        grad(lambda x: net(x).sum())(x)
        assert torch.equal(vmap(net)(x[None])[0], own)


# -- Per-sample gradients --------------------------------------------------------------

ROWS = pytest.mark.parametrize("case", [c for c in LAYERS if c.batch], ids=str)


class Batched(nn.Module):
    """A layer over sequences (B, T, C) or (T, B, C), and a linear layer."""

    def __init__(self, case, learned=False):
        super().__init__()
        self.inner = Net(case._replace(state=False))
        self.mix = nn.Linear(C, C, dtype=torch.float64)

    def forward(self, x):
        x = torch.tanh(self.mix(x))
        if not self.inner.layer.batch_first:
            x = x.transpose(0, 1)
        output, state = self.inner.layer(x)
        if not self.inner.layer.batch_first:
            output = output.transpose(0, 1)
        leaves = [output, *torch.utils._pytree.tree_leaves(state)]
        return torch.cat(
            [
                leaf.flatten(1) if i == 0 else leaf.transpose(0, 1).flatten(1)
                for i, leaf in enumerate(leaves)
            ],
            1,
        )


WANT = {
    "losses": q.Losses(),
    "norms": q.Norms(),
    "sum": q.Sum(),
    "clipped": q.ClippedSum(1.0),
    "weighted": q.WeightedSum(torch.tensor([1.0, -2.0, 0.0]).double()),
    "squares": q.SumOfSquares(),
    "gram": q.Gram(),
    "rows": q.Rows(),
}


def from_rows(rows, losses):
    """The same by the definitions."""
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    norms = flat.norm(dim=1)

    def weighted(factors):
        return {n: torch.einsum("b,b...", factors, r) for n, r in rows.items()}

    return {
        "losses": losses,
        "norms": norms,
        "sum": weighted(torch.ones_like(norms)),
        "clipped": weighted((1 / norms).clamp_max(1)),
        "weighted": weighted(torch.tensor([1.0, -2.0, 0.0]).double()),
        "squares": {name: row.square().sum(0) for name, row in rows.items()},
        "gram": flat @ flat.T,
        "rows": rows,
    }


@pytest.mark.parametrize("slices", [False, True])
@ROWS
def test_quantities(case, slices):
    """Everything at once and rows alone, of samples and of slices that are batches."""
    net = Batched(case)
    torch.manual_seed(2)
    shape = (B, N, T, C) if slices else (B, T, C)
    x = torch.randn(shape, dtype=torch.float64)
    parts = x if slices else x.unsqueeze(1)
    rows = slow_rows(net, loss, x, slices=slices)
    losses = torch.stack([loss(net(part)) for part in parts]).detach()
    expected = from_rows(rows, losses)
    options = {"keep_batch_dim": not slices}
    for chunk_size, fast in itertools.product((None, 2), (True, False)):
        options = {**options, "chunk_size": chunk_size, "fast": fast}
        found = per_sample(net, loss, x, want=WANT, **options)
        assert_same(found, expected, rtol=1e-9, atol=1e-9)
        vectors = {name: row[:2] for name, row in rows.items()}
        dots = per_sample(net, loss, x, want=q.Dots(vectors), **options)
        assert_same(dots, expected["gram"][:, :2], rtol=1e-9, atol=1e-9)


@ROWS
def test_weights_are_streamed(case, monkeypatch):
    """Each weight is used in one product for all steps, and no rows are made."""
    streamed = []
    original = looks.Feed.streamed

    def noted(self, name, *rest):
        streamed.append(name)
        return original(self, name, *rest)

    monkeypatch.setattr(looks.Feed, "streamed", noted)
    net = Batched(case)
    x = torch.randn(B, T, C, dtype=torch.float64)
    per_sample_grad_norms(net, loss, x)
    assert sorted(streamed) == sorted(name for name, _ in net.named_parameters())


class Model(nn.Module):
    """A model whose forward is a function of it and the input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module.double())

    def forward(self, x):
        return self.function(self, x)


def learned_state(net, x):
    h = net.state(x.new_ones(1, 2 * H)).expand(1, len(x), H)
    return net.layer(x, (h * x.mean(), h.contiguous()))[0]


def decoder(net, x):
    output, state = net.encoder(x)
    return net.decoder(output, state)[0]


def twice(net, x):
    return net.layer(net.layer(x)[0])[0]


def written_in_place(net, x):
    """Users do that: what a layer returns is theirs."""
    output, (h, c) = net.layer(x)
    c = c.mul_(2)
    return torch.relu_(output.mul_(3)).sum(1) + c[0]


def last_written_in_place(net, x):
    h = net.layer(x)[1]
    return h.mul_(2)[0]


def from_the_input(net, x):
    """So the weights of the samples differ."""
    scale = 1 + x.mean().sin()
    values = {name: p * scale for name, p in net.layer.named_parameters()}
    return functional_call(net.layer, values, (x,))[0]


def last_cell(net, x):
    return net.layer(x)[1][1]


def unused(net, x):
    net.layer(x)
    return net.head(x)


def cell_in_a_loop(net, x):
    h = x.new_zeros(len(x), H)
    c = h
    for one in x.unbind(1):
        h, c = net.cell(one, (h, c))
    return h


def frozen(layer):
    layer.weight_hh_l0.requires_grad_(False)
    layer.bias_ih_l0.requires_grad_(False)
    return layer


class Scaled(nn.Module):
    """So each sample has a weight of its own, and not a copy."""

    def forward(self, weight):
        return weight / weight.norm()


def scaled(layer):
    for name in [name for name, _ in layer.named_parameters() if "_l0" in name]:
        if "_hh" in name:
            parametrize.register_parametrization(layer, name, Scaled())
    return layer


def LSTM(inputs=C, **options):
    return nn.LSTM(inputs, H, batch_first=True, **options)


MODELS = {
    "a state that is learned": lambda: Model(
        learned_state, layer=LSTM(), state=nn.Linear(2 * H, H)
    ),
    "a decoder": lambda: Model(decoder, encoder=LSTM(), decoder=LSTM(H)),
    "used twice": lambda: Model(twice, layer=nn.GRU(H, H, batch_first=True)),
    "written in place": lambda: Model(written_in_place, layer=LSTM()),
    "written in place, RNN": lambda: Model(
        last_written_in_place, layer=nn.RNN(C, H, batch_first=True)
    ),
    "written in place, GRU": lambda: Model(
        last_written_in_place, layer=nn.GRU(C, H, batch_first=True)
    ),
    "the last cell": lambda: Model(last_cell, layer=LSTM()),
    "unused": lambda: Model(unused, layer=LSTM(), head=nn.Linear(C, 2)),
    "a cell in a loop": lambda: Model(cell_in_a_loop, cell=nn.LSTMCell(C, H)),
    "partly frozen": lambda: Model(twice, layer=frozen(LSTM(H))),
    "frozen": lambda: Model(
        lambda net, x: net.after(net.layer(net.before(x))[0]),
        before=nn.Linear(C, C),
        layer=LSTM().requires_grad_(False),
        after=nn.Linear(H, 2),
    ),
    **{
        f"weights that follow from parameters, {name}": lambda make=make: Model(
            lambda net, x: net.layer(x)[0], layer=scaled(make())
        )
        for name, make in {
            "RNN": lambda: nn.RNN(C, H, batch_first=True),
            "GRU": lambda: nn.GRU(C, H, batch_first=True, bias=False),
            "LSTM": lambda: LSTM(proj_size=1, num_layers=2),
        }.items()
    },
    **{
        f"weights that follow from the input, {name}": lambda make=make: Model(
            from_the_input, layer=make()
        )
        for name, make in {
            "RNN": lambda: nn.RNN(C, H, batch_first=True),
            "GRU": lambda: nn.GRU(C, H, batch_first=True, bidirectional=True),
            "LSTM": lambda: LSTM(proj_size=1, num_layers=2),
        }.items()
    },
}


@pytest.mark.parametrize("size", [1, B])
@pytest.mark.parametrize("name", MODELS)
def test_rows_and_norms_of_models(name, size):
    torch.manual_seed(0)
    net = MODELS[name]()
    sizes = [getattr(m, "input_size", C) for m in net.modules()]
    width = H if H in sizes and name != "a decoder" else C
    x = torch.randn(size, T, width, dtype=torch.float64)
    rows = slow_rows(net, loss, x)
    assert_same(per_sample_grads(net, loss, x), rows)
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    assert_same(per_sample_grad_norms(net, loss, x), flat.norm(dim=1))
    some = [name for name in rows if "weight" in name][:1]
    found = per_sample_grads(net, loss, x, params=some)
    assert_same(found, {name: rows[name] for name in some})
    total = clipped_grad_sum(net, loss, x, max_grad_norm=1e9)
    assert_same(total, {name: row.sum(0) for name, row in rows.items()})


def test_rows_are_watched_by_plain_autograd():
    """Second derivatives of rows do not come from one recorded pass."""
    net = Model(lambda net, x: net.layer(x)[0], layer=LSTM())
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    rows = per_sample_grads(net, loss, x)
    found = torch.autograd.grad(sum(r.square().sum() for r in rows.values()), x)
    total = 0
    for one in x.split(1):
        grads = torch.autograd.grad(
            loss(net(one)), [*net.parameters()], create_graph=True
        )
        total = total + sum(g.square().sum() for g in grads)
    assert_same(found, torch.autograd.grad(total, x))


def test_memory_stays_small(monkeypatch):
    """The pass through time happens once, for the whole batch."""
    calls = []
    original = through_time._ThroughTime.apply

    def noted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(through_time._ThroughTime, "apply", noted)
    net = Model(lambda net, x: net.layer(x)[0], layer=LSTM(num_layers=2))
    per_sample_grad_norms(net, loss, torch.randn(B, T, C, dtype=torch.float64))
    assert len(calls) == 2


# -- Dropout ---------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_dropout_between_layers(layer):
    """As torch's vmap gives it: the draws of one call with "same"."""
    net = layer(C, H, num_layers=3, dropout=0.5).double()
    x = torch.randn(T, N, C, dtype=torch.float64).expand(B, T, N, C)
    torch.manual_seed(3)
    expected = net(x[0])[0]
    with vmap_safe(net):
        with pytest.raises(RuntimeError, match="random"):
            vmap(lambda x: net(x)[0])(x)
        torch.manual_seed(3)
        found = vmap(lambda x: net(x)[0], randomness="same")(x)
        assert_same(found, expected.expand(B, T, N, H))
        found = vmap(lambda x: net(x)[0], randomness="different")(x)
        assert len({tuple(one.flatten().tolist()) for one in found}) == B
        torch.manual_seed(3)
        assert_same(jvp(lambda x: net(x)[0], (x[0],), (x[0],))[0], expected)
    net.eval()
    with vmap_safe(net):
        assert_same(vmap(lambda x: net(x)[0])(x)[0], net(x[0])[0])


def test_dropout_in_rows():
    net = Model(lambda net, x: net.layer(x)[0], layer=LSTM(num_layers=2, dropout=0.5))
    x = torch.randn(1, T, C, dtype=torch.float64).expand(B, T, C)
    torch.manual_seed(3)
    rows = slow_rows(net, loss, x[:1])
    torch.manual_seed(3)
    found = per_sample_grads(net, loss, x, randomness="same")
    assert_same(found, {n: r.expand(B, *r.shape[1:]) for n, r in rows.items()})
    found = per_sample_grads(net, loss, x, randomness="different")["layer.weight_hh_l1"]
    assert len({tuple(row.flatten().tolist()) for row in found}) == B


# -- Dtypes, compilers, words ----------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [*LAYERS[:4], LAYERS[5], LAYERS[7], *CELLS],
    ids=str,
)
def test_autocast(case):
    """The dtypes of plain torch, and its values as far as they are precise."""
    warnings.filterwarnings("ignore", "LSTM with projections is not supported")
    net = case.layer(C, H, **case.options)
    x = input_of(case, dtype=torch.float32)
    flat = torch.utils._pytree.tree_leaves
    with torch.autocast("cpu", torch.bfloat16):
        expected = [flat(net(one)) for one in x]
        with vmap_safe(net):
            found = vmap(lambda x: tuple(flat(net(x))))(x)
            derived = jvp(lambda x: tuple(flat(net(x))), (x[0],), (x[0],))
            rows = vmap(grad(lambda x: sum(o.float().sum() for o in flat(net(x)))))(x)
    assert rows.dtype == torch.float32 and rows.abs().sum() > 0
    for outputs, *others in zip(found, *expected):
        assert_same(outputs, torch.stack(others), rtol=0.05, atol=0.05)
    for outputs, other in zip(derived[0], expected[0]):
        assert_same(outputs, other, rtol=0.05, atol=0.05)


def test_rows_under_autocast():
    net = Model(lambda net, x: net.layer(x)[0], layer=LSTM()).float()
    x = torch.randn(B, T, C)
    with torch.autocast("cpu", torch.bfloat16):
        rows = per_sample_grads(net, lambda y: y.float().square().sum(), x)
        norms = per_sample_grad_norms(net, lambda y: y.float().square().sum(), x)
    exact = slow_rows(net, lambda y: y.square().sum(), x)
    assert_same(rows, exact, rtol=0.1, atol=0.05)
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    assert_same(norms, flat.norm(dim=1), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("case", [*LAYERS[:1], *LAYERS[7:], *CELLS[:1]], ids=str)
def test_compiled(case):
    """torch.compile takes recurrent layers if it is told to, and cells in any case."""
    torch._dynamo.reset()
    net, x = Net(case._replace(state=False)), input_of(case)
    expected = plain_grads(net, x)
    values = parameters(net)

    def of(values, x):
        return loss(functional_call(net, values, (x,)))

    def rows(values, x):
        with vmap_safe(net):
            return vmap(grad(of), (None, 0))(values, x)

    compiled = torch.compile(rows, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(allow_rnn=case in LAYERS):
        assert_same(compiled(values, x), expected)
    if case in LAYERS:
        own = net.layer._flat_weights
        assert all(a is b for a, b in zip(own, net.layer.parameters(), strict=True))


def test_compiled_norms():
    torch._dynamo.reset()
    net = Model(lambda net, x: net.layer(x)[0], layer=LSTM())
    x = torch.randn(B, T, C, dtype=torch.float64)
    compiled = torch.compile(
        lambda x: per_sample_grad_norms(net, loss, x),
        backend="aot_eager",
        fullgraph=True,
    )
    with torch._dynamo.config.patch(allow_rnn=True):
        found = compiled(x)
    assert_same(found, per_sample_grad_norms(net, loss, x))


def test_packed_sequences_are_refused():
    net = nn.LSTM(C, H)
    x = torch.randn(B, T, N, C)

    def packing(x):
        return net(pack_padded_sequence(x, torch.tensor([T, 2])))[0].data

    with vmap_safe(net):
        with pytest.raises(VmapSafeRuntimeError, match="packed") as found:
            vmap(packing)(x)
        assert "torch.gather" in found.value.do
        values, _ = stack_module_state([net, nn.LSTM(C, H)])
        packed = pack_padded_sequence(x[0], torch.tensor([T, 2]))
        for each in (net, nn.GRU(C, H), nn.RNN(C, H)):
            values, _ = stack_module_state([each, each])
            with pytest.raises(VmapSafeError, match="packed"):
                vmap(lambda v: functional_call(each, v, (packed,))[0].data)(values)
        assert torch.equal(packing(x[0]), net(packed)[0].data)  # outside vmap
    model = Model(lambda model, x: packing(x.expand(T, N, C)), layer=net).float()
    with pytest.raises(VmapSafeError, match="packed"):
        per_sample_grads(model, torch.sum, torch.randn(B, 1, C))


def test_sequences_without_steps_are_refused():
    net = nn.GRU(C, H)
    with vmap_safe(net):
        with pytest.raises(VmapSafeValueError, match="have no steps"):
            vmap(net)(torch.randn(B, 0, N, C))


@CASES
def test_no_slices(case):
    """Empty outputs, whose other sizes are those of a slice."""
    layer = case.layer(C, H, **case.options).double()
    shape = (T,) * isinstance(layer, nn.RNNBase) + (N,) * case.batch + (C,)
    one = layer(torch.randn(shape).double())
    expected = torch.utils._pytree.tree_map(lambda t: t.new_empty(0, *t.shape), one)
    with vmap_safe(layer):
        found = vmap(layer)(torch.randn(0, *shape).double())
        nested = vmap(vmap(layer))(torch.randn(2, 0, *shape).double())
    assert_same(found, expected)
    two = torch.utils._pytree.tree_map(lambda t: torch.stack([t, t]), expected)
    assert_same(nested, two)


def test_addresses_of_weights(monkeypatch):
    """On a GPU a layer asks for them under functional_call, and torch would raise."""
    asked = []

    def flatten_parameters(self):
        asked.append({weight.data_ptr() for weight in self._flat_weights})

    net = nn.LSTM(C, H)
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", flatten_parameters)
    x = torch.randn(B, T, C)
    with vmap_safe(net):
        values = parameters(net)
        vmap(grad(lambda v, x: functional_call(net, v, (x,))[0].sum()), (None, 0))(
            values, x
        )
        assert asked == [{0}]
        with pytest.raises(RuntimeError, match="data pointer"):
            vmap(lambda x: x * x.data_ptr())(x)
        assert x.data_ptr()


def test_models_are_copied_and_saved_afterwards(tmp_path):
    """A layer keeps a list of its weights; it has its own again when it is saved."""
    net = nn.LSTM(C, H, batch_first=True)
    x = torch.randn(B, T, C)
    per_sample_grads(net, lambda output: output[0].sum(), x)
    other = copy.deepcopy(net)
    torch.save(net, tmp_path / "net")
    loaded = torch.load(tmp_path / "net", weights_only=False)
    for one in (other, loaded, net):
        assert_same(one(x)[0], net(x)[0])
        assert all(a is b for a, b in zip(one._flat_weights, one.parameters()))
